//! Distilling a MAR: every weight is reached, features are compared within each stage, a student that is its teacher
//! learns nothing, and a run that was stopped ends as the unbroken one, dropout included.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use std::path::Path;

use candle_core::{Device, Tensor};
use tinyfusion_core::{
    BlockLayout, Error, Group, LatentBatch, Result, Selection, StateDict, StepRng, stream,
};
use tinyfusion_diffusion::{
    GaussianDiffusion, MarObjective, MarTraining, Objective, token_diffusion,
};
use tinyfusion_distill::{
    DistillConfig, FeatureLoss, KnowledgeConfig, LayerMap, Run, Student, Teacher, distill, losses,
};
use tinyfusion_models::{Mar, MarConfig};
use tinyfusion_testing::flat;
use tinyfusion_train::{FitConfig, LrSchedule, Outcome, Progress, RunDir, Stop};

fn config() -> MarConfig {
    MarConfig {
        img_size: 8,
        vae_stride: 1,
        patch_size: 2,
        encoder_embed_dim: 12,
        encoder_depth: 2,
        encoder_num_heads: 2,
        decoder_embed_dim: 16,
        decoder_depth: 4,
        decoder_num_heads: 2,
        vae_embed_dim: 3,
        class_num: 4,
        buffer_size: 2,
        diffloss_d: 1,
        diffloss_w: 8,
        diffusion_batch_mul: 2,
        ..MarConfig::default()
    }
}

fn random_weights() -> StateDict {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    let specs = config().params();
    specs
        .iter()
        .map(|s| {
            let t = rng.normal(s.shape.as_slice(), &Device::Cpu).unwrap();
            (s.name.clone(), (t * 0.2).unwrap())
        })
        .collect()
}

fn objective(dropout: bool) -> MarObjective {
    let training = MarTraining {
        dropout,
        ..config().training()
    };
    MarObjective::new(GaussianDiffusion::new(token_diffusion()).unwrap(), training).unwrap()
}

fn batch(step: u64) -> Result<LatentBatch> {
    let mut rng = StepRng::new(3, step, stream::ORDER);
    let y: Vec<u32> = rng.below(4, 8).into_iter().map(|y| y as u32).collect();
    Ok(LatentBatch {
        x: rng.normal((8, 3, 8, 8), &Device::Cpu)?,
        y: Tensor::new(y, &Device::Cpu)?,
    })
}

/// One block of every two: 1 of the encoder's 2, 2 of the decoder's 4.
fn selection() -> Selection {
    Selection {
        groups: vec![Group { n: 1, m: 2 }; 3],
        ..Selection::from_indices(&BlockLayout::stages([2, 4]), vec![1, 2, 5]).unwrap()
    }
    .validated()
    .unwrap()
}

fn student() -> (MarConfig, StateDict) {
    config().keep(&random_weights(), &selection().kept).unwrap()
}

fn run_in(
    folder: &Path,
    steps: u64,
    features: FeatureLoss,
    stop_at: Option<u64>,
) -> Result<Outcome> {
    let (shallow, weights) = student();
    let net = Mar::new(&config(), &random_weights())
        .unwrap()
        .without_dropout();
    let teacher = Teacher {
        net: &net,
        layers: Some(LayerMap::group_ends(&selection()).unwrap()),
    };
    let student = Student {
        weights,
        build: &|w| Mar::new(&shallow, w),
        is_fixed: &MarConfig::is_fixed,
    };
    let settings = DistillConfig {
        lr: LrSchedule::constant(3e-3),
        fit: FitConfig {
            steps,
            batch_size: 8,
            micro_batches: 2,
            ema: 0.5,
            log_every: 1,
            checkpoint_every: 5,
            ..FitConfig::default()
        },
        knowledge: Some(KnowledgeConfig {
            features,
            ..KnowledgeConfig::default()
        }),
        ..DistillConfig::default()
    };
    let dir = RunDir::open(folder, &settings)?;
    let stop = Stop::default();
    let run = Run {
        dir: &dir,
        stop: &stop,
        progress: &Progress::hidden(),
    };
    let batches = |step| {
        if Some(step) == stop_at {
            stop.request();
        }
        batch(step)
    };
    distill(
        &settings,
        student,
        Some(&teacher),
        &objective(true),
        batches,
        run,
    )
}

#[test]
fn a_shallow_mar_learns_from_the_deep_one() {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run_in(folder.path(), 40, FeatureLoss::Masked, None).unwrap();
    let (shallow, weights) = student();
    outcome.averages.check(&shallow.params()).unwrap();
    for (name, before) in weights.iter() {
        let after = outcome.averages.require(name).unwrap();
        assert_ne!(flat(before), flat(after), "{name}");
    }
    let text = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let of = |line: &str, part: &str| {
        let line = serde_json::from_str::<serde_json::Value>(line).unwrap();
        line[part].as_f64().unwrap()
    };
    for part in ["kd", "rep"] {
        let values: Vec<f64> = text.lines().map(|l| of(l, part)).collect();
        let (first, last) = (
            values[..8].iter().sum::<f64>(),
            values[32..].iter().sum::<f64>(),
        );
        assert!(last < 0.9 * first, "{part}: {first} → {last}");
    }
}

#[test]
fn a_stopped_run_ends_as_the_unbroken_one_bit_for_bit() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run_in(whole.path(), 10, FeatureLoss::Joint, None).unwrap();
    match run_in(broken.path(), 10, FeatureLoss::Joint, Some(5)) {
        Err(Error::Interrupted { step }) => assert_eq!(step, 5),
        other => panic!("not interrupted: {:?}", other.is_ok()),
    }
    run_in(broken.path(), 10, FeatureLoss::Joint, None).unwrap();
    for file in ["model", "ema", "optimizer"] {
        let name = format!("checkpoints/step-000010/{file}.safetensors");
        let read = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(&name)).unwrap();
        assert!(read(&whole) == read(&broken), "{name} differs");
    }
}

#[test]
fn features_are_compared_at_the_group_ends_of_each_stage() {
    let map = LayerMap::group_ends(&selection()).unwrap();
    assert_eq!(map.pairs(), [(0, 1), (1, 3), (2, 5)]);
}

#[test]
fn a_mar_that_is_its_teacher_has_nothing_to_learn() {
    let weights = random_weights();
    let net = Mar::new(&config(), &weights).unwrap();
    let pairs = (0..6).map(|i| (i, i)).collect();
    let teacher = Teacher {
        net: &net,
        layers: Some(LayerMap::new(6, 6, pairs).unwrap()),
    };
    let mut own = weights.clone();
    own.make_trainable(|_| true).unwrap();
    let student = Mar::new(&config(), &own).unwrap();
    // Under one dropout they are one network, too.
    for dropout in [false, true] {
        let objective = objective(dropout);
        let mut rng = StepRng::new(4, 0, stream::DRAW);
        let draw = Objective::<Mar>::draw(&objective, &batch(0).unwrap(), &mut rng).unwrap();
        for features in [FeatureLoss::None, FeatureLoss::All, FeatureLoss::Masked] {
            let knowledge = KnowledgeConfig {
                features,
                ..KnowledgeConfig::default()
            };
            let parts = losses(&objective, &student, Some((&teacher, &knowledge)), &draw).unwrap();
            let total = parts.total(1.0, 1.0).unwrap();
            assert!(
                flat(&total).iter().all(|l| *l == 0.0),
                "{features:?}: {total}"
            );
        }
    }
}
