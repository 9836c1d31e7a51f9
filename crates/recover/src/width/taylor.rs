use std::collections::BTreeMap;

use candle_core::{Device, Var};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{
    BlockStack, Error, Plan, Result, StepRng, WidthGroups, run, stream, values_f64,
};
use tinyfusion_diffusion::TimestepObjective;
use tinyfusion_nn::{Gradients, Lanes};
use tinyfusion_train::{Progress, Stop};

use crate::Teacher;

/// Settings of [`taylor`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaylorConfig {
    /// Share of the largest loss so far below which no further timestep counts.
    pub threshold: f64,
    /// Timesteps from one that is taken to the next; above 1 it is a cheaper approximation.
    pub stride: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Batches worked on side by side; the last digits of the scores depend on it, not on the machine.
    pub lanes: usize,
}

impl Default for TaylorConfig {
    /// Diff-Pruning's threshold.
    fn default() -> Self {
        Self {
            threshold: 0.05,
            stride: 1,
            seed: 0,
            lanes: 2,
        }
    }
}

impl TaylorConfig {
    /// Checks that the settings make sense.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.threshold) {
            return Err(Error::usage(format!(
                "threshold is a share of the largest loss, from 0 to 1, found {}",
                self.threshold
            )));
        }
        if self.stride == 0 {
            return Err(Error::usage("stride is 0; every timestep is stride 1"));
        }
        Ok(())
    }
}

/// Which timesteps count: 0, 1, 2, … as long as L_t ≥ threshold · max L, the largest loss up to t.
///
/// Late timesteps, where little is left to predict, have small losses; their gradients drown what matters to content and
/// detail (Fang et al. 2023, §3.3). The authors' program also counts the first timestep below the threshold; by the
/// formula, and here, it does not.
#[derive(Debug, Clone, Copy)]
pub struct LossThreshold {
    threshold: f64,
    largest: f64,
}

impl LossThreshold {
    /// Before the first timestep.
    pub fn new(threshold: f64) -> Self {
        Self {
            threshold,
            largest: 0.0,
        }
    }

    /// Whether the next timestep, of mean loss `loss`, counts. The first that does not ends the sum.
    pub fn admits(&mut self, loss: f64) -> bool {
        self.largest = self.largest.max(loss);
        loss >= self.threshold * self.largest
    }
}

/// What [`taylor`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Taylor {
    /// The score of every group, in the order of the groups that were asked about.
    pub scores: Vec<Vec<f64>>,
    /// How many timesteps counted: the first of those looked at.
    pub timesteps: usize,
    /// The mean loss at the timesteps looked at, 0, stride, 2·stride, …; one more than counted where the threshold ended
    /// it.
    pub losses: Vec<f64>,
}

/// First-order Taylor importance over the timesteps (Diff-Pruning, Fang et al. 2023, arXiv 2305.10924): the score of a
/// group is Σ_k |w_k · Σ_t ∂L_t/∂w_k| over all its weights k, biases included, and over the timesteps t of
/// [`LossThreshold`]. L_t is the mean loss of all samples at timestep t; a sample has the same noise at every timestep.
///
/// The gradients at one timestep are summed in f32, over the timesteps in f64, which takes 8 bytes for each weight that
/// could be removed. No activation outlives its batch.
///
/// # Errors
/// Without samples or groups; where a loss or gradient is not finite; after a request to stop ([`Error::Stopped`]).
pub fn taylor<S, O>(
    config: &TaylorConfig,
    teacher: Teacher<'_, S>,
    groups: &[WidthGroups],
    objective: &O,
    batches: &[O::Batch],
    stop: &Stop,
    progress: &Progress,
) -> Result<Taylor>
where
    S: BlockStack + Sync,
    O: TimestepObjective<S> + Sync,
    O::Batch: Sync,
{
    config.validate()?;
    if batches.is_empty() || groups.is_empty() {
        return Err(Error::usage(
            "the importance of groups needs at least one group and one batch of samples",
        ));
    }
    // Only what could be removed is a variable: the other weights' gradients are not formed.
    let removable = |name: &str| {
        let mut rows = groups.iter().flat_map(|g| &g.rows);
        rows.any(|r| r.tensor == name)
    };
    let mut weights = teacher.weights.into_detached();
    let variables = weights.make_trainable(removable)?;
    let net = (teacher.build)(&weights, 0.0)?;
    let mut sweep = Sweep::new(config, &net, objective, &variables)?;

    let mut threshold = LossThreshold::new(config.threshold);
    let (mut losses, mut timesteps) = (Vec::new(), 0);
    for t in (0..objective.timesteps()).step_by(config.stride) {
        if stop.requested() {
            return Err(Error::Stopped);
        }
        progress.set(
            t as u64,
            losses
                .last()
                .map_or_else(String::new, |l| format!("loss {l:.4}")),
        );
        let (loss, samples) = sweep.pass(batches, t, stop)?;
        losses.push(loss);
        if !threshold.admits(loss) {
            break;
        }
        sweep.add(samples)?;
        timesteps += 1;
    }
    progress.finish();
    Ok(Taylor {
        scores: sweep.scores(groups)?,
        timesteps,
        losses,
    })
}

