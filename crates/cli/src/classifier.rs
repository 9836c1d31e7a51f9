use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use tinyfusion::core::{LatentBatch, StateDict, StepRng, stream};
use tinyfusion::data::shapes::{Shapes, ShapesConfig, Split};
use tinyfusion::data::{Loader, Source};
use tinyfusion::models::{Classifier, ClassifierConfig};
use tinyfusion::train::{
    FitConfig, LrSchedule, Outcome, ParamGroup, RunDir, StepLoss, Stop, TrainStep, fit,
};

use crate::output::progress_bar;
use crate::training_data::SHAPES_SEED;

/// Trains the classifier that judges `shapes` from nothing.
pub(crate) fn train(
    config: &ClassifierConfig,
    seed: u64,
    lr: LrSchedule,
    fit_config: &FitConfig,
    dir: &RunDir,
    stop: &Stop,
) -> Result<Outcome> {
    let source = Shapes::new(ShapesConfig::default(), SHAPES_SEED, Split::Train)?;
    let mut weights = config.init(seed, &Device::Cpu)?;
    let group = ParamGroup::new("classifier", lr, weights.make_trainable(|_| true)?)?;
    let step = Classify {
        net: Classifier::new(config, &weights)?,
        loader: Mutex::new(Loader::new(Arc::new(source), seed, fit_config.batch_size)?),
        seed,
    };
    let progress = progress_bar("classifier", fit_config.steps);
    Ok(fit(fit_config, &step, &[group], dir, stop, &progress)?)
}

/// Share of 4,000 held-out images that are taken for their class.
pub(crate) fn held_out_accuracy(config: &ClassifierConfig, weights: &StateDict) -> Result<f64> {
    const IMAGES: u64 = 4000;
    const BATCH: u64 = 500;
    let net = Classifier::new(config, weights)?;
    let source = Shapes::new(ShapesConfig::default(), SHAPES_SEED, Split::HeldOut)?;
    let mut right = 0f64;
    let progress = progress_bar("accuracy", IMAGES);
    for start in (0..IMAGES).step_by(BATCH as usize) {
        progress.set(start, String::new());
        let batch = source.batch(&(start..start + BATCH).collect::<Vec<_>>())?;
        right += accuracy(&net.logits(&net.features(&batch.x)?)?, &batch.y)? * BATCH as f64;
    }
    progress.finish();
    Ok(right / IMAGES as f64)
}

/// Share of rows of `logits` (N, K) whose largest value is at the label (N,).
pub(crate) fn accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let found = logits.argmax(D::Minus1)?.to_dtype(DType::I64)?; // (N,)
    let right = found
        .eq(&labels.to_dtype(DType::I64)?)?
        .to_dtype(DType::F32)?
        .mean_all()?;
    Ok(f64::from(right.to_scalar::<f32>()?))
}

struct Classify {
    net: Classifier,
    loader: Mutex<Loader>,
    seed: u64,
}

/// Largest standard deviation of the noise added to training images: the features then do not hinge on
/// the last bit of a pixel, which no sampler gets right.
const AUGMENT_NOISE: f64 = 0.1;

impl TrainStep for Classify {
    type Batch = LatentBatch;

    fn draw(&self, step: u64) -> tinyfusion::core::Result<LatentBatch> {
        let LatentBatch { x, y } = self
            .loader
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .batch(step)?;
        let mut rng = StepRng::new(self.seed, step, stream::DRAW);
        let levels: Vec<f32> = rng
            .uniform(x.dim(0)?)
            .into_iter()
            .map(|u| (u * AUGMENT_NOISE) as f32)
            .collect();
        let levels = Tensor::new(levels, x.device())?.reshape(((), 1, 1, 1))?; // (B, 1, 1, 1)
        let noise = rng
            .normal(x.shape().clone(), x.device())?
            .broadcast_mul(&levels)?;
        Ok(LatentBatch { x: (x + noise)?, y })
    }

    fn loss(&self, batch: &LatentBatch, rows: Range<usize>) -> tinyfusion::core::Result<StepLoss> {
        let x = batch.x.narrow(0, rows.start, rows.len())?;
        let y = batch.y.narrow(0, rows.start, rows.len())?;
        let logits = self.net.logits(&self.net.features(&x)?)?; // (B, K)
        // Composed of differentiable operations, unlike candle's softmax over the last axis.
        let log_p = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
        let loss = log_p.gather(&y.unsqueeze(1)?, 1)?.mean_all()?.neg()?;
        Ok(StepLoss {
            loss,
            scalars: Vec::new(),
        })
    }
}
