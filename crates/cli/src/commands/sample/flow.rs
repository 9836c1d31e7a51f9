use anyhow::Result;
use candle_core::Tensor;
use serde_json::{Map, Value, json};
use tinyfusion::core::Error;
use tinyfusion::diffusion::samplers::{
    LastStep, OdeConfig, OdeMethod, SdeConfig, SdeMethod, TimeStep, ode, sde,
};
use tinyfusion::diffusion::{DiffusionForm, Interpolant};
use tinyfusion::models::SiT;

use super::{Drawing, Guided, Images, Noise, Sampler, Settings};
use crate::family::{Model, Sit};
use crate::settings::finite;

/// Flags that only the samplers of a SiT know.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct FlowFlags {
    /// SiT, dopri5: error allowed in a step, absolute [default: 1e-6]
    #[arg(long, value_parser = finite)]
    atol: Option<f64>,
    /// SiT, dopri5: error allowed in a step, as a share of the state [default: 1e-3]
    #[arg(long, value_parser = finite)]
    rtol: Option<f64>,
    /// SiT, sde: how much noise is added, and taken away again, over time [default: sigma]. sbdm has no value at t = 0
    /// for a velocity on the paths linear and gvp
    #[arg(long, value_enum)]
    form: Option<Form>,
    /// SiT, sde: the norm of that form [default: 1]
    #[arg(long, value_parser = finite)]
    form_norm: Option<f64>,
    /// SiT, sde: how the last stretch is gone, without noise [default: mean]
    #[arg(long, value_enum)]
    last_step: Option<Last>,
    /// SiT, sde: length of the last step in t [default: 0.04]
    #[arg(long, value_parser = finite)]
    last_step_size: Option<f64>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Form {
    Constant,
    Sbdm,
    Sigma,
    Linear,
    Decreasing,
    IncreasingDecreasing,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Last {
    None,
    Mean,
    Tweedie,
    Euler,
}

impl FlowFlags {
    /// An error where one of them was given, which mean nothing to `whom`.
    pub(super) fn refuse(&self, whom: &str) -> tinyfusion::core::Result<()> {
        self.refuse_ode(whom)?;
        self.refuse_sde(whom)
    }

    fn refuse_ode(&self, whom: &str) -> tinyfusion::core::Result<()> {
        Settings::refuse(
            whom,
            &[("atol", self.atol.is_some()), ("rtol", self.rtol.is_some())],
        )
    }

    fn refuse_sde(&self, whom: &str) -> tinyfusion::core::Result<()> {
        Settings::refuse(
            whom,
            &[
                ("form", self.form.is_some()),
                ("form-norm", self.form_norm.is_some()),
                ("last-step", self.last_step.is_some()),
                ("last-step-size", self.last_step_size.is_some()),
            ],
        )
    }
}

/// The equation that is solved, and how.
enum Solver {
    Ode(OdeConfig),
    Sde(SdeConfig),
}

/// SiT's: along the flow from noise to data.
pub(crate) struct FlowDrawing<'a> {
    net: Guided<'a, SiT>,
    process: Interpolant,
    sampler: Sampler,
    solver: Solver,
}

impl<'a> FlowDrawing<'a> {
    pub(crate) fn new(model: &Model<Sit>, settings: &'a Settings) -> Result<Self> {
        let sampler = settings.sampler.unwrap_or(Sampler::Heun);
        Settings::refuse(
            "a SiT",
            &[
                ("respacing", settings.respacing.is_some()),
                ("eta", settings.eta.is_some()),
                ("clip", settings.clip.is_some()),
            ],
        )?;
        settings.tokens.refuse("a SiT")?;
        Ok(Self {
            net: Guided {
                net: model.network()?,
                device: model.compute.device.clone(),
                samples: model.samples(),
                settings,
            },
            process: Interpolant::new(model.process)?,
            sampler,
            solver: solver(sampler, settings)?,
        })
    }
}