/// The gradients on the way through the timesteps.
struct Sweep<'a, S, O> {
    config: &'a TaylorConfig,
    net: &'a S,
    objective: &'a O,
    variables: &'a [(String, Var)],
    pools: Lanes,
    /// Of one timestep, one for each lane.
    lanes: Vec<Gradients>,
    /// Σ_t ∂L_t/∂w of every variable.
    sums: Vec<Vec<f64>>,
}

impl<'a, S, O> Sweep<'a, S, O>
where
    S: BlockStack + Sync,
    O: TimestepObjective<S> + Sync,
    O::Batch: Sync,
{
    fn new(
        config: &'a TaylorConfig,
        net: &'a S,
        objective: &'a O,
        variables: &'a [(String, Var)],
    ) -> Result<Self> {
        let vars: Vec<&Var> = variables.iter().map(|(_, var)| var).collect();
        let lanes = (0..config.lanes.max(1)).map(|_| Gradients::new(&vars));
        Ok(Self {
            config,
            net,
            objective,
            variables,
            pools: Lanes::new(config.lanes)?.on(vars.first().map_or(&Device::Cpu, |v| v.device())),
            lanes: lanes.collect(),
            sums: vars.iter().map(|v| vec![0.0; v.elem_count()]).collect(),
        })
    }

    /// The mean loss at timestep `t` over all samples, and how many those are; leaves the gradients of the sum of
    /// their losses in the lanes. Batch i is of lane i mod lanes.
    fn pass(&mut self, batches: &[O::Batch], t: usize, stop: &Stop) -> Result<(f64, usize)> {
        let Self {
            config,
            net,
            objective,
            ..
        } = *self;
        let count = self.lanes.len();
        let lane = |(i, gradients): (usize, &mut Gradients)| -> Result<(f64, usize)> {
            gradients.clear();
            let (mut sum, mut samples) = (0.0, 0);
            for (k, batch) in batches.iter().enumerate().skip(i).step_by(count) {
                if stop.requested() {
                    return Err(Error::Stopped);
                }
                let mut rng = StepRng::new(config.seed, k as u64, stream::CRITERION);
                let draw = objective.draw_timestep(batch, t, &mut rng)?;
                let output = run(
                    net,
                    &objective.input(&draw)?,
                    &Plan::full(net.layout().depth()),
                )?
                .output;
                let losses = objective.loss(&objective.predict(net, output, &draw)?, &draw)?; // (B,)
                gradients.backward(&losses.sum_all()?)?;
                samples += losses.elem_count();
                sum += values_f64(&losses)?.0.iter().sum::<f64>();
            }
            Ok((sum, samples))
        };
        let parts = self
            .pools
            .run(self.lanes.iter_mut().enumerate().collect(), lane)?;
        let samples: usize = parts.iter().map(|(_, n)| n).sum();
        let loss = parts.iter().map(|(sum, _)| sum).sum::<f64>() / samples as f64;
        if !loss.is_finite() {
            return Err(Error::run(format!(
                "the loss at timestep {t} is {loss}: the weights or the samples hold values that are not finite or too large"
            )));
        }
        Ok((loss, samples))
    }

    /// Adds the gradients of the last pass, whose losses were summed over `samples`, to those of the timesteps before.
    fn add(&mut self, samples: usize) -> Result<()> {
        for lane in &mut self.lanes {
            for (sum, gradient) in self.sums.iter_mut().zip(lane.sums()?) {
                let (gradient, _) = values_f64(&gradient)?;
                for (sum, g) in sum.iter_mut().zip(gradient) {
                    *sum += g / samples as f64;
                }
            }
        }
        Ok(())
    }

    /// Σ |w·g| of every group.
    fn scores(self, groups: &[WidthGroups]) -> Result<Vec<Vec<f64>>> {
        let found: BTreeMap<&str, (&Var, &Vec<f64>)> = self
            .variables
            .iter()
            .zip(&self.sums)
            .map(|((name, var), sum)| (name.as_str(), (var, sum)))
            .collect();
        let product = |name: &str| {
            let (var, gradient) = found
                .get(name)
                .ok_or_else(|| Error::usage(format!("missing tensor `{name}`")))?;
            let (mut values, dims) = values_f64(var)?;
            for (w, g) in values.iter_mut().zip(gradient.iter()) {
                *w = (*w * g).abs();
                if !w.is_finite() {
                    return Err(Error::run(format!(
                        "the gradient of `{name}` is not finite: its importance cannot be told"
                    )));
                }
            }
            Ok((values, dims))
        };
        groups.iter().map(|g| g.sums(product)).collect()
    }
}
