use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, LatentBatch, Result, StepRng};

/// How often labels are replaced by the null class, so that one network learns both halves of
/// classifier-free guidance (Ho & Salimans, 2207.12598).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelDrop {
    /// Number of classes, which is also the id of the null class.
    pub num_classes: u32,
    /// Probability that a label is dropped; 0.1 for DiT and SiT.
    pub probability: f64,
}

impl LabelDrop {
    /// Checks that the probability is one.
    pub(crate) fn validate(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.probability) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "the probability of dropping a label must be in [0, 1], found {}",
            self.probability
        )))
    }

    /// Which of the labels of some samples are dropped: one uniform number is drawn for each.
    pub(crate) fn coins(&self, samples: usize, rng: &mut StepRng) -> Vec<bool> {
        let coins = rng.uniform(samples).into_iter();
        coins.map(|u| u < self.probability).collect()
    }

    /// The batch with some labels, by [`coins`](Self::coins), replaced by the null class.
    pub(crate) fn drop_from(&self, batch: &LatentBatch, rng: &mut StepRng) -> Result<LatentBatch> {
        self.replaced(batch, &self.coins(batch.x.dim(0)?, rng))
    }

    /// The batch with the labels of the samples in `dropped` replaced by the null class.
    pub(crate) fn replaced(&self, batch: &LatentBatch, dropped: &[bool]) -> Result<LatentBatch> {
        let mut y = batch.y.to_vec1::<u32>()?;
        for (label, _) in y.iter_mut().zip(dropped).filter(|(_, d)| **d) {
            *label = self.num_classes;
        }
        Ok(LatentBatch {
            x: batch.x.clone(),
            y: Tensor::new(y, &Device::Cpu)?, // (B,), where it is read
        })
    }

    /// Checks that there is one existing class, or the null class, for each sample.
    pub(crate) fn check(&self, batch: &LatentBatch) -> Result<()> {
        let (samples, y) = (batch.x.dim(0)?, batch.y.to_vec1::<u32>()?);
        if y.len() != samples {
            return Err(Error::usage(format!(
                "a batch of {samples} samples came with {} labels",
                y.len()
            )));
        }
        match y.iter().find(|&&label| label > self.num_classes) {
            None => Ok(()),
            Some(label) => Err(Error::usage(format!(
                "class {label} does not exist: the objective knows classes 0..{}",
                self.num_classes
            ))),
        }
    }
}
