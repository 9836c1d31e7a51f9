//! Training steps: the output of a network, its losses, and the gradients of all that is trained.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use tinyfusion::core::{
    BlockStack, LatentBatch, Plan, StateDict, StepRng, run as run_plan, run_exact, stream,
};
use tinyfusion::diffusion::Objective;
use tinyfusion::models::{DiTConfig, SiTConfig, preset};
use tinyfusion::nn::{Gradients, layers::LoraSpec};

use super::super::prepare::everywhere;
use super::{Answers, BOTH, Check, moved, on_cpu, small_dit, small_mar};
use crate::compute::Compute;
use crate::family::{Dit, Family, MaskedAutoregressive, Sit};

/// What is trained, and how.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    AllWeights,
    /// The same, with blocks that are computed a second time in the backward.
    Recomputed,
    /// Weights and a mask of zeros and ones, with the exact blend.
    Blended,
    /// Low-rank factors beside frozen weights.
    LowRank,
}

const LORA: LoraSpec = LoraSpec {
    rank: 8,
    alpha: 16.0,
};

/// Samples of a small network's batch, and of a large one's.
const BATCH: usize = 3;
const FEW: usize = 2;

pub(super) fn checks(large: bool) -> Result<Vec<Check>> {
    let mut list = Vec::new();
    for (way, depth, name) in [
        (Way::AllWeights, 2, "of two blocks"),
        (Way::Recomputed, 2, "of two blocks, recomputed"),
        // So many that a block has every kind of column of a mask.
        (Way::Blended, 4, "of four blocks, blended"),
        (Way::LowRank, 2, "of two blocks, low-rank"),
    ] {
        let (dit, mar) = (small_dit(depth), small_mar(depth));
        list.push(check::<Dit>(name, dit.clone(), BATCH, way));
        list.push(check::<Sit>(name, SiTConfig(dit), BATCH, way));
        list.push(check::<MaskedAutoregressive>(name, mar, BATCH, way));
    }
    let whole = preset("DiT-XL/2")?;
    let block = DiTConfig {
        num_classes: 10, // a small table: the width is in question
        ..whole.with_depth(1)
    };
    list.push(check::<Dit>(
        "of one block of DiT-XL/2's sizes",
        block,
        FEW,
        Way::AllWeights,
    ));
    if large {
        let name = "of all blocks of DiT-XL/2";
        list.push(check::<Dit>(name, whole, FEW, Way::AllWeights));
    }
    Ok(list)
}

fn check<F: Family>(name: &str, config: F::Config, batch: usize, way: Way) -> Check {
    Check {
        name: format!("{} {name}", F::NAME),
        dtypes: BOTH,
        run: Box::new(move |compute| answers::<F>(&config, batch, way, compute)),
    }
}

/// The network's output, its losses, and by kind the gradients of their mean.
fn answers<F: Family>(
    config: &F::Config,
    batch: usize,
    way: Way,
    compute: &Compute,
) -> Result<Answers> {
    let device = &compute.device;
    let mut weights = weights::<F>(config, way, device)?;
    let vars = weights.make_trainable(|name| match way {
        Way::LowRank => is_factor(name),
        _ => !F::is_fixed(name),
    })?;
    let scale = if way == Way::LowRank {
        LORA.scale()
    } else {
        0.0
    };
    let net = F::network(
        config,
        &weights,
        scale,
        way == Way::Recomputed,
        compute.dtype,
    )?;
    let objective = F::objective(config, &F::Process::default(), true)?;
    let mut rng = StepRng::new(1, 0, stream::DRAW);
    let clean = clean::<F>(config, batch, &mut rng)?;
    let draw = objective.draw(&clean.to_device(device)?, &mut rng)?;
    let input = objective.input(&draw)?;
    let depth = net.layout().depth();
    let mask = match way {
        Way::Blended => Some(mask(batch, depth, device)?), // (B, depth)
        _ => None,
    };
    // As the training loop does it.
    let (said, losses) = Gradients::recording(|| {
        let output = match &mask {
            None => run_plan(&net, &input, &Plan::full(depth))?.output,
            Some(mask) => {
                let twin = F::network(config, &weights.detached(), scale, false, compute.dtype)?;
                run_exact(&net, &twin, &input, &Plan::blend(mask)?)?.output
            }
        };
        let said = output.detach();
        let losses = objective.loss(&objective.predict(&net, output, &draw)?, &draw)?; // (B,)
        anyhow::Ok((said, losses))
    })?;
    let trained: Vec<&Var> = vars.iter().map(|(_, var)| var).chain(&mask).collect();
    let mut gradients = Gradients::new(&trained);
    gradients.backward(&losses.mean_all()?)?;
    let mut found = vec![on_cpu([said])?, on_cpu([losses.detach()])?];
    let mut gradients = on_cpu(gradients.sums()?)?;
    if mask.is_some() {
        found.extend(gradients.pop().map(|of_mask| vec![of_mask]));
    }
    let named = vars.iter().map(|(name, _)| name).zip(gradients);
    let (second, first): (Vec<_>, Vec<_>) = named.partition(|(name, _)| name.ends_with(SECOND));
    for group in [first, second] {
        if !group.is_empty() {
            found.push(group.into_iter().map(|(_, gradient)| gradient).collect());
        }
    }
    Ok(found)
}

fn clean<F: Family>(config: &F::Config, batch: usize, rng: &mut StepRng) -> Result<LatentBatch> {
    let takes = F::samples(config);
    let shape = (batch, takes.channels, takes.size, takes.size);
    Ok(LatentBatch {
        x: rng.normal(shape, &Device::Cpu)?,
        y: Tensor::new(vec![1u32; batch], &Device::Cpu)?,
    })
}

fn weights<F: Family>(config: &F::Config, way: Way, device: &Device) -> Result<StateDict> {
    let mut rng = StepRng::new(0, 1, stream::INIT);
    let mut weights = everywhere(&F::init(config, 0, &Device::Cpu)?, &mut rng)?;
    if way == Way::LowRank {
        let factors = LORA.init(&F::params(config), |_| true, 0, &Device::Cpu)?;
        for (name, factor) in everywhere(&factors, &mut rng)?.iter() {
            weights.insert(name, factor.clone());
        }
    }
    moved(&weights, device)
}

/// How the names of the factors end: B·A is added to a weight.
const FIRST: &str = ".lora_a.weight";
const SECOND: &str = ".lora_b.weight";

fn is_factor(name: &str) -> bool {
    name.ends_with(FIRST) || name.ends_with(SECOND)
}

/// A mask (B, depth) with blocks that some samples run, all of them, and none.
fn mask(batch: usize, depth: usize, device: &Device) -> Result<Var> {
    let runs = |(b, i): (usize, usize)| match i % 4 {
        0 => b % 2 == 0,
        1 => b % 2 == 1,
        kind => kind == 2,
    };
    let values: Vec<f32> = (0..batch * depth)
        .map(|at| f32::from(u8::from(runs((at / depth, at % depth)))))
        .collect();
    let mask = Tensor::from_vec(values, (batch, depth), device)?;
    Ok(Var::from_tensor(&mask)?)
}
