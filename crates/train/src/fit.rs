use std::ops::Range;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tinyfusion_core::{Error, Result, StateDict};
use tinyfusion_nn::update::AdamW;

use crate::gradients::Workers;
use crate::run_dir::{HISTORY, METRICS, State};
use crate::{ParamGroup, Progress, RunDir, Stop};

/// One training problem: what is drawn for a step and what its loss is. It owns its network and data.
pub trait TrainStep: Sync {
    /// Everything that one step draws: the batch and all randomness.
    type Batch: Send + Sync;

    /// The draw of step `step`, the same whenever it is asked.
    fn draw(&self, step: u64) -> Result<Self::Batch>;

    /// The mean loss over the samples `rows` of the draw.
    fn loss(&self, batch: &Self::Batch, rows: Range<usize>) -> Result<StepLoss>;

    /// A line for `history.jsonl` after `done` steps, given the averaged parameters.
    fn record(&self, done: u64, averages: &dyn Fn() -> StateDict) -> Result<Option<String>> {
        let _ = (done, averages);
        Ok(None)
    }
}

/// A loss and what it is made of.
#[derive(Debug)]
pub struct StepLoss {
    /// A scalar with its graph.
    pub loss: Tensor,
    /// Parts of it by name, for the log.
    pub scalars: Vec<(&'static str, f64)>,
}

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct FitConfig {
    /// Steps in all.
    pub steps: u64,
    /// Samples per step.
    pub batch_size: usize,
    /// Pieces into which a batch is cut; as many as there are cores run side by side.
    pub micro_batches: usize,
    /// Largest norm of all gradients together.
    pub clip: Option<f64>,
    /// Decay per step of the averaged parameters.
    pub ema: f64,
    /// Decay of AdamW's moments.
    pub betas: (f64, f64),
    /// AdamW's ε.
    pub eps: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Steps between lines of `metrics.jsonl`.
    pub log_every: u64,
}

impl Default for FitConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 64,
            micro_batches: 2,
            clip: Some(1.0),
            ema: 0.999,
            betas: (0.9, 0.999),
            eps: 1e-8,
            checkpoint_every: 500,
            log_every: 10,
        }
    }
}

impl FitConfig {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<()> {
        let fail = |what: String| Err(Error::usage(format!("training: {what}")));
        if self.steps == 0 || self.batch_size == 0 || self.micro_batches == 0 {
            return fail("steps, batch-size and micro-batches must be at least 1".into());
        }
        if self.micro_batches > self.batch_size {
            return fail(format!("{} micro-batches of a batch of {}", self.micro_batches, self.batch_size));
        }
        if !(0.0..1.0).contains(&self.ema) {
            return fail(format!("ema {} is not in [0, 1)", self.ema));
        }
        if self.clip.is_some_and(|c| c.is_nan() || c <= 0.0) {
            return fail("clip must be above 0".into());
        }
        if self.checkpoint_every == 0 || self.log_every == 0 {
            return fail("checkpoint-every and log-every must be at least 1".into());
        }
        Ok(())
    }

    /// The samples of each micro-batch.
    fn parts(&self) -> Vec<Range<usize>> {
        let (n, k) = (self.batch_size, self.micro_batches);
        (0..k).map(|i| n * i / k..n * (i + 1) / k).collect()
    }
}

/// What a finished run leaves.
#[derive(Debug)]
pub struct Outcome {
    /// The averaged parameters.
    pub averages: StateDict,
    /// Steps skipped because something was not finite.
    pub skipped: u64,
    /// Seconds spent, over all parts of the run.
    pub seconds: f64,
}

/// Skipped steps in a row after which a run is lost.
const HOPELESS: u64 = 50;

