//! Features of the embedded classifier, for the experiment on `shapes`.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use tinyfusion::core::Error;
use tinyfusion::data::Source;
use tinyfusion::data::shapes::{Shapes, ShapesConfig, Split};
use tinyfusion::fid::Npz;
use tinyfusion::models::{Classifier, ClassifierConfig};
use tinyfusion::nn::Lanes;
use tinyfusion::train::Stop;

use super::{Given, Matrix};
use crate::classifier::accuracy;
use crate::model::load_classifier;
use crate::output::progress_bar;
use crate::training_data::{MOST_IMAGES, SHAPES_SEED};

/// Features of images, by the classifier in the folder `classifier`.
pub(super) fn features(
    reference: &str,
    samples: &Path,
    classifier: &Path,
    stop: &Stop,
) -> Result<Given> {
    let model = load_classifier(classifier)?;
    let judge = Judge {
        config: model.config,
        net: model.net,
        stop,
    };
    let reference = judge.features(&judge.reference(reference)?)?;
    let (images, labels) = judge.read_npz(samples)?;
    let samples = judge.features(&images)?;
    let logits = judge.net.logits(&samples)?; // (N, K)
    Ok(Given {
        accuracy: labels.map(|y| accuracy(&logits, &y)).transpose()?,
        reference: Matrix::of(&reference)?,
        samples: Matrix::of(&samples)?,
        logits: Some(Matrix::of(&logits)?),
        features: "shapes-classifier (not Inception)",
        classifier_sha256: Some(model.sha256),
    })
}

impl Matrix {
    fn of(t: &Tensor) -> Result<Self> {
        let (rows, columns) = t.dims2()?;
        Ok(Self {
            values: t.flatten_all()?.to_vec1()?,
            rows,
            columns,
        })
    }
}

struct Judge<'a> {
    config: ClassifierConfig,
    net: Classifier,
    stop: &'a Stop,
}

impl Judge<'_> {
    /// `shapes:N` or an .npz as (N, 3, H, W) in [−1, 1].
    fn reference(&self, text: &str) -> Result<Tensor> {
        let Some(count) = text.strip_prefix("shapes:") else {
            return Ok(self.read_npz(Path::new(text))?.0);
        };
        let count: u64 = count
            .parse()
            .ok()
            .filter(|n| (2..=MOST_IMAGES).contains(n))
            .ok_or_else(|| {
                Error::usage(format!(
                    "`{text}`: expected shapes:N with N from 2 to {MOST_IMAGES}"
                ))
            })?;
        let source = Shapes::new(ShapesConfig::default(), SHAPES_SEED, Split::HeldOut)?;
        let x = source.batch(&(0..count).collect::<Vec<_>>())?.x;
        // Through 8 bits, as the samples went.
        from_uint8(&tinyfusion::data::to_uint8(&x)?)
    }

    fn read_npz(&self, path: &Path) -> Result<(Tensor, Option<Tensor>)> {
        let mut file = Npz::open(path)?;
        let fail = |message| anyhow::Error::from(Error::file(path, message));
        let (n, size) = file.image_shape("arr_0")?;
        let side = self.config.input_size;
        if size != [side, side] {
            return Err(fail(format!(
                "arr_0 holds images of {size:?} (height, width), expected [{side}, {side}]"
            )));
        }
        let (_, bytes) = file.bytes("arr_0")?;
        let images = Tensor::from_vec(bytes, (n, side, side, 3), &Device::Cpu)?; // (N, H, W, 3)
        let labels = if file.has("arr_1") {
            let (shape, labels) = file.integers("arr_1")?;
            if shape != [n] {
                return Err(fail(format!(
                    "arr_1 is {shape:?}, expected one label per image"
                )));
            }
            let classes = self.config.num_classes as i64;
            if let Some(label) = labels.iter().find(|l| !(0..classes).contains(*l)) {
                return Err(fail(format!(
                    "arr_1 has the label {label}, expected 0 to {}",
                    classes - 1
                )));
            }
            Some(Tensor::from_vec(labels, n, &Device::Cpu)?)
        } else {
            None
        };
        let images = from_uint8(&images.permute((0, 3, 1, 2))?.contiguous()?)?; // (N, 3, H, W)
        Ok((images, labels))
    }

    /// (N, 3, H, W) → (N, D).
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        const BATCH: usize = 100;
        let n = images.dim(0)?;
        let progress = progress_bar("features", n as u64);
        let done = AtomicU64::new(0);
        let one = |start: usize| {
            if self.stop.requested() {
                return Err(Error::Stopped);
            }
            let rows = BATCH.min(n - start);
            let features = self.net.features(&images.narrow(0, start, rows)?)?; // (B, D)
            progress.set(
                done.fetch_add(rows as u64, Relaxed) + rows as u64,
                String::new(),
            );
            Ok(features)
        };
        let starts: Vec<usize> = (0..n).step_by(BATCH).collect();
        let parts = Lanes::new(starts.len())?.run(starts, one)?;
        progress.finish();
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// u8 → f32 in [−1, 1], the inverse of the samplers' quantisation: (v − 127.5)/127.5.
fn from_uint8(x: &Tensor) -> Result<Tensor> {
    Ok(((x.to_dtype(DType::F32)? - 127.5)? / 127.5)?)
}
