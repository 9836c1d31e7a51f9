use std::any::Any;
use std::ops::Range;

use candle_core::{Tensor, Var};
use rayon::{ThreadPool, ThreadPoolBuilder};
use tinyfusion_core::{Error, Result};
use tinyfusion_nn::Gradients;
use tinyfusion_nn::update::sum_of_squares;

use crate::{StepLoss, TrainStep};

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

/// Thread pools on which pieces of a batch run side by side, with buffers for their gradients.
///
/// Much of a small model's step is memory-bound single-threaded work inside candle, so two half batches on
/// two cores beat one whole batch that forks at every operation. Pieces are dealt out to *lanes*, each with its own
/// sums; how many lanes there are is a setting, and how many of them run at once is the machine's business, so the
/// result does not depend on the machine.
pub(crate) struct Workers {
    pools: Vec<ThreadPool>,
    lanes: Vec<Gradients>,
}

impl Workers {
    pub(crate) fn new(lanes: usize, vars: &[&Var]) -> Result<Self> {
        let cores = rayon::current_num_threads();
        let workers = lanes.clamp(1, cores);
        let pools = (0..workers)
            .map(|_| {
                ThreadPoolBuilder::new()
                    .num_threads((cores / workers).max(1))
                    // candle sorts the graph by recursion: deep networks need room.
                    .stack_size(64 << 20)
                    .build()
                    .map_err(|e| Error::run(format!("no worker threads: {e}")))
            })
            .collect::<Result<_>>()?;
        let lanes = (0..lanes.max(1))
            .map(|_| Ok(Gradients::new(vars)?))
            .collect::<Result<_>>()?;
        Ok(Self { pools, lanes })
    }

    /// Mean loss over all samples of `parts` and its gradients; piece i is of lane i mod lanes.
    pub(crate) fn run<T: TrainStep>(
        &mut self,
        step: &T,
        batch: &T::Batch,
        parts: &[Range<usize>],
    ) -> Result<BatchGradients> {
        let total = parts.iter().map(Range::len).sum::<usize>() as f64;
        let lanes = self.lanes.len();
        let mut done: Vec<Result<Vec<Part>>> = Vec::with_capacity(lanes);
        for (wave, sums) in self.lanes.chunks_mut(self.pools.len()).enumerate() {
            let first = wave * self.pools.len();
            done.extend(std::thread::scope(|scope| {
                let handles: Vec<_> = sums
                    .iter_mut()
                    .zip(&self.pools)
                    .enumerate()
                    .map(|(i, (sums, pool))| {
                        let own = parts.iter().skip(first + i).step_by(lanes);
                        scope.spawn(move || pool.install(|| lane(step, batch, own, total, sums)))
                    })
                    .collect();
                handles
                    .into_iter()
                    .map(|h| h.join().unwrap_or_else(|panic| Err(panicked(&*panic))))
                    .collect::<Vec<_>>()
            }));
        }
        let mut whole: Option<Part> = None;
        for part in done
            .into_iter()
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
        {
            whole = Some(match whole {
                None => part,
                Some(sum) => add(sum, part)?,
            });
        }
        let Part { loss, scalars } = whole.ok_or_else(|| Error::run("an empty batch"))?;
        let Some((sum, others)) = self.lanes.split_first_mut() else {
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
        Ok(BatchGradients {
            loss,
            scalars,
            grads,
            norm: squares.sqrt(),
        })
    }
}

/// The pieces of one lane, one after the other.
fn lane<'a, T: TrainStep>(
    step: &T,
    batch: &T::Batch,
    parts: impl Iterator<Item = &'a Range<usize>>,
    total: f64,
    sums: &mut Gradients,
) -> Result<Vec<Part>> {
    sums.clear();
    parts
        .map(|rows| {
            let share = rows.len() as f64 / total;
            let StepLoss { loss, scalars } = step.loss(batch, rows.clone())?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            sums.backward(&(loss * share)?)?;
            let scalars = scalars.into_iter().map(|(n, s)| (n, s * share)).collect();
            Ok(Part {
                loss: value * share,
                scalars,
            })
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

fn panicked(payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::run(format!("a worker thread panicked: {text}"))
}

#[cfg(test)]
mod tests;
