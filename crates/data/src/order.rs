use std::sync::Arc;

use tinyfusion_core::{Error, LatentBatch, Result, StepRng, stream};

use crate::Source;

/// Which samples a training step sees: a function of the seed and the step alone.
///
/// A finite source is passed epoch by epoch, each in its own random order; batches run across the
/// border of two epochs. An endless source gives fresh samples: step k sees k·B, …, k·B + B − 1.
#[derive(Debug, Clone)]
pub struct Order {
    len: Option<u64>,
    seed: u64,
    /// The epoch drawn last: shuffling a million indices for every batch would cost more than a step.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order of `len` samples (`None`: endless) under `seed`; an error if there are none.
    pub fn new(len: Option<u64>, seed: u64) -> Result<Self> {
        if len == Some(0) {
            return Err(Error::usage(
                "the data set holds no samples; there is nothing to draw batches from",
            ));
        }
        Ok(Self {
            len,
            seed,
            epoch: None,
        })
    }

    /// The samples of step `step` (from 0) when every step takes `batch_size`.
    pub fn batch_indices(&mut self, step: u64, batch_size: usize) -> Result<Vec<u64>> {
        if batch_size == 0 {
            return Err(Error::usage("batch_size = 0, expected at least 1"));
        }
        let size = batch_size as u64;
        let first = step
            .checked_mul(size)
            .filter(|f| f.checked_add(size).is_some())
            .ok_or_else(|| {
                Error::usage(format!(
                    "step {step} at batch size {batch_size} is beyond 2^64 samples"
                ))
            })?;
        let Some(len) = self.len else {
            return Ok((first..first + size).collect());
        };
        let mut indices = Vec::with_capacity(batch_size);
        let mut position = first;
        while position < first + size {
            let (epoch, from) = (position / len, position % len);
            let take = (first + size - position).min(len - from);
            let order = self.epoch(epoch, len)?;
            indices.extend(
                order[from as usize..(from + take) as usize]
                    .iter()
                    .map(|&i| i as u64),
            );
            position += take;
        }
        Ok(indices)
    }

    fn epoch(&mut self, epoch: u64, len: u64) -> Result<&[usize]> {
        if self.epoch.as_ref().is_none_or(|(drawn, _)| *drawn != epoch) {
            let n = usize::try_from(len).map_err(|_| {
                Error::usage(format!(
                    "{len} samples do not fit this machine's address space"
                ))
            })?;
            self.epoch = None; // frees the old order before the new one is made
            self.epoch = Some((
                epoch,
                StepRng::new(self.seed, epoch, stream::ORDER).permutation(n),
            ));
        }
        Ok(self.epoch.as_ref().map_or(&[], |(_, order)| order))
    }
}

/// The samples of one step, without keeping the epoch's order: see [`Order`], which a loop should
/// use instead.
pub fn batch_indices(
    len: Option<u64>,
    seed: u64,
    step: u64,
    batch_size: usize,
) -> Result<Vec<u64>> {
    Order::new(len, seed)?.batch_indices(step, batch_size)
}

/// Batches of a [`Source`] by training step: a run resumed at step k gets what an unbroken run
/// would have got.
#[derive(Clone)]
pub struct Loader {
    source: Arc<dyn Source>,
    order: Order,
    seed: u64,
    batch_size: usize,
}

impl Loader {
    /// Batches of `batch_size` in the order of `seed`.
    pub fn new(source: Arc<dyn Source>, seed: u64, batch_size: usize) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::usage("batch_size = 0, expected at least 1"));
        }
        let order = Order::new(source.len(), seed)?;
        Ok(Self {
            source,
            order,
            seed,
            batch_size,
        })
    }

    /// What is loaded from.
    pub fn source(&self) -> &dyn Source {
        self.source.as_ref()
    }

    /// The batch of step `step` (from 0), augmented, on the CPU: x (B, C, H, W) f32, y (B,) u32.
    pub fn batch(&mut self, step: u64) -> Result<LatentBatch> {
        let indices = self.order.batch_indices(step, self.batch_size)?;
        self.source.augmented(
            &indices,
            &mut StepRng::new(self.seed, step, stream::AUGMENT),
        )
    }
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader")
            .field("len", &self.source.len())
            .field("seed", &self.seed)
            .field("batch_size", &self.batch_size)
            .finish()
    }
}

#[cfg(test)]
mod tests;
