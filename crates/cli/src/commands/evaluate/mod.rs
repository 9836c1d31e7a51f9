mod classifier;
pub(super) mod inception;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{self, Config, FeatureMatrix, Npz, Splits};
use tinyfusion::train::Stop;

use crate::destination::check_destination;
use crate::hub::Inputs;
use crate::output::say;

/// Compare samples with a reference: FID, sFID, IS, precision, recall, KID.
///
/// With --weights the features are those of Inception-v3, and the numbers agree with ADM's evaluator and
/// torch-fidelity. The weights are the public file pt_inception-2015-12-05-6726825d.pth of pytorch-fid, as .pth or
/// .safetensors. The reference may hold statistics (mu, sigma, mu_s, sigma_s), images (arr_0), or both, as ADM's
/// batches do. Several samples are shards of one set, in the order given.
///
/// With --classifier the features are those of the embedded classifier for `shapes`, not Inception's: the numbers
/// compare runs of the embedded experiment with each other and nothing else. With --features both files hold
/// feature vectors of any network already, and what the numbers mean is for you to say.
///
/// Examples:
///   tinyfusion evaluate VIRTUAL_imagenet256_labeled.npz samples.npz --weights inception.pth --json fid.json
///   tinyfusion evaluate ref.npz images/ --weights inception.pth --metrics fid,is --cache runs/features
///   tinyfusion evaluate ref.npz part-0.npz part-1.npz --weights inception.pth
///   tinyfusion evaluate shapes:2000 runs/images/samples.npz --classifier assets/classifier --json fid.json
///   tinyfusion evaluate reference-features.npz sample-features.npz --features
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// An .npz with statistics or images, a folder of images, or a feature file (.safetensors); with --classifier
    /// also `shapes:N` (N held-out images); with --features an .npz with arr_0 (N, D) of floating-point numbers
    reference: String,
    /// .npz with arr_0 (N, H, W, 3) uint8, a folder of PNG, JPEG or WebP images, the folder of `tinyfusion sample`, or
    /// a feature file; with --classifier only an .npz, whose arr_1 may hold labels (N,); with --features arr_0 (N, D) and, for the
    /// Inception Score, arr_1 logits (N, K)
    #[arg(required = true)]
    samples: Vec<PathBuf>,
    /// Weight file of Inception-v3: .pth or .safetensors
    #[arg(long, value_name = "FILE", required_unless_present_any = ["features", "classifier"])]
    weights: Option<PathBuf>,
    /// Model directory of the classifier whose features are compared
    #[arg(long, conflicts_with = "weights")]
    classifier: Option<PathBuf>,
    /// Both files hold features, not images: no network is needed
    #[arg(long, conflicts_with_all = ["classifier", "weights"])]
    features: bool,
    /// What to compute besides the Fréchet distance
    /// [default: all that the features allow]
    #[arg(long, value_enum, value_delimiter = ',')]
    metrics: Vec<Metric>,
    /// Whose splits the Inception Score takes [default: adm]
    #[arg(long, value_enum)]
    splits: Option<SplitsOf>,
    /// Keep features of images here, and use them again while images and weights are the same
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["classifier", "features"])]
    cache: Option<PathBuf>,
    /// Compute also where the numbers mean nothing: with fewer than 1000 images
    #[arg(long, conflicts_with_all = ["classifier", "features"])]
    force: bool,
    /// Write the numbers here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A metric that can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Metric {
    /// Fréchet distance of the features (always computed)
    Fid,
    /// Fréchet distance of the spatial features (with --weights)
    Sfid,
    /// Inception Score
    Is,
    /// Precision and recall
    Pr,
    /// Kernel distance
    Kid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SplitsOf {
    /// 5000 samples each, in file order
    Adm,
    /// Ten, shuffled
    TorchFidelity,
}

impl Args {
    /// What the flags ask for.
    fn config(&self) -> Config {
        let splits = match self.splits {
            None | Some(SplitsOf::Adm) => Splits::ADM,
            Some(SplitsOf::TorchFidelity) => Splits::FIDELITY,
        };
        Config {
            inception_score: self.wants(Metric::Is).then_some(splits),
            precision_recall: self
                .wants(Metric::Pr)
                .then(fid::PrecisionRecallConfig::default),
            kid: self.wants(Metric::Kid).then(fid::KidConfig::default),
        }
    }

    /// Whether `metric` was asked for, by name or as one of all.
    fn wants(&self, metric: Metric) -> bool {
        self.metrics.is_empty() || self.metrics.contains(&metric)
    }

