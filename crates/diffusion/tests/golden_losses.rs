//! Training losses, distillation losses and their gradients against the recorded reference.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use candle_core::{Tensor, Var};
use common::{check, output_for};
use tinyfusion_diffusion::{
    DiffusionConfig, GaussianDiffusion, LossKind, Noised, Target, Variance,
};
use tinyfusion_testing::Golden;

fn variant(name: &str) -> DiffusionConfig {
    let base = DiffusionConfig::default();
    match name {
        "learned" => base,
        "rescaled" => DiffusionConfig {
            loss: LossKind::RescaledMse,
            ..base
        },
        "kl" => DiffusionConfig {
            loss: LossKind::Kl,
            ..base
        },
        "xstart" => DiffusionConfig {
            target: Target::XStart,
            ..base
        },
        "fixed" | "fixed_large" => DiffusionConfig {
            variance: Variance::FixedLarge,
            ..base
        },
        "fixed_small" => DiffusionConfig {
            variance: Variance::FixedSmall,
            ..base
        },
        other => panic!("unknown variant {other}"),
    }
}

/// The distinct values of the dotted name's part `at` among the names that start with `prefix`.
fn parts(golden: &Golden, at: usize, keep: impl Fn(&[&str]) -> bool) -> Vec<String> {
    let mut found: Vec<String> = golden
        .names("")
        .iter()
        .map(|n| n.split('.').collect::<Vec<_>>())
        .filter(|p| p.len() > at.max(1) && keep(p))
        .map(|p| p[at].to_string())
        .collect();
    found.sort();
    found.dedup();
    found
}

#[test]
fn golden_training_losses() {
    let g = Golden::open("gaussian_diffusion.safetensors");
    let (x_start, noise) = (g.tensor("in.x_start"), g.tensor("in.noise"));
    let mut compared = 0;
    for schedule in parts(&g, 0, |p| p[1] == "loss") {
        let respacing = g.text(&format!("schedules.{schedule}")).parse().unwrap();
        let t = g.ids(&format!("{schedule}.t"));
        for name in parts(&g, 2, |p| p[0] == schedule && p[1] == "loss") {
            let config = DiffusionConfig {
                respacing: Clone::clone(&respacing),
                ..variant(&name)
            };
            let diffusion = GaussianDiffusion::new(config).unwrap();
            let x_t = diffusion.q_sample(&x_start, &t, &noise).unwrap();
            let raw = g.tensor(if name == "xstart" {
                "in.model_output_xstart"
            } else {
                "in.model_output_good"
            });
            let output =
                Var::from_tensor(&output_for(&diffusion, x_start.dim(1).unwrap(), &raw)).unwrap();
            let batch = Noised {
                x_start: &x_start,
                noise: &noise,
                x_t: &x_t,
                t: &t,
            };
            let losses = diffusion.losses(output.as_tensor(), &batch).unwrap();
            let prefix = format!("{schedule}.loss.{name}");
            check(&g, &format!("{prefix}.loss"), &losses.loss);
            for (part, got) in [("mse", &losses.mse), ("vb", &losses.vb)] {
                let key = format!("{prefix}.{part}");
                assert_eq!(g.get(&key).is_some(), got.is_some(), "{key}");
                if let Some(got) = got {
                    check(&g, &key, got);
                }
            }
            let grads = losses.loss.mean_all().unwrap().backward().unwrap();
            check(
                &g,
                &format!("{prefix}.grad_model_output"),
                grads.get(output.as_tensor()).unwrap(),
            );
            compared += 1;
        }
    }
    assert!(compared >= 3, "the file holds no losses");
}

#[test]
fn golden_distillation_losses() {
    let g = Golden::open("kd_losses.safetensors");
    let (x_start, noise) = (g.tensor("in.x_start"), g.tensor("in.noise"));
    let channels = x_start.dim(1).unwrap();
    let alpha = g.number("alpha_kd");
    let beta = g.number("beta_feat");
    let mut compared = 0;
    for chain in parts(&g, 0, |p| p[1] == "kd") {
        let respacing: tinyfusion_diffusion::Respacing = if chain == "spaced" {
            g.text("spaced_respacing").parse().unwrap()
        } else {
            "".parse().unwrap()
        };
        let t = g.ids(&format!("in.t_{chain}"));
        for function in parts(&g, 1, |p| p[0] == chain && p[1].starts_with("kd")) {
            for name in parts(&g, 2, |p| p[0] == chain && p[1] == function) {
                let config = DiffusionConfig {
                    respacing: respacing.clone(),
                    ..variant(&name)
                };
                let diffusion = GaussianDiffusion::new(config).unwrap();
                let x_t = diffusion.q_sample(&x_start, &t, &noise).unwrap();
                let student = output_for(&diffusion, channels, &g.tensor("in.student_output"));
                let teacher = output_for(&diffusion, channels, &g.tensor("in.teacher_output"));
                let student = Var::from_tensor(&student).unwrap();
                let teacher = Var::from_tensor(&teacher).unwrap();
                let batch = Noised {
                    x_start: &x_start,
                    noise: &noise,
                    x_t: &x_t,
                    t: &t,
                };
                let ground = diffusion.losses(student.as_tensor(), &batch).unwrap();
                let kd = diffusion
                    .distillation(student.as_tensor(), teacher.as_tensor(), &batch)
                    .unwrap();

                let prefix = format!("{chain}.{function}.{name}");
                check(&g, &format!("{prefix}.gt"), &ground.loss);
                check(&g, &format!("{prefix}.kd_loss"), &kd.loss);
                for (part, got) in [("mse", &ground.mse), ("vb", &ground.vb), ("vb_kd", &kd.vb)] {
                    let key = format!("{prefix}.{part}");
                    assert_eq!(g.get(&key).is_some(), got.is_some(), "{key}");
                    if let Some(got) = got {
                        check(&g, &key, got);
                    }
                }
                let mixed = ((&kd.loss * alpha).unwrap() + (&ground.loss * (1.0 - alpha)).unwrap())
                    .unwrap();
                let features = format!("{prefix}.feat_loss");
                let loss: Tensor = if g.get(&features).is_some() {
                    (&mixed + (g.tensor(&features) * beta).unwrap()).unwrap()
                } else {
                    mixed.clone()
                };
                check(&g, &format!("{prefix}.loss"), &loss);
                let grads = mixed.mean_all().unwrap().backward().unwrap();
                check(
                    &g,
                    &format!("{prefix}.grad.student_output"),
                    grads.get(student.as_tensor()).unwrap(),
                );
                assert!(
                    grads.get(teacher.as_tensor()).is_none(),
                    "a gradient reached the teacher"
                );
                compared += 1;
            }
        }
    }
    assert!(compared >= 4, "the file holds no distillation losses");
}
