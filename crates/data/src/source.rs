use tinyfusion_core::{LatentBatch, Result, StepRng};

/// A labelled set of images or latents, addressed by index.
///
/// A batch is on the CPU; the training loop moves it.
pub trait Source: Send + Sync {
    /// Number of samples; `None` for an endless source, which has a sample for every index.
    fn len(&self) -> Option<u64>;

    /// Whether there is no sample at all.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Number of classes; labels are in `0..classes`.
    fn classes(&self) -> usize;

    /// (C, H, W) of one sample.
    fn shape(&self) -> [usize; 3];

    /// The samples `indices`, as stored: x (B, C, H, W) f32, y (B,) u32.
    ///
    /// # Errors
    /// If an index is beyond [`len`](Self::len) or a sample cannot be read.
    fn batch(&self, indices: &[u64]) -> Result<LatentBatch>;

    /// The samples `indices` with the source's random augmentation, if it has one. The same `rng`
    /// gives the same result.
    fn augmented(&self, indices: &[u64], rng: &mut StepRng) -> Result<LatentBatch> {
        let _ = rng;
        self.batch(indices)
    }
}
