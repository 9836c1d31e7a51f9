//! A toy teacher, its cut student and short runs on them.
#![allow(dead_code, unreachable_pub)] // every test file uses its own part

use std::path::Path;

use candle_core::{Device, Tensor};
use tinyfusion_core::toy::{ToyImage, ToyLatent};
use tinyfusion_core::{
    BlockLayout, Group, LatentBatch, Result, Selection, StateDict, StepRng, stream,
};
use tinyfusion_diffusion::{
    DenoisingDraw, DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop, Variance,
};
use tinyfusion_distill::{
    DistillConfig, KnowledgeConfig, LayerMap, Losses, Run, Student, Teacher, distill, losses,
};
use tinyfusion_testing::flat;
use tinyfusion_train::{FitConfig, LrSchedule, Outcome, Progress, RunDir, Stop};

pub const CLASSES: u32 = 4;
pub const BATCH: usize = 8;
pub const TEACHER: usize = 4;
pub const STUDENT: usize = 2;

pub fn objective(drop: f64) -> DenoisingObjective {
    let config = DiffusionConfig {
        variance: Variance::FixedLarge,
        ..DiffusionConfig::default()
    };
    let labels = LabelDrop {
        num_classes: CLASSES,
        probability: drop,
    };
    DenoisingObjective::new(GaussianDiffusion::new(config).unwrap(), labels).unwrap()
}

pub fn batch(step: u64, size: usize) -> Result<LatentBatch> {
    let mut rng = StepRng::new(3, step, stream::ORDER);
    let y: Vec<u32> = rng
        .below(CLASSES as usize, size)
        .into_iter()
        .map(|y| y as u32)
        .collect();
    Ok(LatentBatch {
        x: rng.normal((size, 3, 4, 4), &Device::Cpu)?,
        y: Tensor::new(y, &Device::Cpu)?,
    })
}

/// A draw that no run trains on.
pub fn held_out() -> DenoisingDraw {
    objective(0.0)
        .draw(
            &batch(1_000_000, 64).unwrap(),
            &mut StepRng::new(8, 0, stream::HELD_OUT),
        )
        .unwrap()
}

pub fn teacher_weights() -> StateDict {
    ToyLatent::init(TEACHER, 0).unwrap()
}

/// The first of every pair of the teacher's blocks.
pub fn student_weights() -> StateDict {
    let teacher = teacher_weights();
    [
        ("blocks.0", "blocks.0"),
        ("blocks.1", "blocks.2"),
        ("head", "head"),
    ]
    .into_iter()
    .map(|(new, old)| {
        (
            format!("{new}.weight"),
            teacher.require(&format!("{old}.weight")).unwrap().clone(),
        )
    })
    .collect()
}

pub fn selection() -> Selection {
    let groups = vec![Group { n: 1, m: 2 }; STUDENT];
    Selection {
        groups,
        ..Selection::from_indices(&BlockLayout::single(TEACHER), vec![0, 2]).unwrap()
    }
    .validated()
    .unwrap()
}

pub fn layer_map() -> LayerMap {
    LayerMap::group_ends(&selection()).unwrap()
}

pub fn config(steps: u64, knowledge: Option<KnowledgeConfig>) -> DistillConfig {
    DistillConfig {
        seed: 1,
        lr: LrSchedule {
            peak: 2e-2,
            last: 1e-3,
            warmup: 0,
        },
        fit: FitConfig {
            steps,
            batch_size: BATCH,
            ema: 0.8,
            checkpoint_every: 4,
            log_every: 1,
            ..FitConfig::default()
        },
        knowledge,
    }
}

pub fn run_student(
    config: &DistillConfig,
    weights: &StateDict,
    teacher: Option<&Teacher<'_, ToyImage>>,
    folder: &Path,
    stop_at: Option<u64>,
) -> Result<Outcome> {
    let student = Student {
        weights: weights.clone(),
        build: &|w| ToyImage::new(STUDENT, w),
        is_fixed: &|_| false,
    };
    let dir = RunDir::open(folder, config)?;
    let (stop, progress) = (Stop::default(), Progress::hidden());
    let batches = |step| {
        if Some(step) == stop_at {
            stop.request();
        }
        batch(step, BATCH)
    };
    distill(
        config,
        student,
        teacher,
        &objective(0.2),
        batches,
        Run {
            dir: &dir,
            stop: &stop,
            progress: &progress,
        },
    )
}

pub fn mean(t: &Tensor) -> f64 {
    let values = flat(t);
    values.iter().sum::<f64>() / values.len() as f64
}

/// Held-out losses of the student on `weights`, taught by the toy teacher.
pub fn judge(weights: &StateDict, knowledge: &KnowledgeConfig) -> Losses {
    let net = ToyImage::new(TEACHER, &teacher_weights()).unwrap();
    let teacher = Teacher {
        net: &net,
        layers: Some(layer_map()),
    };
    let student = ToyImage::new(STUDENT, weights).unwrap();
    losses(
        &objective(0.0),
        &student,
        Some((&teacher, knowledge)),
        &held_out(),
    )
    .unwrap()
}

pub fn bits(weights: &StateDict) -> Vec<(String, Vec<u32>)> {
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

/// The log without what depends on the clock.
pub fn log(folder: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            value.as_object_mut().unwrap().remove("seconds");
            value
        })
        .collect()
}