fn solver(sampler: Sampler, settings: &Settings) -> tinyfusion::core::Result<Solver> {
    let flags = &settings.flow;
    let ode = |method| {
        flags.refuse_sde("the flow's equation: it is without noise")?;
        if method == OdeMethod::Dopri5 {
            Settings::refuse(
                "dopri5, which chooses its own",
                &[("steps", settings.steps.is_some())],
            )?;
        } else {
            flags.refuse_ode("a solver of fixed steps")?;
        }
        let d = OdeConfig::default();
        let (atol, rtol) = (flags.atol.unwrap_or(d.atol), flags.rtol.unwrap_or(d.rtol));
        Ok(Solver::Ode(OdeConfig {
            method,
            // The grid has both ends.
            num_steps: settings.steps_or(25).saturating_add(1),
            atol,
            rtol,
            ..d
        }))
    };
    let sde = |method| {
        flags.refuse_ode("a solver of fixed steps")?;
        if matches!(flags.last_step, Some(Last::None)) {
            let given = flags.last_step_size.is_some();
            Settings::refuse("--last-step none", &[("last-step-size", given)])?;
        }
        let d = SdeConfig::default();
        Ok(Solver::Sde(SdeConfig {
            method,
            form: match flags.form {
                None => d.form,
                Some(Form::Constant) => DiffusionForm::Constant,
                Some(Form::Sbdm) => DiffusionForm::Sbdm,
                Some(Form::Sigma) => DiffusionForm::Sigma,
                Some(Form::Linear) => DiffusionForm::Linear,
                Some(Form::Decreasing) => DiffusionForm::Decreasing,
                Some(Form::IncreasingDecreasing) => DiffusionForm::IncreasingDecreasing,
            },
            norm: flags.form_norm.unwrap_or(d.norm),
            last_step: match flags.last_step {
                None => d.last_step,
                Some(Last::None) => LastStep::None,
                Some(Last::Mean) => LastStep::Mean,
                Some(Last::Tweedie) => LastStep::Tweedie,
                Some(Last::Euler) => LastStep::Euler,
            },
            last_step_size: flags.last_step_size.unwrap_or(d.last_step_size),
            num_steps: settings.steps_or(25),
        }))
    };
    match sampler {
        Sampler::Euler => ode(OdeMethod::Euler),
        Sampler::Heun => ode(OdeMethod::Heun),
        Sampler::Dopri5 => ode(OdeMethod::Dopri5),
        Sampler::SdeEuler => sde(SdeMethod::Euler),
        Sampler::SdeHeun => sde(SdeMethod::Heun),
        Sampler::Ddpm | Sampler::Ddim | Sampler::Dpm => Err(Error::usage(format!(
            "a SiT is not sampled with {}: pass --sampler euler, heun, dopri5, sde-euler or sde-heun",
            sampler.name()
        ))),
    }
}

impl Drawing for FlowDrawing<'_> {
    fn steps(&self) -> Option<usize> {
        match &self.solver {
            Solver::Ode(config) if config.method == OdeMethod::Dopri5 => None,
            Solver::Ode(config) => Some(config.num_steps - 1),
            Solver::Sde(config) => {
                Some(config.num_steps - usize::from(config.last_step == LastStep::None))
            }
        }
    }

    fn report(&self) -> Map<String, Value> {
        let mut all = self.net.settings.report(self.sampler);
        all.insert("steps".into(), json!(self.steps()));
        match &self.solver {
            Solver::Ode(config) => all.insert("ode".into(), json!(config)),
            Solver::Sde(config) => all.insert("sde".into(), json!(config)),
        };
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
        let predict = |x: &Tensor, t: &Tensor| self.net.ask(x, t, &images.classes);
        let on_step = |_: &TimeStep<'_>| on_step();
        match self.solver {
            Solver::Ode(config) => ode(&self.process, config, &z, predict, on_step),
            Solver::Sde(config) => {
                let noise = |_: usize| noise.normal(of);
                sde(&self.process, config, &z, predict, noise, on_step)
            }
        }
    }
}
