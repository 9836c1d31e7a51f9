//! The laws of `BlockStack` on DiT.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Device, Tensor};
use tinyfusion_core::laws::{self, Subject};
use tinyfusion_core::{LatentQuery, Plan, Result, Rows, StateDict, StepRng, run, stream};
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_nn::layers::LoraSpec;

fn config() -> DiTConfig {
    DiTConfig {
        input_size: 8,
        patch_size: 4,
        in_channels: 3,
        hidden_size: 16,
        depth: 4,
        num_heads: 2,
        num_classes: 5,
        ..DiTConfig::default()
    }
}

/// Every tensor random, the zero-initialised ones included.
fn random_weights(config: &DiTConfig) -> Result<StateDict> {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    config
        .params()
        .iter()
        .map(|s| {
            Ok((
                s.name.clone(),
                (rng.normal(s.shape.as_slice(), &Device::Cpu)? * 0.2)?,
            ))
        })
        .collect()
}

fn query(rows: Option<&[usize]>) -> Result<LatentQuery> {
    let x = StepRng::new(6, 0, stream::DRAW).normal((3, 3, 8, 8), &Device::Cpu)?;
    let t = Tensor::new(&[3f32, 480.0, 990.0], &Device::Cpu)?;
    let y = Tensor::new(&[0u32, 4, 5], &Device::Cpu)?;
    let Some(rows) = rows else {
        return Ok(LatentQuery { x, t, y });
    };
    let index = Tensor::new(
        rows.iter().map(|&r| r as u32).collect::<Vec<_>>(),
        &Device::Cpu,
    )?;
    Ok(LatentQuery {
        x: x.select(&index)?,
        t: t.select(&index)?,
        y: y.select(&index)?,
    })
}

struct Subjects;

impl Subject for Subjects {
    type Net = DiT;
    fn depth(&self) -> usize {
        config().depth
    }
    fn weights(&self) -> Result<StateDict> {
        random_weights(&config())
    }
    fn build(&self, weights: &StateDict) -> Result<DiT> {
        DiT::new(&config(), weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<DiT> {
        let cut = tinyfusion_checkpoint::keep_blocks(weights, "blocks", kept)?;
        DiT::new(&config().with_depth(kept.len()), &cut)
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<LatentQuery> {
        query(rows)
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![vec![0, 3], vec![1], vec![0, 1, 2]]
    }
    fn is_fixed(&self, name: &str) -> bool {
        DiTConfig::is_fixed(name)
    }
}

#[test]
fn dit_keeps_the_laws() {
    laws::check(&Subjects).unwrap();
}

#[test]
fn initial_weights_are_the_identity_on_tokens() {
    // adaLN-Zero: every gate starts at 0 and the final layer at 0.
    let config = config();
    let net = DiT::new(&config, &config.init(0, &Device::Cpu).unwrap()).unwrap();
    let trace = run(
        &net,
        &query(None).unwrap(),
        &Plan::full(4).with_taps([0, 3]),
    )
    .unwrap();
    assert_eq!(
        tinyfusion_testing::max_diff(&trace.taps[0], &trace.taps[1]),
        0.0
    );
    assert_eq!(
        trace
            .output
            .abs()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
        0.0
    );
}

#[test]
fn lora_merged_is_lora_beside() {
    let (config, spec) = (
        config(),
        LoraSpec {
            rank: 3,
            alpha: 6.0,
        },
    );
    let mut weights = random_weights(&config).unwrap();
    let low = spec
        .init(&config.params(), |_| true, 1, &Device::Cpu)
        .unwrap();
    // Every linear layer: 4 in each block and its adaLN, 2 in the timestep MLP, 2 in the final layer.
    assert_eq!(low.len(), 2 * (5 * config.depth + 4));
    let mut rng = StepRng::new(8, 0, stream::INIT);
    for (name, t) in low.iter() {
        let noise = rng.normal(t.shape().clone(), &Device::Cpu).unwrap();
        weights.insert(name, (noise * 0.1).unwrap());
    }
    let beside = DiT::with_lora(&config, &weights, spec.scale()).unwrap();
    let merged = DiT::new(&config, &spec.merge(&weights).unwrap()).unwrap();
    let plain = DiT::new(&config, &random_weights(&config).unwrap()).unwrap();
    let out = |net: &DiT| {
        run(net, &query(None).unwrap(), &Plan::full(4))
            .unwrap()
            .output
    };
    let scale = tinyfusion_testing::flat(&out(&merged))
        .iter()
        .fold(0f64, |m, v| m.max(v.abs()));
    assert!(tinyfusion_testing::max_diff(&out(&beside), &out(&merged)) < 1e-5 * scale);
    assert!(
        tinyfusion_testing::max_diff(&out(&plain), &out(&merged)) > 1e-2 * scale,
        "the update does something"
    );
}

#[test]
fn misfits_are_usage_errors_that_name_the_field() {
    for (config, field) in [
        (
            DiTConfig {
                patch_size: 3,
                ..config()
            },
            "patch_size",
        ),
        (
            DiTConfig {
                num_heads: 3,
                ..config()
            },
            "heads",
        ),
        (
            DiTConfig {
                depth: 0,
                ..config()
            },
            "depth",
        ),
        (
            DiTConfig {
                class_dropout_prob: 1.5,
                ..config()
            },
            "class_dropout_prob",
        ),
    ] {
        let error = config.validate().unwrap_err();
        assert!(
            matches!(&error, tinyfusion_core::Error::Usage(m) if m.contains(field)),
            "{error}"
        );
    }
}
