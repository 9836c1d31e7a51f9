//! Whole sampling runs of a tiny DiT against the reference (`gaussian_diffusion.safetensors`, `loop.*` and
//! `ddim_loop.*`) and the guided forward (`dit_forward.safetensors`, `out.cfg`), with the recorded noise.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::{LatentQuery, Plan, Result, StateDict, run};
use tinyfusion_diffusion::samplers::{DdpmConfig, Step, ddim, ddpm};
use tinyfusion_diffusion::{
    Clip, DdimConfig, DiffusionConfig, GaussianDiffusion, Guidance, GuidedChannels,
};
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_testing::Golden;

struct Fixture {
    golden: Golden,
    net: DiT,
    depth: usize,
}

impl Fixture {
    fn open(file: &str) -> Self {
        let golden = Golden::open(file);
        let config: DiTConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
        let weights: StateDict = golden.strip("w.").into_iter().collect();
        let net = DiT::new(&config, &weights).unwrap();
        Self {
            golden,
            net,
            depth: config.depth,
        }
    }

    fn ids(&self, key: &str) -> Tensor {
        Tensor::new(self.golden.ids(key), &Device::Cpu).unwrap()
    }

    fn predict(&self, x: &Tensor, t: &Tensor, y: &Tensor) -> Result<Tensor> {
        let query = LatentQuery {
            x: x.clone(),
            t: t.to_dtype(DType::F32)?,
            y: y.clone(),
        };
        Ok(run(&self.net, &query, &Plan::full(self.depth))?.output)
    }

    fn process(&self, key: &str) -> GaussianDiffusion {
        let respacing = self.golden.config["loop"][key]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        GaussianDiffusion::new(DiffusionConfig {
            respacing,
            ..DiffusionConfig::default()
        })
        .unwrap()
    }

    fn guidance(&self) -> Guidance {
        Guidance {
            scale: self.golden.number("loop.cfg_scale"),
            channels: GuidedChannels::FirstThree,
        }
    }
}

/// The timesteps that the process visits are the recorded ones.
fn same_timesteps(golden: &Golden, key: &str, process: &GaussianDiffusion) {
    let map = &process.schedule().timestep_map;
    let map: Vec<u32> = map.iter().map(|t| *t as u32).collect();
    assert_eq!(map, golden.ids(key), "{key}");
}

/// Row k of a recorded stack of steps, compared with that row's share of the tolerance.
fn close_at(golden: &Golden, key: &str, k: usize, got: &Tensor) {
    let want = golden.tensor(key).get(k).unwrap();
    let diff = tinyfusion_testing::max_diff(got, &want);
    assert!(diff <= golden.tolerance(key), "{key}[{k}]: off by {diff:e}");
}

#[test]
fn golden_guided_forward() {
    let f = Fixture::open("dit_forward.safetensors");
    let guidance = Guidance {
        scale: f.golden.number("cfg_scale"),
        channels: GuidedChannels::FirstThree,
    };
    let (x, t, y) = (
        f.golden.tensor("in.cfg_x"),
        f.ids("in.cfg_t"),
        f.ids("in.cfg_y"),
    );
    let out = guidance
        .guide_doubled(&x, &t, |x, t| f.predict(x, t, &y))
        .unwrap();
    f.golden.close("out.cfg", &out);
}

#[test]
fn golden_ddpm_loop() {
    let f = Fixture::open("gaussian_diffusion.safetensors");
    let process = f.process("respacing");
    same_timesteps(&f.golden, "loop.timestep_map", &process);
    let (z, y, noise) = (
        f.golden.tensor("loop.z"),
        f.ids("loop.y"),
        f.golden.tensor("loop.noise"),
    );
    let steps = process.num_timesteps();
    for (clip, key) in [(Clip::Off, "loop.final"), (Clip::Unit, "loop.final_clip1")] {
        let out = ddpm(
            &process,
            DdpmConfig { clip },
            &z,
            |x, t| f.guidance().guide_doubled(x, t, |x, t| f.predict(x, t, &y)),
            |index| Ok(noise.get(steps - 1 - index)?),
            |step: &Step<'_>| {
                if clip == Clip::Off {
                    close_at(&f.golden, "loop.samples", step.done - 1, step.sample);
                    close_at(
                        &f.golden,
                        "loop.pred_xstart",
                        step.done - 1,
                        step.pred_xstart,
                    );
                }
                Ok(())
            },
        )
        .unwrap();
        f.golden.close(key, &out);
    }
}

#[test]
fn golden_ddim_loop() {
    let f = Fixture::open("gaussian_diffusion.safetensors");
    let process = f.process("ddim_respacing");
    same_timesteps(&f.golden, "ddim_loop.timestep_map", &process);
    let (z, y, noise) = (
        f.golden.tensor("loop.z"),
        f.ids("loop.y"),
        f.golden.tensor("ddim_loop.noise"),
    );
    let steps = process.num_timesteps();
    for (eta, name) in [(0.0, "eta0"), (f.golden.number("eta"), "eta")] {
        let out = ddim(
            &process,
            DdimConfig {
                eta,
                clip: Clip::Off,
            },
            &z,
            |x, t| f.guidance().guide_doubled(x, t, |x, t| f.predict(x, t, &y)),
            |index| Ok(noise.get(steps - 1 - index)?),
            |step: &Step<'_>| {
                close_at(
                    &f.golden,
                    &format!("ddim_loop.{name}.samples"),
                    step.done - 1,
                    step.sample,
                );
                Ok(())
            },
        )
        .unwrap();
        f.golden.close(&format!("ddim_loop.{name}.final"), &out);
    }
}