    /// Nothing was asked for that would be left out in silence, and the result can be written.
    fn check(&self) -> Result<()> {
        if self.weights.is_none() {
            self.one_sample_file()?;
            if self.metrics.contains(&Metric::Sfid) {
                return Err(Error::usage(
                    "--metrics sfid: the spatial features of sFID are Inception's; they need --weights",
                )
                .into());
            }
        }
        if self.splits.is_some() && !self.wants(Metric::Is) {
            return Err(Error::usage(
                "--splits: they are the Inception Score's, which --metrics leaves out; add `is` there or leave --splits out",
            )
            .into());
        }
        if let Some(path) = &self.json {
            let read = self.samples.iter().chain(&self.weights);
            let read = read.map(PathBuf::as_path);
            check_destination("--json", path, read.chain([Path::new(&self.reference)]))?;
        }
        Ok(())
    }

    /// `samples` have no logits: nothing that needs them was asked for by name.
    fn check_without_logits(&self, samples: &Path) -> Result<()> {
        let flag = match self.splits {
            Some(_) => "--splits",
            None if self.metrics.contains(&Metric::Is) => "--metrics is",
            None => return Ok(()),
        };
        Err(Error::usage(format!(
            "{flag}: the Inception Score needs the samples' logits, and {} has no arr_1 (N, K); add it or leave {flag} out",
            samples.display()
        ))
        .into())
    }

    fn one_sample_file(&self) -> Result<&Path> {
        match &self.samples[..] {
            [one] => Ok(one),
            _ => Err(Error::usage(format!(
                "{} sample files: shards are put together with --weights only",
                self.samples.len()
            ))
            .into()),
        }
    }
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.reference])
            .and(&mut self.samples)
            .and(&mut self.weights)
            .and(&mut self.classifier)
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    args.check()?;
    let report = match (&args.weights, &args.classifier) {
        (Some(weights), _) => {
            let settings = inception::Settings {
                reference: Path::new(&args.reference),
                samples: &args.samples,
                weights,
                cache: args.cache.as_deref(),
                options: fid::Options {
                    sfid: args.wants(Metric::Sfid),
                    config: args.config(),
                    force: args.force,
                },
            };
            inception::report(&settings, stop)?
        }
        (None, Some(folder)) => {
            let samples = args.one_sample_file()?;
            let given = classifier::features(&args.reference, samples, folder, stop)?;
            compared(args, &given)?
        }
        (None, None) => compared(args, &as_given(args)?)?,
    };
    if let Some(path) = &args.json {
        write_atomic(path, |f| f.write_all(format!("{report:#}\n").as_bytes()))?;
    }
    Ok(say!("{report:#}")?)
}

/// The metrics of features that are in memory.
fn compared(args: &Args, given: &Given) -> Result<Value> {
    let (a, b) = (given.reference.view()?, given.samples.view()?);
    let logits = given.logits.as_ref().map(Matrix::view).transpose()?;
    let metrics = fid::evaluate(a, b, logits, &args.config())?;
    Ok(json!({
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
        "samples": args.one_sample_file()?,
        "classifier": args.classifier,
        "classifier_sha256": given.classifier_sha256,
        "reference_count": a.rows(),
        "sample_count": b.rows(),
        "warnings": metrics.warnings,
    }))
}

/// What is compared.
struct Given {
    reference: Matrix,      // (M, D)
    samples: Matrix,        // (N, D)
    logits: Option<Matrix>, // (N, K)
    accuracy: Option<f64>,
    /// Whose features they are.
    features: &'static str,
    classifier_sha256: Option<String>,
}

/// Features that somebody else has computed.
fn as_given(args: &Args) -> Result<Given> {
    let path = args.one_sample_file()?;
    let mut samples = Npz::open(path)?;
    if !samples.has("arr_1") {
        args.check_without_logits(path)?;
    }
    Ok(Given {
        reference: Matrix::read(&mut Npz::open(&args.reference)?, "arr_0")?,
        samples: Matrix::read(&mut samples, "arr_0")?,
        logits: match samples.has("arr_1") {
            true => Some(Matrix::read(&mut samples, "arr_1")?),
            false => None,
        },
        accuracy: None,
        features: "as given",
        classifier_sha256: None,
    })
}

/// Values (N, D), for `fid`.
struct Matrix {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Matrix {
    /// Floating-point numbers (N, D), as f32.
    fn read(file: &mut Npz, name: &str) -> Result<Self> {
        let (shape, values) = file.floats(name)?;
        match shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => Ok(Self {
                values: values.into_iter().map(|v| v as f32).collect(),
                rows,
                columns,
            }),
            _ => Err(Error::file(
                file.path(),
                format!("{name} is {shape:?}, expected floating-point numbers (N, D)"),
            )
            .into()),
        }
    }

    fn view(&self) -> Result<FeatureMatrix<'_>> {
        Ok(FeatureMatrix::new(&self.values, self.rows, self.columns)?)
    }
}
