//! Learning finds the useful blocks and leaves the teacher alone.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use candle_core::{Device, Tensor};
use common::{BATCH, Imitate, USEFUL, batch, config, run_in, run_toy, weights};
use tinyfusion_core::{Result, StateDict, StepRng, stream};
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_recover::{Blend, DeltaW, LearnConfig, LoraLayers, RunContext, Teacher, learn};
use tinyfusion_train::{FitConfig, Progress, RunDir, Stop};

/// All bits of all tensors.
fn bits(weights: &StateDict) -> Vec<(String, Vec<u32>)> {
    let values = |t: &Tensor| {
        t.flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f32::to_bits)
            .collect()
    };
    weights
        .iter()
        .map(|(n, t)| (n.to_string(), values(t)))
        .collect()
}
#[test]
fn useful_blocks_are_found_with_and_without_an_update() {
    for delta in [DeltaW::Frozen, DeltaW::Full] {
        for blend in [Blend::Exact, Blend::Plain] {
            let config = LearnConfig {
                blend,
                ..config(delta.clone())
            };
            let (learned, history) = run_toy(&config).unwrap();
            let selection = learned.selection;
            assert_eq!(selection.kept, USEFUL, "{delta:?} {blend:?}");
            assert_eq!(selection.criterion, "learned");
            assert_eq!(
                serde_json::from_value::<LearnConfig>(selection.settings).unwrap(),
                config
            );
            assert_eq!((selection.decisions.len(), learned.skipped), (3, 0));
            for decision in &selection.decisions {
                assert!(
                    decision.confidence > 0.6,
                    "{delta:?} {blend:?}: {decision:?}"
                );
            }
            // One line a step; the last one is the decision.
            assert_eq!(
                history.iter().map(|r| r.step).collect::<Vec<_>>(),
                (1..=120).collect::<Vec<_>>()
            );
            assert_eq!((history[0].tau, history[119].tau), (4.0, 0.1));
            assert_eq!(history[119].kept, selection.kept);
            for (record, decision) in history[119].confidence.iter().zip(&selection.decisions) {
                // serde_json reads decimals to within one unit in the last place.
                assert!((record - decision.confidence).abs() < 1e-12);
            }
        }
    }
}

/// A small DiT, two of whose four blocks have closed gates.
fn small_dit() -> (DiTConfig, StateDict) {
    let model = DiTConfig {
        input_size: 4,
        patch_size: 2,
        in_channels: 2,
        hidden_size: 16,
        depth: 4,
        num_heads: 2,
        num_classes: 3,
        ..DiTConfig::default()
    };
    let mut rng = StepRng::new(3, 0, stream::INIT);
    let closed =
        |name: &str| name.starts_with("blocks.1.adaLN") || name.starts_with("blocks.2.adaLN");
    let weights = model
        .params()
        .into_iter()
        .map(|s| {
            let t = rng.normal(s.shape, &Device::Cpu).unwrap();
            // Large gates make a missing block felt.
            let scale = if closed(&s.name) {
                0.0
            } else if s.name.contains("adaLN") {
                0.5
            } else {
                0.2
            };
            (s.name, (t * scale).unwrap())
        })
        .collect();
    (model, weights)
}

fn dit_batch(step: u64) -> Result<Tensor> {
    StepRng::new(1, step, 50).normal((BATCH, 2, 4, 4), &Device::Cpu)
}

