use std::any::Any;
use std::ops::Range;

use candle_core::{Tensor, Var};
use rayon::{ThreadPool, ThreadPoolBuilder};
use tinyfusion_core::{Error, Result};
use tinyfusion_nn::update::sum_of_squares;

use crate::{StepLoss, TrainStep};

/// Gradients of a whole batch, in the order of the variables, with the batch's mean scalars.
pub(crate) struct BatchGradients {
    pub(crate) loss: f64,
    pub(crate) scalars: Vec<(&'static str, f64)>,
    pub(crate) grads: Vec<Tensor>,
    /// Euclidean norm over all gradients together, before any clipping.
    pub(crate) norm: f64,
}

/// What one micro-batch adds: everything is already multiplied by its share of the batch.
struct Part {
    loss: f64,
    scalars: Vec<(&'static str, f64)>,
    grads: Vec<Tensor>,
}

/// Thread pools on which micro-batches run side by side.
///
/// Much of a small model's step is memory-bound single-threaded work inside candle, so two half batches on
/// two cores beat one whole batch that forks at every operation. The sum is taken in the order of the
/// micro-batches, so the result does not depend on how many run at once.
pub(crate) struct Workers {
    pools: Vec<ThreadPool>,
}

impl Workers {
    pub(crate) fn new(micro_batches: usize) -> Result<Self> {
        let cores = rayon::current_num_threads();
        let workers = micro_batches.clamp(1, cores);
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
        Ok(Self { pools })
    }

    /// Mean loss over all samples of `parts` and its gradients, one micro-batch per entry of `parts`.
    pub(crate) fn run<T: TrainStep>(
        &self,
        step: &T,
        batch: &T::Batch,
        parts: &[Range<usize>],
        vars: &[&Var],
    ) -> Result<BatchGradients> {
        let total = parts.iter().map(Range::len).sum::<usize>() as f64;
        let mut sum: Option<Part> = None;
        for wave in parts.chunks(self.pools.len()) {
            let results: Vec<Result<Part>> = std::thread::scope(|scope| {
                let handles: Vec<_> = wave
                    .iter()
                    .zip(&self.pools)
                    .map(|(rows, pool)| {
                        let share = rows.len() as f64 / total;
                        scope.spawn(move || {
                            pool.install(|| part(step, batch, rows.clone(), share, vars))
                        })
                    })
                    .collect();
                handles
                    .into_iter()
                    .map(|h| h.join().unwrap_or_else(|panic| Err(panicked(&*panic))))
                    .collect()
            });
            for result in results {
                sum = Some(match sum {
                    None => result?,
                    Some(sum) => add(sum, result?)?,
                });
            }
        }
        let Part {
            loss,
            scalars,
            grads,
        } = sum.ok_or_else(|| Error::run("an empty batch"))?;
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

fn part<T: TrainStep>(
    step: &T,
    batch: &T::Batch,
    rows: Range<usize>,
    share: f64,
    vars: &[&Var],
) -> Result<Part> {
    let StepLoss { loss, scalars } = step.loss(batch, rows)?;
    let value = f64::from(loss.to_scalar::<f32>()?);
    let mut store = (loss * share)?.backward()?;
    let grads = vars
        .iter()
        .map(|v| {
            Ok(match store.remove(v.as_tensor()) {
                Some(g) => g,
                // Nothing of this micro-batch reached it, as with a gate that dropped a block in every row.
                None => v.zeros_like()?,
            })
        })
        .collect::<Result<_>>()?;
    let scalars = scalars.into_iter().map(|(n, s)| (n, s * share)).collect();
    Ok(Part {
        loss: value * share,
        scalars,
        grads,
    })
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
    a.grads = a
        .grads
        .iter()
        .zip(&b.grads)
        .map(|(x, y)| Ok((x + y)?))
        .collect::<Result<_>>()?;
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
