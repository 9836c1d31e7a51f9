use std::ops::Range;

use candle_core::{Tensor, Var};
use tinyfusion_core::{Error, Result};
use tinyfusion_nn::update::sum_of_squares;
use tinyfusion_nn::{Gradients, Lanes};

use crate::{StepLoss, Stop, TrainStep};

/// Gradients of a whole batch, in the order of the variables, with the batch's mean scalars.
pub(crate) struct BatchGradients {
    pub(crate) loss: f64,
    pub(crate) scalars: Vec<(&'static str, f64)>,
    /// Buffers that the next batch is written into.
    pub(crate) grads: Vec<Tensor>,
    /// Euclidean norm over all gradients together, before any clipping.
    pub(crate) norm: f64,
}

/// The mean loss and scalars of one piece, multiplied by its share of the batch.
struct Part {
    loss: f64,
    scalars: Vec<(&'static str, f64)>,
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
        let sums = (0..lanes.max(1))
            .map(|_| Ok(Gradients::new(vars)?))
            .collect::<Result<_>>()?;
        Ok(Self {
            lanes: Lanes::new(lanes)?,
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
        let mut whole: Option<Part> = None;
        for part in done.into_iter().flatten() {
            whole = Some(match whole {
                None => part,
                Some(sum) => add(sum, part)?,
            });
        }
        let Part { loss, scalars } = whole.ok_or_else(|| Error::run("an empty batch"))?;
        let Some((sum, others)) = self.sums.split_first_mut() else {
            return Err(Error::run("no lanes"));
        };
        for other in others {
            sum.add(other)?;
        }
        let grads = sum.sums()?;
        let mut squares = 0.0;
        for g in &grads {
            squares += sum_of_squares(g)?;
        }
        Ok(Some(BatchGradients {
            loss,
            scalars,
            grads,
            norm: squares.sqrt(),
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
            let StepLoss { loss, scalars } = step.loss(batch, rows.clone())?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            sums.backward(&(loss * share)?)?;
            let scalars = scalars.into_iter().map(|(n, s)| (n, s * share)).collect();
            Ok(Some(Part {
                loss: value * share,
                scalars,
            }))
        })
        .collect()
}

fn add(mut a: Part, b: Part) -> Result<Part> {
    if !a
        .scalars
        .iter()
        .map(|s| s.0)
        .eq(b.scalars.iter().map(|s| s.0))
    {
        return Err(Error::run(format!(
            "two micro-batches of one step report different scalars: {:?} and {:?}",
            a.scalars, b.scalars
        )));
    }
    a.loss += b.loss;
    for (x, y) in a.scalars.iter_mut().zip(b.scalars) {
        x.1 += y.1;
    }
    Ok(a)
}

#[cfg(test)]
mod tests;
