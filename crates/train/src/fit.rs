use std::ops::Range;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tinyfusion_core::{Error, Result, StateDict};
use tinyfusion_nn::update::AdamW;

use crate::gradients::{BatchGradients, Clipped, Workers};
use crate::group::check_groups;
use crate::pending::{HOPELESS, Pending};
use crate::run_dir::{HISTORY, METRICS, State};
use crate::scaling::ramped;
use crate::{ParamGroup, Progress, RunDir, Stop};

/// One training problem: what is drawn for a step and what its loss is. It owns its network and data.
pub trait TrainStep: Sync {
    /// Everything that one step draws: the batch and all randomness.
    type Batch: Send + Sync;

    /// The draw of step `step`, the same whenever it is asked.
    fn draw(&self, step: u64) -> Result<Self::Batch>;

    /// The mean loss over the samples `rows` of the draw.
    fn loss(&self, batch: &Self::Batch, rows: Range<usize>) -> Result<StepLoss>;

    /// A line for `history.jsonl` after `done` steps, given the averaged parameters: one JSON object with
    /// `"step": done`, by which a resumed run finds the lines that it will write again.
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
    /// Parts of it by name, for the log: scalars, which are read when a line is due.
    pub scalars: Vec<(&'static str, Tensor)>,
}

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct FitConfig {
    /// Steps in all.
    pub steps: u64,
    /// Samples per step.
    pub batch_size: usize,
    /// Pieces into which a batch is cut: more of them take less memory.
    pub micro_batches: usize,
    /// Pieces worked on side by side, each with its own sums of gradients, as far as there are cores for them.
    pub lanes: usize,
    /// Largest norm of all gradients together.
    pub clip: Option<f64>,
    /// Decay per step of the averaged parameters; [`ema_decay`](crate::ema_decay) finds it for a half-life in samples.
    pub ema: f64,
    /// The average's half-life is at most this share of the run so far, so that it forgets the weights it began with:
    /// 0.05 in EDM. Without it the decay is the same at every step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_rampup: Option<f64>,
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
            lanes: 2,
            clip: Some(1.0),
            ema: 0.999,
            ema_rampup: None,
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
        if self.steps == 0 || self.batch_size == 0 || self.micro_batches == 0 || self.lanes == 0 {
            return fail("steps, batch-size, micro-batches and lanes must be at least 1".into());
        }
        // Above it, a slip of the keyboard is likelier than a wish.
        const LARGEST_BATCH: usize = 1 << 20;
        if self.batch_size > LARGEST_BATCH {
            return fail(format!(
                "a batch of {}; at most {LARGEST_BATCH} are taken",
                self.batch_size
            ));
        }
        if self.micro_batches > self.batch_size {
            return fail(format!(
                "{} micro-batches of a batch of {}",
                self.micro_batches, self.batch_size
            ));
        }
        for (name, decay) in [
            ("ema", self.ema),
            ("betas", self.betas.0),
            ("betas", self.betas.1),
        ] {
            if !(0.0..1.0).contains(&decay) {
                return fail(format!("{name}: {decay} is not in [0, 1)"));
            }
        }
        if let Some(share) = (self.ema_rampup).filter(|r| !(*r > 0.0 && *r <= 1.0)) {
            return fail(format!(
                "ema-rampup is {share}; a share above 0 and up to 1 is expected"
            ));
        }
        // Written so that NaN fails too.
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return fail(format!("eps is {}; a number above 0 is expected", self.eps));
        }
        if let Some(clip) = self.clip.filter(|c| c.is_nan() || *c <= 0.0) {
            return fail(format!("clip is {clip}; a norm above 0 is expected"));
        }
        if self.checkpoint_every == 0 || self.log_every == 0 {
            return fail("checkpoint-every and log-every must be at least 1".into());
        }
        Ok(())
    }

    /// The decay of the averages at an update that comes after `updates_before` others.
    pub fn ema_at(&self, updates_before: u64) -> f64 {
        ramped(self.ema, self.ema_rampup, updates_before)
    }

    /// What is left in the averages of the weights they began with, when all steps are done: a share in [0, 1].
    pub fn start_left(&self) -> f64 {
        match self.ema_rampup {
            None => self.ema.powf(self.steps as f64),
            Some(_) => 0.0, // the first update's decay is 0
        }
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

/// Share of skipped steps above which a finished run has failed: what it leaves was hardly trained.
const MOST_SKIPPED: f64 = 0.5;

/// The one training loop: resume, draw, gradients, finite?, clip, AdamW per group, average, log,
/// checkpoint.
///
/// Ends early with [`Error::Interrupted`] when `stop` is requested, after writing a checkpoint; a step under way is
/// given up before its next micro-batch. Called again with the same arguments it goes on from the last checkpoint, and ends where the unbroken run would have
/// ended, bit for bit on a CPU. A finished run is not trained again.
pub fn fit<T: TrainStep>(
    config: &FitConfig,
    step: &T,
    groups: &[ParamGroup],
    dir: &RunDir,
    stop: &Stop,
    progress: &Progress,
) -> Result<Outcome> {
    config.validate()?;
    check_groups(groups)?;
    let vars: Vec<&Var> = groups.iter().flat_map(ParamGroup::vars).collect();
    let averages = || -> StateDict { groups.iter().flat_map(averages_of).collect() };
    let _lock = dir.lock()?;

    let device = vars.first().map_or(Device::Cpu, |v| v.device().clone());
    let mut state = dir.resume(groups, &device)?.unwrap_or_default();
    if state.step > config.steps {
        return Err(Error::usage(format!(
            "{}: this run has done {} steps, more than the {} asked for; use another folder",
            dir.path().display(),
            state.step,
            config.steps
        )));
    }
    if state.step > 0 {
        tracing::info!(step = state.step, "resumed from the last checkpoint");
    }
    let parts = config.parts();
    // A GPU is full with one piece.
    let lanes = if device.is_cpu() { config.lanes } else { 1 };
    let mut workers = Workers::new(lanes.min(parts.len()), &vars)?;
    let mut pending = Pending::default();
    let mut shown = String::new();
    let (started, seconds_before) = (Instant::now(), state.seconds);
    let mut saved = state.step;
    let _bar = progress.running_from(state.step);

    while state.step < config.steps {
        let at = state.step;
        let batch = step.draw(at)?;
        let Some(found) = workers.run(step, &batch, &parts, stop)? else {
            state.seconds = seconds_before + started.elapsed().as_secs_f64();
            if saved < state.step {
                dir.save(groups, &state)?;
            }
            return Err(Error::Interrupted { step: state.step });
        };

        let clipped = found.clipped(config.clip)?;
        let applied = match &clipped {
            Clipped::Known { scale, .. } if scale.is_nan() => false,
            Clipped::Known { .. } => {
                state.skipped_in_a_row = 0;
                true
            }
            // A scale that is NaN there writes nothing; how often it was is asked later.
            Clipped::There { scale, .. } => {
                pending.note(scale)?;
                true
            }
        };
        if applied {
            state.updates += 1;
            let mut grads = found.grads.as_slice();
            for group in groups {
                let (own, rest) = grads.split_at(group.vars().count());
                let adamw = AdamW {
                    lr: group.lr.at(at, config.steps),
                    betas: config.betas,
                    eps: config.eps,
                    weight_decay: group.weight_decay,
                };
                let decay = config.ema_at(state.updates - 1);
                group.step(own, adamw, state.updates, &clipped.scale(), decay)?;
                grads = rest;
            }
        } else {
            // As if the step had not been: weights, moments and averages stay as they are.
            state.skip(1);
            tracing::warn!(
                step = at,
                loss = found.loss.read()?,
                grad_norm = clipped.norm()?,
                "not finite: step skipped"
            );
        }

        state.step += 1;
        state.seconds = seconds_before + started.elapsed().as_secs_f64();
        if let Some(line) = step.record(state.step, &averages)? {
            dir.log(HISTORY, state.step, &line)?;
        }
        let (last, asked) = (state.step == config.steps, stop.requested());
        let log = state.step.is_multiple_of(config.log_every) || last;
        let save = state.step.is_multiple_of(config.checkpoint_every) || last || asked;
        if log || save || pending.may_be_hopeless() {
            pending.settle(&mut state)?;
        }
        if log {
            dir.log(
                METRICS,
                state.step,
                &metrics(config, groups, &state, &found, &clipped)?,
            )?;
        }
        if state.skipped_in_a_row >= HOPELESS {
            return Err(Error::run(format!(
                "{HOPELESS} steps in a row had a loss or a gradient that is not finite (at step {at}: loss {}, gradient norm \
                 {}); try a lower learning rate in another folder",
                found.loss.read()?,
                clipped.norm()?
            )));
        }
        // Where reading it is to wait, the loss is shown as often as it is logged.
        if log || device.is_cpu() {
            shown = format!("loss {:.4}", found.loss.read()?);
        }
        progress.set(state.step, shown.clone());
        if save {
            dir.save(groups, &state)?;
            saved = state.step;
        }
        if asked && !last {
            return Err(Error::Interrupted { step: state.step });
        }
    }
    if state.skipped as f64 > MOST_SKIPPED * state.step as f64 {
        return Err(Error::run(format!(
            "{}: {} of {} steps were skipped because a loss or a gradient was not finite, so hardly anything was \
             learned; try a lower learning rate in another folder",
            dir.path().display(),
            state.skipped,
            state.step
        )));
    }
    Ok(Outcome {
        averages: averages(),
        skipped: state.skipped,
        seconds: state.seconds,
    })
}

fn averages_of(group: &ParamGroup) -> Vec<(String, Tensor)> {
    group
        .averages()
        .iter()
        .map(|(name, t)| (name.to_string(), t.clone()))
        .collect()
}

fn metrics(
    config: &FitConfig,
    groups: &[ParamGroup],
    state: &State,
    found: &BatchGradients,
    clipped: &Clipped,
) -> Result<String> {
    // JSON has no NaN: serde_json writes null for it. A scalar cannot take the place of a fixed entry.
    let mut line = Map::new();
    for (name, value) in &found.scalars {
        line.insert((*name).to_string(), json!(value.read()?));
    }
    for group in groups {
        let lr = group.lr.at(state.step - 1, config.steps);
        line.insert(format!("lr_{}", group.name), json!(lr));
    }
    let fixed = [
        ("step", json!(state.step)),
        ("loss", json!(found.loss.read()?)),
        ("grad_norm", json!(clipped.norm()?)),
        ("skipped", json!(state.skipped)),
        ("seconds", json!(state.seconds)),
    ];
    line.extend(fixed.map(|(name, value)| (name.to_string(), value)));
    Ok(Value::Object(line).to_string())
}
