//! A toy problem whose answer is known: imitate a teacher some of whose blocks do nothing.
#![allow(dead_code)] // every test file uses its part

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::toy::ToyLatent;
use tinyfusion_core::{BlockStack, LatentQuery, Plan, Result, StateDict, StepRng, run};
use tinyfusion_diffusion::Objective;
use tinyfusion_mask::{HistoryRecord, parse_history};
use tinyfusion_recover::{DeltaW, LearnConfig, Learned, RunContext, Teacher, learn};
use tinyfusion_train::{FitConfig, Progress, RunDir, Stop};

pub(crate) const DEPTH: usize = 6;
/// One of every two: the position of the useful one differs from group to group.
pub(crate) const USELESS: [usize; 3] = [0, 3, 4];
pub(crate) const USEFUL: [usize; 3] = [1, 2, 5];
pub(crate) const BATCH: usize = 12;

/// The teacher's weights.
pub(crate) fn weights() -> StateDict {
    let mut weights = ToyLatent::init(DEPTH, 1).unwrap();
    for i in USELESS {
        let name = format!("blocks.{i}.weight");
        let scaled = (weights.require(&name).unwrap() * 1e-3).unwrap();
        weights.insert(name, scaled);
    }
    weights
}

pub(crate) fn build(weights: &StateDict, _lora_scale: f64) -> Result<ToyLatent> {
    ToyLatent::new(DEPTH, weights)
}

/// x (B, C, H, W) of a step.
pub(crate) fn batch(step: u64) -> Result<Tensor> {
    StepRng::new(7, step, 99).normal((BATCH, ToyLatent::CHANNELS, 2, 2), &Device::Cpu)
}

/// The loss is the distance to what the whole teacher says.
pub(crate) struct Imitate<S>(pub(crate) S);

impl Imitate<ToyLatent> {
    pub(crate) fn toy(weights: &StateDict) -> Self {
        Self(build(weights, 0.0).unwrap())
    }
}

pub(crate) struct Draw {
    query: LatentQuery,
    wanted: Tensor,
}

impl<S: BlockStack<Input = LatentQuery>> Objective<S> for Imitate<S> {
    type Batch = Tensor;
    type Draw = Draw;
    type Prediction = Tensor;

    fn draw(&self, x: &Tensor, rng: &mut StepRng) -> Result<Draw> {
        let b = x.dim(0)?;
        let t: Vec<f32> = rng.below(1000, b).into_iter().map(|t| t as f32).collect();
        let query = LatentQuery {
            x: x.clone(),
            t: Tensor::new(t, x.device())?,
            y: Tensor::zeros(b, DType::U32, x.device())?,
        };
        let wanted = run(&self.0, &query, &Plan::full(self.0.layout().depth()))?.output;
        Ok(Draw { query, wanted })
    }

    fn rows(&self, d: &Draw, start: usize, len: usize) -> Result<Draw> {
        let query = LatentQuery {
            x: d.query.x.narrow(0, start, len)?,
            t: d.query.t.narrow(0, start, len)?,
            y: d.query.y.narrow(0, start, len)?,
        };
        Ok(Draw {
            query,
            wanted: d.wanted.narrow(0, start, len)?,
        })
    }

    fn input(&self, d: &Draw) -> Result<LatentQuery> {
        Ok(d.query.clone())
    }

    fn noise_free(&self, d: &Draw) -> Result<LatentQuery> {
        Ok(d.query.clone())
    }

    fn predict(&self, _net: &S, output: Tensor, _d: &Draw) -> Result<Tensor> {
        Ok(output)
    }

    fn loss(&self, output: &Tensor, d: &Draw) -> Result<Tensor> {
        Ok((output - &d.wanted)?.sqr()?.flatten_from(1)?.mean(1)?)
    }

    fn distill(&self, student: &Tensor, teacher: &Tensor, _d: &Draw) -> Result<Tensor> {
        Ok((student - teacher)?.sqr()?.flatten_from(1)?.mean(1)?)
    }
}

pub(crate) fn config(delta: DeltaW) -> LearnConfig {
    LearnConfig {
        delta,
        lr: 1e-3,
        mask_lr: 5e-3,
        fit: FitConfig {
            steps: 120,
            batch_size: BATCH,
            micro_batches: 2,
            ema: 0.9,
            checkpoint_every: 50,
            ..FitConfig::default()
        },
        ..LearnConfig::default()
    }
}

pub(crate) fn run_in(
    folder: &Path,
    config: &LearnConfig,
    weights: &StateDict,
    batches: impl FnMut(u64) -> Result<Tensor> + Send,
    stop: &Stop,
) -> Result<Learned> {
    let dir = RunDir::open(folder, config)?;
    let teacher = Teacher {
        weights: weights.clone(),
        is_fixed: &|_| false,
        build: &build,
    };
    let context = RunContext {
        dir: &dir,
        stop,
        progress: &Progress::hidden(),
    };
    learn(config, teacher, &Imitate::toy(weights), batches, context)
}

pub(crate) fn run_toy(config: &LearnConfig) -> Result<(Learned, Vec<HistoryRecord>)> {
    let folder = tempfile::tempdir().unwrap();
    let learned = run_in(folder.path(), config, &weights(), batch, &Stop::default())?;
    Ok((learned, history(folder.path())))
}

pub(crate) fn history(folder: &Path) -> Vec<HistoryRecord> {
    parse_history(&std::fs::read_to_string(folder.join("history.jsonl")).unwrap()).unwrap()
}
