//! Learning the mask of a SiT on its own objective: the blocks that it was trained with are found.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_core::{
    BlockStack, LatentBatch, LatentQuery, Plan, Result, StateDict, StepRng, run, stream,
};
use tinyfusion_diffusion::{
    Interpolant, InterpolantConfig, InterpolantObjective, LabelDrop, Objective,
};
use tinyfusion_models::{DiTConfig, SiT, SiTConfig};
use tinyfusion_recover::{
    DeltaW, LearnConfig, LoraLayers, RunContext, Teacher, held_out_loss, learn,
};
use tinyfusion_testing::flat;
use tinyfusion_train::{FitConfig, Progress, RunDir, Stop};

const BATCH: usize = 24;
const DEPTH: usize = 4;

fn model() -> SiTConfig {
    SiTConfig(DiTConfig {
        input_size: 4,
        patch_size: 2,
        in_channels: 2,
        hidden_size: 16,
        depth: DEPTH,
        num_heads: 2,
        num_classes: 3,
        ..DiTConfig::default()
    })
}

/// Two of the four blocks have closed gates, here and in training.
fn closed(name: &str) -> bool {
    name.starts_with("blocks.1.adaLN") || name.starts_with("blocks.2.adaLN")
}

fn start() -> StateDict {
    let mut rng = StepRng::new(3, 0, stream::INIT);
    model()
        .params()
        .into_iter()
        .map(|s| {
            let t = rng.normal(s.shape, &Device::Cpu).unwrap();
            // Large gates make a missing block felt.
            let scale = match s.name.as_str() {
                name if closed(name) => 0.0,
                name if name.contains("adaLN") => 0.5,
                _ => 0.2,
            };
            (s.name, (t * scale).unwrap())
        })
        .collect()
}

fn objective() -> InterpolantObjective {
    let labels = LabelDrop {
        num_classes: 3,
        probability: 0.1,
    };
    let process = Interpolant::new(InterpolantConfig::default()).unwrap();
    InterpolantObjective::new(process, labels).unwrap()
}

/// One picture a class.
fn batch(step: u64) -> Result<LatentBatch> {
    let pictures = StepRng::new(8, 0, stream::ORDER).normal((3, 2, 4, 4), &Device::Cpu)?;
    let y: Vec<u32> = StepRng::new(1, step, stream::ORDER)
        .below(3, BATCH)
        .into_iter()
        .map(|y| y as u32)
        .collect();
    let y = Tensor::new(y, &Device::Cpu)?;
    Ok(LatentBatch {
        x: pictures.index_select(&y, 0)?, // (B, 2, 4, 4)
        y,
    })
}

/// A teacher trained by a few hundred steps against the gradient's direction in every tensor.
fn trained(objective: &InterpolantObjective) -> StateDict {
    const STEPS: u64 = 300;
    let mut weights = start();
    let variables = weights
        .make_trainable(|n| !SiTConfig::is_fixed(n) && !closed(n))
        .unwrap();
    let net = SiT::new(&model(), &weights).unwrap();
    for step in 0..STEPS {
        let mut rng = StepRng::new(2, step, stream::DRAW);
        let draw = objective.draw(&batch(step).unwrap(), &mut rng).unwrap();
        let loss = loss(objective, &net, &draw).unwrap();
        let grads = loss.mean_all().unwrap().backward().unwrap();
        let rate = 0.02 * (1.0 - step as f64 / STEPS as f64);
        for (_, var) in &variables {
            let grad = grads.get(var).unwrap();
            let size = grad.sqr().unwrap().mean_all().unwrap();
            let size = f64::from(size.to_scalar::<f32>().unwrap()).sqrt();
            let moved = (var.as_tensor() - (grad * (rate / (size + 1e-12))).unwrap()).unwrap();
            var.set(&moved).unwrap();
        }
    }
    weights.into_detached()
}

fn loss<S: BlockStack<Input = LatentQuery>, O: Objective<S, Prediction = Tensor>>(
    objective: &O,
    net: &S,
    draw: &O::Draw,
) -> Result<Tensor> {
    let output = run(net, &objective.input(draw)?, &Plan::full(DEPTH))?.output;
    objective.loss(&objective.predict(net, output, draw)?, draw) // (B,)
}

#[test]
fn useful_blocks_of_a_sit_are_found_on_the_interpolant_objective() {
    let objective = objective();
    let weights = trained(&objective);
    let net = SiT::new(&model(), &weights).unwrap();
    let held_out = |plan: &Plan| {
        let batches = (1000..1010).map(batch);
        let estimate = held_out_loss(&net, plan, &objective, batches, 5).unwrap();
        estimate.loss
    };
    let full = held_out(&Plan::full(DEPTH));
    let useful = held_out(&Plan::keep(DEPTH, &[0, 3]));
    let useless = held_out(&Plan::keep(DEPTH, &[1, 2]));
    // Who says nothing loses E‖ε − x‖², about 2.
    assert!(full < 1.2 && useless > 1.3 * full, "{full} {useless}");
    assert!((useful - full).abs() < 1e-5, "{useful} {full}");

    let config = LearnConfig {
        delta: DeltaW::Lora {
            rank: 2,
            alpha: 4.0,
            layers: LoraLayers::All,
        },
        lr: 1e-3,
        mask_lr: 5e-3,
        fit: FitConfig {
            steps: 150,
            batch_size: BATCH,
            micro_batches: 2,
            ema: 0.9,
            ..FitConfig::default()
        },
        ..LearnConfig::default()
    };
    let build = |weights: &StateDict, scale: f64| SiT::with_lora(&model(), weights, scale);
    let folder = tempfile::tempdir().unwrap();
    let dir = RunDir::open(folder.path(), &config).unwrap();
    let teacher = Teacher {
        weights: weights.clone(),
        is_fixed: &SiTConfig::is_fixed,
        build: &build,
    };
    let context = RunContext {
        dir: &dir,
        stop: &Stop::default(),
        progress: &Progress::hidden(),
    };
    let before: Vec<_> = weights.iter().map(|(_, t)| flat(t)).collect();
    let learned = learn(&config, teacher, &objective, batch, context).unwrap();
    assert_eq!((learned.selection.kept, learned.skipped), (vec![0, 3], 0));
    let after: Vec<_> = weights.iter().map(|(_, t)| flat(t)).collect();
    assert!(before == after, "the teacher is left alone");
}
