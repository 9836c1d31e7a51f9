//! Distilling a real family: every weight of a DiT is reached, and a student that is its teacher learns nothing.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_checkpoint::keep_blocks;
use tinyfusion_core::{
    BlockLayout, Group, LatentBatch, Result, Selection, StateDict, StepRng, stream,
};
use tinyfusion_diffusion::{DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop};
use tinyfusion_distill::{
    DistillConfig, FeatureLoss, KnowledgeConfig, LayerMap, Run, Student, Teacher, distill, losses,
};
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_testing::flat;
use tinyfusion_train::{FitConfig, LrSchedule, Progress, RunDir, Stop};

fn config(depth: usize) -> DiTConfig {
    DiTConfig {
        input_size: 8,
        patch_size: 4,
        in_channels: 3,
        hidden_size: 16,
        depth,
        num_heads: 2,
        num_classes: 5,
        ..DiTConfig::default()
    }
}

/// Every tensor random, the zero-initialised ones included.
fn random_weights(config: &DiTConfig) -> StateDict {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    let tensor = |shape: &[usize], rng: &mut StepRng| {
        (rng.normal(shape, &Device::Cpu).unwrap() * 0.2).unwrap()
    };
    config
        .params()
        .iter()
        .map(|s| (s.name.clone(), tensor(&s.shape, &mut rng)))
        .collect()
}

fn objective() -> DenoisingObjective {
    let labels = LabelDrop {
        num_classes: 5,
        probability: 0.3,
    };
    DenoisingObjective::new(
        GaussianDiffusion::new(DiffusionConfig::default()).unwrap(),
        labels,
    )
    .unwrap()
}

fn batch(step: u64) -> Result<LatentBatch> {
    let mut rng = StepRng::new(3, step, stream::ORDER);
    let y: Vec<u32> = rng.below(5, 16).into_iter().map(|y| y as u32).collect();
    Ok(LatentBatch {
        x: rng.normal((16, 3, 8, 8), &Device::Cpu)?,
        y: Tensor::new(y, &Device::Cpu)?,
    })
}

#[test]
fn a_shallow_dit_learns_from_the_deep_one() {
    let (deep, shallow) = (config(4), config(2));
    let teacher_weights = random_weights(&deep);
    let groups = vec![Group { n: 1, m: 2 }; 2];
    let selection = Selection {
        groups,
        ..Selection::from_indices(&BlockLayout::single(4), vec![1, 2]).unwrap()
    }
    .validated()
    .unwrap();
    let weights = keep_blocks(&teacher_weights, "blocks", &selection.kept).unwrap();
    let net = DiT::new(&deep, &teacher_weights).unwrap();
    let teacher = Teacher {
        net: &net,
        layers: Some(LayerMap::group_ends(&selection).unwrap()),
    };
    let student = Student {
        weights: weights.clone(),
        build: &|w| DiT::new(&shallow, w),
        is_fixed: &DiTConfig::is_fixed,
    };
    let settings = DistillConfig {
        lr: LrSchedule::constant(3e-3),
        fit: FitConfig {
            steps: 30,
            batch_size: 16,
            ema: 0.5,
            log_every: 1,
            ..FitConfig::default()
        },
        knowledge: Some(KnowledgeConfig::default()),
        ..DistillConfig::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let dir = RunDir::open(folder.path(), &settings).unwrap();
    let run = Run {
        dir: &dir,
        stop: &Stop::default(),
        progress: &Progress::hidden(),
    };
    let outcome = distill(&settings, student, Some(&teacher), &objective(), batch, run).unwrap();
    outcome.averages.check(&shallow.params()).unwrap();
    for (name, before) in weights.iter() {
        let after = outcome.averages.require(name).unwrap();
        let still = flat(before) == flat(after);
        assert_eq!(still, DiTConfig::is_fixed(name), "{name}");
    }
    let text = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let kd: Vec<f64> = text
        .lines()
        .map(|l| {
            serde_json::from_str::<serde_json::Value>(l).unwrap()["kd"]
                .as_f64()
                .unwrap()
        })
        .collect();
    let (first, last) = (kd[..5].iter().sum::<f64>(), kd[25..].iter().sum::<f64>());
    assert!(last < 0.8 * first, "L_KD {first} → {last}");
}

#[test]
fn a_dit_that_is_its_teacher_has_nothing_to_learn() {
    let config = config(3);
    let weights = random_weights(&config);
    let net = DiT::new(&config, &weights).unwrap();
    let pairs = vec![(0, 0), (1, 1), (2, 2)];
    let teacher = Teacher {
        net: &net,
        layers: Some(LayerMap::new(3, 3, pairs).unwrap()),
    };
    let mut own = weights.clone();
    own.make_trainable(|n| !DiTConfig::is_fixed(n)).unwrap();
    let student = DiT::new(&config, &own).unwrap();
    let batch = batch(0).unwrap();
    let noise = StepRng::new(4, 0, stream::DRAW)
        .normal(batch.x.shape().clone(), &Device::Cpu)
        .unwrap();
    // Not t = 0: there the objective's L_KD holds the student's own likelihood.
    let t = (0..16).map(|i| 1 + 66 * i).collect();
    let draw = objective().draw_at(&batch, t, noise).unwrap();
    for features in [
        FeatureLoss::None,
        FeatureLoss::All,
        FeatureLoss::Masked,
        FeatureLoss::Joint,
    ] {
        let knowledge = KnowledgeConfig {
            features,
            ..KnowledgeConfig::default()
        };
        let parts = losses(&objective(), &student, Some((&teacher, &knowledge)), &draw).unwrap();
        let total = parts.total(1.0, 1.0).unwrap();
        assert!(
            flat(&total).iter().all(|l| l.abs() < 1e-9),
            "{features:?}: {:?}",
            flat(&total)
        );
    }
}