/// The one training loop: resume, draw, gradients, finite?, clip, AdamW per group, average, log,
/// checkpoint.
///
/// Ends early with [`Error::Interrupted`] when `stop` is requested, after writing a checkpoint.
pub fn fit<T: TrainStep>(
    config: &FitConfig,
    step: &T,
    groups: &[ParamGroup],
    dir: &RunDir,
    stop: &Stop,
    progress: &Progress,
) -> Result<Outcome> {
    config.validate()?;
    let device = groups.iter().flat_map(ParamGroup::vars).next().map_or(Device::Cpu, |v| v.device().clone());
    let fresh = State { step: 0, updates: 0, skipped: 0, seconds: 0.0 };
    let mut state = dir.resume(groups, &device)?.unwrap_or(fresh);
    if state.step > 0 {
        tracing::info!(step = state.step, "resumed from the last checkpoint");
    }
    let (workers, parts) = (Workers::new(config.micro_batches)?, config.parts());
    let vars: Vec<&Var> = groups.iter().flat_map(ParamGroup::vars).collect();
    let averages = || groups.iter().flat_map(|g| g.averages().iter().map(|(n, t)| (n.to_string(), t.clone())).collect::<Vec<_>>()).collect::<StateDict>();
    let started = Instant::now();
    let seconds_before = state.seconds;
    let mut hopeless = 0;
    progress.resume_at(state.step);

    while state.step < config.steps {
        let at = state.step;
        let batch = step.draw(at)?;
        let found = workers.run(step, &batch, &parts, &vars)?;

        if found.loss.is_finite() && found.norm.is_finite() {
            hopeless = 0;
            state.updates += 1;
            // PyTorch's clip_grad_norm_.
            let scale = config.clip.map_or(1.0, |clip| (clip / (found.norm + 1e-6)).min(1.0));
            let mut grads = found.grads.as_slice();
            for group in groups {
                let (own, rest) = grads.split_at(group.vars().count());
                let adamw = AdamW {
                    lr: group.lr.at(at, config.steps),
                    betas: config.betas,
                    eps: config.eps,
                    weight_decay: group.weight_decay,
                };
                group.step(own, adamw, state.updates, scale)?;
                grads = rest;
            }
        } else {
            hopeless += 1;
            state.skipped += 1;
            tracing::warn!(step = at, loss = found.loss, grad_norm = found.norm, "not finite: step skipped");
            if hopeless >= HOPELESS {
                return Err(Error::run(format!(
                    "{hopeless} steps in a row without a finite loss (the last at step {at}); try a lower learning rate"
                )));
            }
        }
        for group in groups {
            group.update_averages(config.ema)?;
        }

        state.step += 1;
        state.seconds = seconds_before + started.elapsed().as_secs_f64();
        if let Some(line) = step.record(state.step, &averages)? {
            dir.log(HISTORY, &line)?;
        }
        let (last, asked) = (state.step == config.steps, stop.requested());
        if state.step % config.log_every == 0 || last {
            dir.log(METRICS, &metrics(config, groups, &state, &found.scalars, found.loss, found.norm))?;
        }
        progress.set(state.step, format!("loss {:.4}", found.loss));
        if state.step % config.checkpoint_every == 0 || last || asked {
            dir.save(groups, &state)?;
        }
        if asked && !last {
            return Err(Error::Interrupted { step: state.step });
        }
    }
    progress.finish();
    Ok(Outcome { averages: averages(), skipped: state.skipped, seconds: state.seconds })
}

fn metrics(
    config: &FitConfig,
    groups: &[ParamGroup],
    state: &State,
    scalars: &[(&'static str, f64)],
    loss: f64,
    norm: f64,
) -> String {
    // JSON has no NaN: serde_json writes null for it.
    let mut line = json!({
        "step": state.step, "loss": loss, "grad_norm": norm, "skipped": state.skipped, "seconds": state.seconds,
    });
    if let Some(map) = line.as_object_mut() {
        for group in groups {
            map.insert(format!("lr_{}", group.name), json!(group.lr.at(state.step - 1, config.steps)));
        }
        for (name, value) in scalars {
            map.insert((*name).to_string(), json!(value));
        }
    }
    line.to_string()
}
