use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use tinyfusion_core::{Error, Result};
use tinyfusion_nn::update::{Scale, clip_on_device, sum_of_squares};
use tinyfusion_nn::{Gradients, Lanes};

use crate::{StepLoss, Stop, TrainStep};

/// Gradients of a whole batch, in the order of the variables, with the batch's mean scalars.
pub(crate) struct BatchGradients {
    pub(crate) loss: Mean,
    pub(crate) scalars: Vec<(&'static str, Mean)>,
    /// Buffers that the next batch is written into.
    pub(crate) grads: Vec<Tensor>,
}

/// A mean over a batch: the scalars of its pieces, where they were computed, and the pieces' shares. It is read when it is
/// needed, for a GPU has to be waited for.
pub(crate) struct Mean(Vec<(Tensor, f64)>);

/// Gradients with their norm and the factor that clips it, which is NaN where the loss or the norm is not finite.
pub(crate) enum Clipped {
    /// On a CPU: the numbers.
    Known { norm: f64, scale: f64 },
    /// On a GPU: where they will be.
    There { norm: Tensor, scale: Tensor },
}

impl Mean {
    pub(crate) fn read(&self) -> Result<f64> {
        let mut mean = 0.0;
        for (value, share) in &self.0 {
            mean += share * value.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        }
        Ok(mean)
    }

    /// An f32 scalar, made where the pieces' are.
    fn tensor(&self) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (value, share) in &self.0 {
            let part = (value * *share)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        sum.ok_or_else(|| Error::run("an empty batch"))
    }
}

impl BatchGradients {
    /// PyTorch's `clip_grad_norm_`, over all gradients together.
    pub(crate) fn clipped(&self, clip: Option<f64>) -> Result<Clipped> {
        if self.grads.iter().any(|g| !g.device().is_cpu()) {
            let (norm, scale) = clip_on_device(&self.grads, &self.loss.tensor()?, clip)?;
            return Ok(match scale {
                Scale::Host(scale) => Clipped::Known {
                    norm: f64::from(norm.to_scalar::<f32>()?),
                    scale,
                },
                Scale::Device(scale) => Clipped::There { norm, scale },
            });
        }
        let mut squares = 0.0;
        for g in &self.grads {
            squares += sum_of_squares(g)?;
        }
        let norm = squares.sqrt();
        let scale = if self.loss.read()?.is_finite() && norm.is_finite() {
            clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0))
        } else {
            f64::NAN
        };
        Ok(Clipped::Known { norm, scale })
    }
}

impl Clipped {
    pub(crate) fn norm(&self) -> Result<f64> {
        match self {
            Self::Known { norm, .. } => Ok(*norm),
            Self::There { norm, .. } => Ok(f64::from(norm.to_scalar::<f32>()?)),
        }
    }

    pub(crate) fn scale(&self) -> Scale {
        match self {
            Self::Known { scale, .. } => Scale::Host(*scale),
            Self::There { scale, .. } => Scale::Device(scale.clone()),
        }
    }
}

/// The mean loss and scalars of one piece, and its share of the batch.
struct Part {
    loss: Tensor,
    scalars: Vec<(&'static str, Tensor)>,
    share: f64,
}

/// Pieces of a batch side by side, with buffers for their gradients.
///
/// Pieces are dealt out to *lanes*, each with its own sums. How many lanes there are is a setting, and how many of
/// them run at once is the machine's business, so the result does not depend on the machine.
pub(crate) struct Workers {
    lanes: Lanes,
    sums: Vec<Gradients>,
}

impl Workers {
    pub(crate) fn new(lanes: usize, vars: &[&Var]) -> Result<Self> {
        let sums = (0..lanes.max(1)).map(|_| Gradients::new(vars)).collect();
        Ok(Self {
            lanes: Lanes::new(lanes)?.on(vars.first().map_or(&Device::Cpu, |v| v.device())),
            sums,
        })
    }

    /// Mean loss over all samples of `parts` and its gradients; piece i is of lane i mod lanes. Nothing where `stop`
    /// was requested before the last piece began.
    pub(crate) fn run<T: TrainStep>(
        &mut self,
        step: &T,
        batch: &T::Batch,
        parts: &[Range<usize>],
        stop: &Stop,
    ) -> Result<Option<BatchGradients>> {
        let total = parts.iter().map(Range::len).sum::<usize>() as f64;
        let count = self.sums.len();
        let work = |(i, sums)| {
            lane(
                step,
                batch,
                parts.iter().skip(i).step_by(count),
                total,
                sums,
                stop,
            )
        };
        let done = self
            .lanes
            .run(self.sums.iter_mut().enumerate().collect(), work)?;
        let Some(done) = done.into_iter().collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let parts: Vec<Part> = done.into_iter().flatten().collect();
        let (loss, scalars) = means(&parts)?;
        let Some((sum, others)) = self.sums.split_first_mut() else {
            return Err(Error::run("no lanes"));
        };
        for other in others {
            sum.add(other)?;
        }
        Ok(Some(BatchGradients {
            loss,
            scalars,
            grads: sum.sums()?,
        }))
    }
}

/// The pieces of one lane, one after the other; nothing where `stop` was requested on the way.
fn lane<'a, T: TrainStep>(
    step: &T,
    batch: &T::Batch,
    parts: impl Iterator<Item = &'a Range<usize>>,
    total: f64,
    sums: &mut Gradients,
    stop: &Stop,
) -> Result<Option<Vec<Part>>> {
    sums.clear();
    parts
        .map(|rows| {
            if stop.requested() {
                return Ok(None);
            }
            let share = rows.len() as f64 / total;
            let StepLoss { loss, scalars } =
                Gradients::recording(|| step.loss(batch, rows.clone()))?;
            let value = loss.detach();
            sums.backward(&(loss * share)?)?;
            Ok(Some(Part {
                loss: value,
                scalars,
                share,
            }))
        })
        .collect()
}

/// The batch's means of what its pieces report, which must be the same things.
fn means(parts: &[Part]) -> Result<(Mean, Vec<(&'static str, Mean)>)> {
    let Some(first) = parts.first() else {
        return Err(Error::run("an empty batch"));
    };
    let names = |part: &Part| part.scalars.iter().map(|s| s.0).collect::<Vec<_>>();
    if let Some(odd) = parts.iter().find(|part| names(part) != names(first)) {
        return Err(Error::run(format!(
            "two micro-batches of one step report different scalars: {:?} and {:?}",
            names(first),
            names(odd)
        )));
    }
    let of = |pick: &dyn Fn(&Part) -> Tensor| {
        Mean(parts.iter().map(|part| (pick(part), part.share)).collect())
    };
    let scalars = names(first)
        .into_iter()
        .enumerate()
        .map(|(i, name)| (name, of(&|part| part.scalars[i].1.clone())))
        .collect();
    Ok((of(&|part| part.loss.clone()), scalars))
}

#[cfg(test)]
mod tests;
