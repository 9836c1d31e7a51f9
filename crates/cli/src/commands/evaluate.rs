use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::data::Source;
use tinyfusion::data::shapes::{Shapes, ShapesConfig, Split};
use tinyfusion::fid::{self, FeatureMatrix, Splits};
use tinyfusion::models::{Classifier, ClassifierConfig};
use tinyfusion::train::{Progress, Stop};

use crate::classifier::accuracy;
use crate::model::load_classifier;
use crate::training_data::{MOST_IMAGES, SHAPES_SEED};

/// Compare samples with a reference: Fréchet distance, IS, precision, recall, KID, accuracy.
///
/// The features are those of the embedded classifier for `shapes`, not Inception's: the numbers compare runs of
/// the embedded experiment with each other and nothing else.
///
/// Example: tinyfusion evaluate shapes:2000 runs/images/samples.npz --classifier assets/classifier --json fid.json
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// `shapes:N` (N held-out images) or an .npz with arr_0 (N, H, W, 3) uint8
    reference: String,
    /// .npz with arr_0 (N, H, W, 3) uint8 and, for the accuracy, arr_1 labels (N,)
    samples: PathBuf,
    /// Model directory of the classifier whose features are compared
    #[arg(long)]
    classifier: PathBuf,
    /// Write the numbers here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    let (config, net) = load_classifier(&args.classifier)?;
    let judge = Judge { config, net, stop };
    let reference = judge.features(&judge.reference(&args.reference)?)?;
    let (images, labels) = judge.read_npz(&args.samples)?;
    let samples = judge.features(&images)?;
    let logits = judge.net.logits(&samples)?; // (N, K)
    let accuracy = labels.map(|y| accuracy(&logits, &y)).transpose()?;
    let [a, b, c] =
        [&reference, &samples, &logits].map(|t| t.flatten_all().and_then(|t| t.to_vec1::<f32>()));
    let (a, b, c) = (a?, b?, c?);
    let matrix = |values| {
        FeatureMatrix::new(values, samples.dim(0)?, samples.dim(1)?).map_err(anyhow::Error::from)
    };
    let metrics = fid::evaluate(
        FeatureMatrix::new(&a, reference.dim(0)?, reference.dim(1)?)?,
        matrix(&b)?,
        Some(FeatureMatrix::new(&c, logits.dim(0)?, logits.dim(1)?)?),
        // Samples come sorted by neither class nor quality; one split uses them all.
        &fid::Config {
            inception_score: Some(Splits::ADM),
            ..fid::Config::default()
        },
    )?;
    let report = json!({
        "fid": metrics.fid,
        "sfid": null,
        "inception_score": metrics.inception_score,
        "precision": metrics.precision,
        "recall": metrics.recall,
        "kid": metrics.kid,
        "kid_std": metrics.kid_std,
        "accuracy": accuracy,
        "features": "shapes-classifier (not Inception)",
        "reference_count": reference.dim(0)?,
        "sample_count": samples.dim(0)?,
        "warnings": metrics.warnings,
    });
    if let Some(path) = &args.json {
        write_atomic(path, |f| f.write_all(format!("{report:#}\n").as_bytes()))?;
    }
    println!("{report:#}");
    Ok(())
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
        let fail = |message: String| anyhow::Error::from(Error::file(path, message));
        let arrays =
            Tensor::read_npz(path).map_err(|e| fail(format!("not a readable .npz: {e}")))?;
        let find = |name: &str| {
            arrays
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, t)| t.clone())
        };
        let images = find("arr_0").ok_or_else(|| fail("has no array `arr_0`".into()))?;
        let side = self.config.input_size;
        match images.dims() {
            [n, h, w, 3] if *n > 0 && *h == side && *w == side && images.dtype() == DType::U8 => {}
            dims => {
                let dtype = images.dtype();
                return Err(fail(format!(
                    "arr_0 is {dtype:?} {dims:?}, expected uint8 (N, {side}, {side}, 3)"
                )));
            }
        }
        let labels = match find("arr_1") {
            Some(y) if y.dims() == [images.dim(0)?] => {
                let classes = self.config.num_classes as i64;
                let all = y.to_dtype(DType::I64)?.to_vec1::<i64>()?;
                if let Some(label) = all.iter().find(|l| !(0..classes).contains(*l)) {
                    return Err(fail(format!(
                        "arr_1 has the label {label}, expected 0 to {}",
                        classes - 1
                    )));
                }
                Some(y)
            }
            Some(y) => {
                return Err(fail(format!(
                    "arr_1 is {:?}, expected one label per image",
                    y.dims()
                )));
            }
            None => None,
        };
        let images = from_uint8(&images.permute((0, 3, 1, 2))?.contiguous()?)?; // (N, 3, H, W)
        Ok((images, labels))
    }

    /// (N, 3, H, W) → (N, D).
    fn features(&self, images: &Tensor) -> Result<Tensor> {
        const BATCH: usize = 100;
        let n = images.dim(0)?;
        let progress = Progress::new("features", n as u64);
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
        let parts: Vec<Tensor> = starts
            .par_iter()
            .map(|&s| one(s))
            .collect::<tinyfusion::core::Result<_>>()?;
        progress.finish();
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// u8 → f32 in [−1, 1], the inverse of the samplers' quantisation: (v − 127.5)/127.5.
fn from_uint8(x: &Tensor) -> Result<Tensor> {
    Ok(((x.to_dtype(DType::F32)? - 127.5)? / 127.5)?)
}