#[test]
fn a_low_rank_update_learns_and_leaves_the_teacher_alone() {
    let (model, weights) = small_dit();
    let before = bits(&weights);
    let objective = Imitate(DiT::new(&model, &weights).unwrap());
    let build = |weights: &StateDict, scale: f64| DiT::with_lora(&model, weights, scale);
    for layers in [
        LoraLayers::All,
        LoraLayers::Attention,
        LoraLayers::Mlp,
        LoraLayers::Named(vec!["fc2".into()]),
    ] {
        let config = LearnConfig {
            fit: FitConfig {
                steps: 3,
                ..config(DeltaW::Frozen).fit
            },
            ..config(DeltaW::Lora {
                rank: 2,
                alpha: 4.0,
                layers: layers.clone(),
            })
        };
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::open(folder.path(), &config).unwrap();
        let teacher = Teacher {
            weights: weights.clone(),
            is_fixed: &DiTConfig::is_fixed,
            build: &build,
        };
        let context = RunContext {
            dir: &dir,
            stop: &Stop::default(),
            progress: &Progress::hidden(),
        };
        learn(&config, teacher, &objective, dit_batch, context).unwrap();
        assert_eq!(bits(&weights), before);
        // Only the chosen factors and the logits were trained, and every B has moved from zero.
        let saved = candle_core::safetensors::load(
            folder
                .path()
                .join("checkpoints/step-000003/model.safetensors"),
            &Device::Cpu,
        )
        .unwrap();
        let per_block = match layers {
            LoraLayers::All => 5.0 + 4.0 / 4.0, // qkv, proj, fc1, fc2, adaLN; outside the blocks t.0, t.2, final, its adaLN
            LoraLayers::Attention | LoraLayers::Mlp => 2.0,
            LoraLayers::Named(_) => 1.0,
        };
        let factors: Vec<_> = saved
            .iter()
            .filter(|(n, _)| !n.starts_with("mask.logits."))
            .collect();
        assert_eq!(factors.len() as f64, 2.0 * per_block * 4.0, "{layers:?}");
        for (name, t) in factors {
            assert!(name.contains(".lora_"), "{name} was trained");
            let gated = name.contains("blocks.1.") || name.contains("blocks.2.");
            if name.ends_with("lora_b.weight") && !gated {
                assert!(
                    t.abs()
                        .unwrap()
                        .sum_all()
                        .unwrap()
                        .to_scalar::<f32>()
                        .unwrap()
                        > 0.0,
                    "{name} did not move"
                );
            }
        }
    }
}

#[test]
fn useful_blocks_of_a_transformer_are_found_with_a_low_rank_update() {
    let (model, weights) = small_dit();
    let config = LearnConfig {
        fit: FitConfig {
            steps: 150,
            ..config(DeltaW::Frozen).fit
        },
        ..config(DeltaW::Lora {
            rank: 2,
            alpha: 4.0,
            layers: LoraLayers::All,
        })
    };
    let build = |weights: &StateDict, scale: f64| DiT::with_lora(&model, weights, scale);
    let folder = tempfile::tempdir().unwrap();
    let dir = RunDir::open(folder.path(), &config).unwrap();
    let teacher = Teacher {
        weights: weights.clone(),
        is_fixed: &DiTConfig::is_fixed,
        build: &build,
    };
    let context = RunContext {
        dir: &dir,
        stop: &Stop::default(),
        progress: &Progress::hidden(),
    };
    let objective = Imitate(DiT::new(&model, &weights).unwrap());
    let learned = learn(&config, teacher, &objective, dit_batch, context).unwrap();
    assert_eq!(learned.selection.kept, [0, 3]);
}

#[test]
fn a_full_update_leaves_the_teacher_alone() {
    let weights = weights();
    let before = bits(&weights);
    let folder = tempfile::tempdir().unwrap();
    let config = LearnConfig {
        fit: FitConfig {
            steps: 5,
            ..config(DeltaW::Full).fit
        },
        ..config(DeltaW::Full)
    };
    run_in(folder.path(), &config, &weights, batch, &Stop::default()).unwrap();
    assert_eq!(bits(&weights), before);
    let saved = candle_core::safetensors::load(
        folder
            .path()
            .join("checkpoints/step-000005/model.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    for (name, was) in weights.iter() {
        assert!(
            tinyfusion_testing::max_diff(&saved[name], was) > 0.0,
            "{name} was not trained"
        );
    }
}

#[test]
fn masks_do_not_depend_on_micro_batches() {
    let logits = |micro_batches| {
        let c = config(DeltaW::Frozen);
        let config = LearnConfig {
            fit: FitConfig {
                steps: 4,
                micro_batches,
                ..c.fit.clone()
            },
            ..c
        };
        run_toy(&config).unwrap().1[3].keep_probability.clone()
    };
    for (a, b) in logits(1).iter().zip(logits(4)) {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
}
