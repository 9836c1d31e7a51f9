mod classifier;
mod inception;
pub(super) mod network;

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
/// With --weights the features are those of Inception-v3, computed as ADM's evaluator and torch-fidelity do. Every stage
/// was checked against what those tools (or PyTorch, scipy, numpy) make of the same inputs and of weights that are a
/// formula; the public weights were not available, so no published number has been reproduced yet. The weights are the
/// public file pt_inception-2015-12-05-6726825d.pth of pytorch-fid, as .pth or .safetensors. Either side may hold
/// statistics (mu, sigma, mu_s, sigma_s), images (arr_0), or both, as ADM's batches do: FID and sFID are then of the
/// statistics, the other metrics of the images. Several samples are shards of one set, in the order given.
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
    /// .npz with arr_0 (N, H, W, 3) uint8 or mu and sigma, a folder of PNG, JPEG or WebP images, the folder of `tinyfusion sample`, or
    /// a feature file; with --classifier only an .npz, whose arr_1 may hold labels (N,); with --features arr_0 (N, D) and, for the
    /// Inception Score, arr_1 logits (N, K)
    #[arg(required = true)]
    samples: Vec<PathBuf>,
    /// Weight file of Inception-v3: .pth or .safetensors; also hub://owner/repo/file
    #[arg(long, value_name = "FILE", required_unless_present_any = ["features", "classifier"])]
    weights: Option<PathBuf>,
    /// Model directory of the classifier whose features are compared
    #[arg(long, conflicts_with = "weights")]
    classifier: Option<PathBuf>,
    /// Both files hold features, not images: no network is needed
    #[arg(long, conflicts_with_all = ["classifier", "weights"])]
    features: bool,
    /// What to compute besides the Fréchet distance; what is named and cannot be computed is an error
    /// [default: all that the features allow]
    #[arg(long, value_enum, value_delimiter = ',')]
    metrics: Vec<Metric>,
    /// Whose splits the Inception Score takes [default: adm]
    #[arg(long, value_enum)]
    splits: Option<SplitsOf>,
    /// Rows of each subset of KID, at most as many as there are images [default: 1000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    kid_subset: Option<u32>,
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
            kid: self.wants(Metric::Kid).then(|| {
                let usual = fid::KidConfig::default();
                fid::KidConfig {
                    subset_size: self.kid_subset.map_or(usual.subset_size, |n| n as usize),
                    ..usual
                }
            }),
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
        let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
        let mut shards: Vec<PathBuf> = self.samples.iter().map(real).collect();
        shards.sort();
        if let Some(twice) = shards.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::usage(format!(
                "{} is given twice; every shard of a set counts once",
                twice[0].display()
            ))
            .into());
        }
        if self.splits.is_some() && !self.wants(Metric::Is) {
            return Err(Error::usage(
                "--splits: they are the Inception Score's, which --metrics leaves out; add `is` there or leave --splits out",
            )
            .into());
        }
        if self.kid_subset.is_some() && !self.wants(Metric::Kid) {
            return Err(Error::usage(
                "--kid-subset: it is KID's, which --metrics leaves out; add `kid` there or leave --kid-subset out",
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

    /// The settings for so many rows: KID that was named is as it was asked for, and else as the rows allow.
    fn kid_fits(&self, rows: usize) -> Result<(Config, Option<String>)> {
        let config = self.config();
        match config.kid {
            Some(kid) if self.metrics.contains(&Metric::Kid) && kid.subset_size > rows => {
                Err(Error::usage(format!(
                    "--metrics kid: its subsets have {} rows, and one side has only {rows}; give --kid-subset N or more rows",
                    kid.subset_size
                ))
                .into())
            }
            _ => Ok(config.fitted(rows)),
        }
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
                    named: !args.metrics.is_empty(),
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
    let (config, reduced) = args.kid_fits(a.rows().min(b.rows()))?;
    let mut metrics = fid::evaluate(a, b, logits, &config)?;
    metrics.warnings.extend(reduced);
    network::warn(&metrics.warnings);
    let mut report = scores(&metrics);
    report.extend([
        ("sfid".into(), Value::Null),
        ("accuracy".into(), json!(given.accuracy)),
        ("features".into(), json!(given.features)),
        ("reference".into(), json!(args.reference)),
        ("samples".into(), json!(args.one_sample_file()?)),
        ("classifier".into(), json!(args.classifier)),
        ("classifier_sha256".into(), json!(given.classifier_sha256)),
        ("warnings".into(), json!(metrics.warnings)),
    ]);
    Ok(Value::Object(report))
}

/// What every report says of the metrics.
fn scores(m: &fid::Metrics) -> serde_json::Map<String, Value> {
    serde_json::Map::from_iter([
        ("fid".into(), json!(m.fid)),
        ("inception_score".into(), json!(m.inception_score)),
        ("inception_score_std".into(), json!(m.inception_score_std)),
        ("precision".into(), json!(m.precision)),
        ("recall".into(), json!(m.recall)),
        ("kid".into(), json!(m.kid)),
        ("kid_std".into(), json!(m.kid_std)),
        ("label".into(), json!(m.fid_label())),
        ("frechet".into(), json!(m.frechet)),
        ("config".into(), json!(m.config)),
        ("reference_count".into(), json!(m.n_reference)),
        (
            "reference_image_count".into(),
            json!(m.n_reference_features),
        ),
        ("sample_count".into(), json!(m.n_samples)),
        ("sample_image_count".into(), json!(m.n_sample_features)),
    ])
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
        let (values, [rows, columns]) = file.matrix(name)?;
        Ok(Self {
            values,
            rows,
            columns,
        })
    }

    fn view(&self) -> Result<FeatureMatrix<'_>> {
        Ok(FeatureMatrix::new(&self.values, self.rows, self.columns)?)
    }
}
