use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Result;
use candle_core::{DType, Tensor};
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::data::Source;
use tinyfusion::data::shapes::{Shapes, ShapesConfig, Split};
use tinyfusion::fid::{self, FeatureMatrix, Splits};
use tinyfusion::models::{Classifier, ClassifierConfig};
use tinyfusion::nn::Lanes;
use tinyfusion::train::Stop;

use crate::classifier::accuracy;
use crate::model::load_classifier;
use crate::output::{progress_bar, say};
use crate::training_data::{MOST_IMAGES, SHAPES_SEED};

/// Compare samples with a reference: Fréchet distance, IS, precision, recall, KID, accuracy.
///
/// With --classifier the features are those of the embedded classifier for `shapes`, not Inception's: the numbers
/// compare runs of the embedded experiment with each other and nothing else. With --features both files hold
/// feature vectors of any network already, and what the numbers mean is for you to say.
///
/// Examples:
///   tinyfusion evaluate shapes:2000 runs/images/samples.npz --classifier assets/classifier --json fid.json
///   tinyfusion evaluate reference-features.npz sample-features.npz --features
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// `shapes:N` (N held-out images) or an .npz with arr_0 (N, H, W, 3) uint8; with --features an .npz with arr_0
    /// (N, D) of floating-point numbers
    reference: String,
    /// .npz with arr_0 (N, H, W, 3) uint8 and, for the accuracy, arr_1 labels (N,); with --features arr_0 (N, D) and,
    /// for the Inception Score, arr_1 logits (N, K)
    samples: PathBuf,
    /// Model directory of the classifier whose features are compared
    #[arg(long, required_unless_present = "features")]
    classifier: Option<PathBuf>,
    /// Both files hold features, not images: no classifier is needed
    #[arg(long, conflicts_with = "classifier")]
    features: bool,
    /// Write the numbers here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    let given = match &args.classifier {
        Some(classifier) => by_classifier(args, classifier, stop)?,
        None => as_given(args)?,
    };
    let [a, b] = [&given.reference, &given.samples].map(Matrix::new);
    let (a, b) = (a?, b?);
    let logits = given.logits.as_ref().map(Matrix::new).transpose()?;
    let metrics = fid::evaluate(
        a.view()?,
        b.view()?,
        logits.as_ref().map(Matrix::view).transpose()?,
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
        "accuracy": given.accuracy,
        "features": given.features,
        "reference": args.reference,
        "samples": args.samples,
        "classifier": args.classifier,
        "classifier_sha256": given.classifier_sha256,
        "reference_count": a.rows,
        "sample_count": b.rows,
        "warnings": metrics.warnings,
    });
    if let Some(path) = &args.json {
        write_atomic(path, |f| f.write_all(format!("{report:#}\n").as_bytes()))?;
    }
    Ok(say!("{report:#}")?)
}

/// What is compared.
struct Given {
    reference: Tensor,      // (M, D)
    samples: Tensor,        // (N, D)
    logits: Option<Tensor>, // (N, K)
    accuracy: Option<f64>,
    /// Whose features they are.
    features: &'static str,
    classifier_sha256: Option<String>,
}

/// Features of images, by the classifier in the folder `classifier`.
fn by_classifier(args: &Args, classifier: &Path, stop: &Stop) -> Result<Given> {
    let model = load_classifier(classifier)?;
    let judge = Judge {
        config: model.config,
        net: model.net,
        stop,
    };
    let reference = judge.features(&judge.reference(&args.reference)?)?;
    let (images, labels) = judge.read_npz(&args.samples)?;
    let samples = judge.features(&images)?;
    let logits = judge.net.logits(&samples)?; // (N, K)
    Ok(Given {
        accuracy: labels.map(|y| accuracy(&logits, &y)).transpose()?,
        reference,
        samples,
        logits: Some(logits),
        features: "shapes-classifier (not Inception)",
        classifier_sha256: Some(model.sha256),
    })
}

/// Features that somebody else has computed.
fn as_given(args: &Args) -> Result<Given> {
    let samples = Npz::read(&args.samples)?;
    Ok(Given {
        reference: Npz::read(Path::new(&args.reference))?.matrix("arr_0")?,
        samples: samples.matrix("arr_0")?,
        logits: match samples.find("arr_1") {
            Some(_) => Some(samples.matrix("arr_1")?),
            None => None,
        },
        accuracy: None,
        features: "as given",
        classifier_sha256: None,
    })
}

/// The values of a tensor (N, D), for `fid`.
struct Matrix {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Matrix {
    fn new(t: &Tensor) -> Result<Self> {
        let (rows, columns) = t.dims2()?;
        Ok(Self {
            values: t.flatten_all()?.to_vec1()?,
            rows,
            columns,
        })
    }

    fn view(&self) -> Result<FeatureMatrix<'_>> {
        Ok(FeatureMatrix::new(&self.values, self.rows, self.columns)?)
    }
}

/// The arrays of an .npz.
struct Npz<'a> {
    path: &'a Path,
    arrays: Vec<(String, Tensor)>,
}

impl<'a> Npz<'a> {
    fn read(path: &'a Path) -> Result<Self> {
        let arrays = Tensor::read_npz(path)
            .map_err(|e| Error::file(path, format!("not a readable .npz: {e}")))?;
        Ok(Self { path, arrays })
    }

    fn fail(&self, message: String) -> anyhow::Error {
        Error::file(self.path, message).into()
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        let (_, array) = self.arrays.iter().find(|(n, _)| n == name)?;
        Some(array)
    }

    fn require(&self, name: &str) -> Result<&Tensor> {
        self.find(name)
            .ok_or_else(|| self.fail(format!("has no array `{name}`")))
    }

    /// Floating-point numbers (N, D), as f32.
    fn matrix(&self, name: &str) -> Result<Tensor> {
        let array = self.require(name)?;
        match array.dims() {
            [n, d] if *n > 0 && *d > 0 && array.dtype().is_float() => {
                Ok(array.to_dtype(DType::F32)?)
            }
            dims => Err(self.fail(format!(
                "{name} is {:?} {dims:?}, expected floating-point numbers (N, D)",
                array.dtype()
            ))),
        }
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
        let file = Npz::read(path)?;
        let fail = |message| file.fail(message);
        let images = file.require("arr_0")?;
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
        let labels = match file.find("arr_1") {
            Some(y) if y.dims() == [images.dim(0)?] => {
                let classes = self.config.num_classes as i64;
                let all = y.to_dtype(DType::I64)?.to_vec1::<i64>()?;
                if let Some(label) = all.iter().find(|l| !(0..classes).contains(*l)) {
                    return Err(fail(format!(
                        "arr_1 has the label {label}, expected 0 to {}",
                        classes - 1
                    )));
                }
                Some(y.clone())
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
