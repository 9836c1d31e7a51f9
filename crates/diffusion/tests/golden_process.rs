//! Tables, forward process, reverse process and single sampler steps against the recorded reference.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use candle_core::DType;
use common::{check, output_for};
use tinyfusion_diffusion::{
    Clip, DdimConfig, DiffusionConfig, GaussianDiffusion, Respacing, Target, Variance,
};
use tinyfusion_testing::Golden;

/// Names and chains of the file's schedules.
fn chains(g: &Golden) -> Vec<(String, Respacing)> {
    let chains: Vec<_> = g.config["schedules"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, text)| (name.clone(), text.as_str().unwrap().parse().unwrap()))
        .collect();
    assert!(!chains.is_empty());
    chains
}

fn process(respacing: &Respacing, variance: Variance, target: Target) -> GaussianDiffusion {
    let config = DiffusionConfig {
        respacing: respacing.clone(),
        variance,
        target,
        ..DiffusionConfig::default()
    };
    GaussianDiffusion::new(config).unwrap()
}

const CLIPS: [(&str, Clip); 2] = [("clip0", Clip::Off), ("clip1", Clip::Unit)];

#[test]
fn golden_tables() {
    let g = Golden::open("gaussian_diffusion.safetensors");
    for (name, respacing) in chains(&g) {
        let diffusion = process(&respacing, Variance::LearnedRange, Target::Noise);
        let s = diffusion.schedule();
        let key = |table: &str| format!("sched.{name}.{table}");
        g.close_table(&key("betas"), &s.betas);
        g.close_table(&key("alphas_cumprod"), &s.alphas_cumprod);
        g.close_table(&key("alphas_cumprod_prev"), &s.alphas_cumprod_prev);
        g.close_table(&key("posterior_variance"), &s.posterior_variance);
        g.close_table(
            &key("posterior_log_variance_clipped"),
            &s.posterior_log_variance_clipped,
        );
        g.close_table(&key("posterior_mean_coef1"), &s.posterior_mean_coef1);
        g.close_table(&key("posterior_mean_coef2"), &s.posterior_mean_coef2);
        let map: Vec<u32> = s.timestep_map.iter().map(|t| *t as u32).collect();
        assert_eq!(map, g.ids(&key("timestep_map")));
    }
}

#[test]
fn golden_respacing() {
    let g = Golden::open("gaussian_diffusion.safetensors");
    let texts = g.config["space_strings"].as_array().unwrap();
    assert!(!texts.is_empty());
    for (i, text) in texts.iter().enumerate() {
        let respacing: Respacing = text.as_str().unwrap().parse().unwrap();
        let timesteps: Vec<u32> = respacing
            .timesteps(1000)
            .unwrap()
            .iter()
            .map(|t| *t as u32)
            .collect();
        assert_eq!(timesteps, g.ids(&format!("space.{i}")), "{text}");
    }
}

#[test]
fn golden_forward_process() {
    let g = Golden::open("gaussian_diffusion.safetensors");
    let (x_start, noise) = (g.tensor("in.x_start"), g.tensor("in.noise"));
    for (name, respacing) in chains(&g) {
        let diffusion = process(&respacing, Variance::LearnedRange, Target::Noise);
        let t = g.ids(&format!("{name}.t"));
        let x_t = diffusion.q_sample(&x_start, &t, &noise).unwrap();
        check(&g, &format!("{name}.q_sample"), &x_t);
        for (part, q) in [
            (
                "q_mean_variance",
                diffusion.q_mean_variance(&x_start, &t).unwrap(),
            ),
            (
                "q_posterior",
                diffusion.q_posterior(&x_start, &x_t, &t).unwrap(),
            ),
        ] {
            check(&g, &format!("{name}.{part}.mean"), &q.mean);
            check(&g, &format!("{name}.{part}.variance"), &q.variance);
            check(&g, &format!("{name}.{part}.log_variance"), &q.log_variance);
        }
        let told = diffusion.model_timesteps(&t, x_t.device()).unwrap();
        assert_eq!(told.dtype(), DType::F32);
        assert_eq!(
            told.to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap(),
            g.ids(&format!("{name}.model_t"))
        );
    }
}

#[test]
fn golden_reverse_process() {
    let g = Golden::open("gaussian_diffusion.safetensors");
    let (x_start, noise) = (g.tensor("in.x_start"), g.tensor("in.noise"));
    let variants = [
        ("learned", Variance::LearnedRange, Target::Noise),
        ("fixed_large", Variance::FixedLarge, Target::Noise),
        ("fixed_small", Variance::FixedSmall, Target::Noise),
        ("xstart", Variance::LearnedRange, Target::XStart),
    ];
    for (name, respacing) in chains(&g) {
        let t = g.ids(&format!("{name}.t"));
        for (variant, variance, target) in variants {
            let diffusion = process(&respacing, variance, target);
            let x_t = diffusion.q_sample(&x_start, &t, &noise).unwrap();
            let raw = g.tensor(if target == Target::XStart {
                "in.model_output_xstart"
            } else {
                "in.model_output_good"
            });
            let output = output_for(&diffusion, x_t.dim(1).unwrap(), &raw);
            for (clip_name, clip) in CLIPS {
                let p = diffusion.p_mean_variance(&output, &x_t, &t, clip).unwrap();
                let prefix = format!("{name}.pmv.{variant}.{clip_name}");
                check(&g, &format!("{prefix}.mean"), &p.mean);
                check(&g, &format!("{prefix}.variance"), &p.variance);
                check(&g, &format!("{prefix}.log_variance"), &p.log_variance);
                check(&g, &format!("{prefix}.pred_xstart"), &p.pred_xstart);
            }
        }
    }
}

#[test]
fn golden_sampler_steps() {
    let g = Golden::open("gaussian_diffusion.safetensors");
    let (x_start, noise, step_noise) = (
        g.tensor("in.x_start"),
        g.tensor("in.noise"),
        g.tensor("in.step_noise"),
    );
    let output = g.tensor("in.model_output_good");
    for (name, respacing) in chains(&g) {
        let t = g.ids(&format!("{name}.t"));
        let diffusion = process(&respacing, Variance::LearnedRange, Target::Noise);
        let x_t = diffusion.q_sample(&x_start, &t, &noise).unwrap();
        for (clip_name, clip) in CLIPS {
            let step = diffusion
                .p_sample(&output, &x_t, &t, clip, Some(&step_noise))
                .unwrap();
            check(
                &g,
                &format!("{name}.p_sample.{clip_name}.sample"),
                &step.sample,
            );
            for (eta_name, eta) in [("eta0", 0.0), ("eta", g.number("eta"))] {
                let config = DdimConfig { eta, clip };
                let step = diffusion
                    .ddim_sample(&output, &x_t, &t, config, Some(&step_noise))
                    .unwrap();
                check(
                    &g,
                    &format!("{name}.ddim_sample.{clip_name}.{eta_name}.sample"),
                    &step.sample,
                );
            }
            let reverse = format!("{name}.ddim_reverse.{clip_name}.sample");
            if clip == Clip::Off || g.get(&reverse).is_some() {
                let step = diffusion
                    .ddim_reverse_sample(&output, &x_t, &t, clip)
                    .unwrap();
                check(&g, &reverse, &step.sample);
            }
        }
    }
}
