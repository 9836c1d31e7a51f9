use anyhow::Result;
use candle_core::Tensor;
use serde_json::{Map, Value, json};
use tinyfusion::core::Error;
use tinyfusion::diffusion::samplers::{
    DdpmConfig, DpmSolverConfig, Step, ddim, ddpm, dpm_solver_pp_2m,
};
use tinyfusion::diffusion::{Clip, DdimConfig, DiffusionConfig, GaussianDiffusion, Respacing};
use tinyfusion::models::DiT;

use super::{Drawing, Guided, Images, Noise, Sampler, Settings};
use crate::family::{Dit, Model};

/// DiT's: the reverse of the diffusion.
pub(crate) struct GaussianDrawing<'a> {
    net: Guided<'a, DiT>,
    process: GaussianDiffusion,
    sampler: Sampler,
    clip: bool,
}

impl<'a> GaussianDrawing<'a> {
    pub(crate) fn new(model: &Model<Dit>, settings: &'a Settings) -> Result<Self> {
        let sampler = settings.sampler.unwrap_or(Sampler::Ddim);
        if !matches!(sampler, Sampler::Ddpm | Sampler::Ddim | Sampler::Dpm) {
            return Err(Error::usage(format!(
                "a DiT is not sampled with {}: pass --sampler ddpm, ddim or dpm",
                sampler.name()
            ))
            .into());
        }
        settings.flow.refuse("a DiT")?;
        settings.tokens.refuse("a DiT")?;
        match settings.eta {
            Some(_) if sampler != Sampler::Ddim => {
                return Err(
                    Error::usage("eta is DDIM's: it does nothing with another --sampler").into(),
                );
            }
            Some(eta) if !(0.0..=1.0).contains(&eta) => {
                return Err(
                    Error::usage(format!("eta is {eta}, expected a number from 0 to 1")).into(),
                );
            }
            _ => {}
        }
        let samples = model.samples();
        Ok(Self {
            net: Guided {
                net: model.network()?,
                device: model.compute.device.clone(),
                samples,
                settings,
            },
            process: GaussianDiffusion::new(DiffusionConfig {
                respacing: respacing(settings, sampler, model.process.steps)?,
                ..model.process.clone()
            })?,
            sampler,
            clip: settings.clip.unwrap_or(samples.are_pixels),
        })
    }

    fn eta(&self) -> f64 {
        self.net.settings.eta.unwrap_or(0.0)
    }
}

/// The timesteps to visit of a chain of `trained`.
fn respacing(
    settings: &Settings,
    sampler: Sampler,
    trained: usize,
) -> tinyfusion::core::Result<Respacing> {
    if let Some(respacing) = &settings.respacing {
        respacing.timesteps(trained)?;
        return Ok(respacing.clone());
    }
    let steps = settings.steps_or(50);
    if steps > trained {
        return Err(Error::usage(format!(
            "steps is {steps}, but the model was trained on {trained} timesteps: pass at most that many"
        )));
    }
    if sampler != Sampler::Ddim {
        return Ok(Respacing::Sections(vec![steps]));
    }
    let strided = Respacing::Ddim(steps);
    if strided.timesteps(trained).is_err() {
        let possible = (1..=trained).map(|stride| trained.div_ceil(stride));
        let nearest = possible.min_by_key(|n| n.abs_diff(steps)).unwrap_or(1);
        return Err(Error::usage(format!(
            "DDIM visits every k-th of {trained} timesteps, and no k gives {steps} of them: pass --respacing {steps} \
             for an even spread, or --steps {nearest}"
        )));
    }
    Ok(strided)
}

impl Drawing for GaussianDrawing<'_> {
    fn steps(&self) -> Option<usize> {
        Some(self.process.num_timesteps())
    }

    fn report(&self) -> Map<String, Value> {
        let mut all = self.net.settings.report(self.sampler);
        all.insert("steps".into(), self.process.num_timesteps().into());
        all.insert("respacing".into(), json!(self.process.config().respacing));
        all.insert("eta".into(), self.eta().into());
        all.insert("clip".into(), self.clip.into());
        all
    }

    fn draw(
        &self,
        images: &Images,
        on_step: &dyn Fn() -> tinyfusion::core::Result<()>,
    ) -> tinyfusion::core::Result<Tensor> {
        let of = self.net.samples;
        let mut noise = Noise::of(images, &self.net.device);
        let z = noise.normal(of)?; // (B, C, H, W)
        let denoise = |x: &Tensor, t: &Tensor| self.net.ask(x, t, &images.classes);
        let noise = |_: usize| noise.normal(of);
        let on_step = |_: &Step<'_>| on_step();
        let clip = if self.clip { Clip::Unit } else { Clip::Off };
        let process = &self.process;
        match self.sampler {
            Sampler::Ddpm => ddpm(process, DdpmConfig { clip }, &z, denoise, noise, on_step),
            Sampler::Dpm => {
                dpm_solver_pp_2m(process, DpmSolverConfig { clip }, &z, denoise, on_step)
            }
            _ => {
                let eta = self.eta();
                ddim(
                    process,
                    DdimConfig { eta, clip },
                    &z,
                    denoise,
                    noise,
                    on_step,
                )
            }
        }
    }
}
