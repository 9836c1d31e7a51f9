use serde::{Deserialize, Serialize};

use crate::{
    Error, FeatureMatrix, Frechet, Gaussian, InceptionScore, KidConfig, PrecisionRecallConfig,
    Result, Splits, Statistics, frechet_distance, inception_score, kid, precision_recall,
};

/// Below this many rows FID's upward bias dominates small differences (the usual advice for 2048 features).
const FEW_ROWS: u64 = 2048;

/// A negative distance beyond this is no rounding.
const NEGATIVE_FRECHET: f64 = -1e-3;

/// One side of a comparison: the reference, or the samples.
#[derive(Debug, Clone, Copy)]
pub enum Given<'a> {
    /// Feature vectors: everything can be computed.
    Features(FeatureMatrix<'a>),
    /// A mean and covariance: only the Fréchet distance can.
    Statistics(&'a Statistics),
    /// Both, as ADM's reference batches have them: the statistics (of the whole training set) for the
    /// Fréchet distance, the features (of 10,000 images) for the other metrics.
    Both {
        /// For the Fréchet distance.
        statistics: &'a Statistics,
        /// For precision, recall and KID.
        features: FeatureMatrix<'a>,
    },
}

impl<'a> From<FeatureMatrix<'a>> for Given<'a> {
    fn from(features: FeatureMatrix<'a>) -> Self {
        Self::Features(features)
    }
}

impl<'a> From<&'a Statistics> for Given<'a> {
    fn from(statistics: &'a Statistics) -> Self {
        Self::Statistics(statistics)
    }
}

/// Which metrics [`evaluate`] computes besides the Fréchet distance, and how. `None` leaves one out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Inception Score.
    pub inception_score: Option<Splits>,
    /// Precision and recall.
    pub precision_recall: Option<PrecisionRecallConfig>,
    /// KID; a subset larger than a set is an error (see [`Config::fitted`]).
    pub kid: Option<KidConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            inception_score: Some(Splits::ADM),
            precision_recall: Some(PrecisionRecallConfig::default()),
            kid: Some(KidConfig::default()),
        }
    }
}

impl Config {
    /// Whether a metric compares single rows of both sides, for which their statistics do not do.
    pub fn needs_rows(&self) -> bool {
        self.precision_recall.is_some() || self.kid.is_some()
    }
}

/// Every metric that `config` asks for is defined for so many rows (none of statistics) and, for the
/// Inception Score, with `logits`.
pub(crate) fn check_rows(
    config: &Config,
    reference: Option<usize>,
    samples: Option<usize>,
    logits: bool,
) -> Result<()> {
    for rows in [reference, samples].into_iter().flatten() {
        crate::frechet::check_rows(rows)?;
        if let (Some(_), Some(_), Some(settings)) = (reference, samples, &config.precision_recall) {
            crate::precision_recall::check(settings, rows)?;
        }
    }
    match (config.inception_score, samples) {
        (Some(splits), Some(samples)) if logits => splits.check(samples),
        _ => Ok(()),
    }
}

/// Reduces KID's subset to `rows` and says so, where it is larger.
pub(crate) fn kid_fitted(config: &mut Config, rows: usize) -> Option<String> {
    let settings = config.kid.as_mut().filter(|k| k.subset_size > rows)?;
    let wanted = std::mem::replace(&mut settings.subset_size, rows);
    Some(format!(
        "KID uses subsets of {rows} rows instead of {wanted}: there are no more on one side"
    ))
}

/// What [`evaluate`] found. A metric that was switched off or lacked its input is `None`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Metrics {
    /// Fréchet distance; "FID" only if the features are Inception's `pool_3`.
    pub fid: f64,
    /// Its parts: reference first, samples second.
    pub frechet: Frechet,
    /// Inception Score, mean over splits.
    pub inception_score: Option<f64>,
    /// Its population standard deviation over splits.
    pub inception_score_std: Option<f64>,
    /// Fraction of samples that lie among the reference.
    pub precision: Option<f64>,
    /// Fraction of the reference that lies among the samples.
    pub recall: Option<f64>,
    /// KID, mean over subsets.
    pub kid: Option<f64>,
    /// Its population standard deviation over subsets; `None` of a single one.
    pub kid_std: Option<f64>,
    /// Rows behind the reference of the Fréchet distance, where known.
    pub n_reference: Option<u64>,
    /// Reference rows of precision, recall and KID; 0 if there were only statistics.
    pub n_reference_features: u64,
    /// Samples behind the Fréchet distance, where known.
    pub n_samples: Option<u64>,
    /// Sample rows of the other metrics; 0 if there were only statistics.
    pub n_sample_features: u64,
    /// Dimension D of the features.
    pub columns: usize,
    /// The settings as used.
    pub config: Config,
    /// What to know before quoting a number.
    pub warnings: Vec<String>,
}

impl Metrics {
    /// "FID-50000" for 50,000 samples, "FID" where their number is not known: distances at different N do not compare.
    pub fn fid_label(&self) -> String {
        self.n_samples
            .map_or_else(|| "FID".to_owned(), |n| format!("FID-{n}"))
    }
}

/// All metrics of `samples` (N × D) against `reference`; `logits` (N × classes) of the same samples in the
/// order they were drawn give the Inception Score. Samples may be statistics too: then only the Fréchet distance is
/// there.
///
/// # Errors
/// When sizes do not fit together or a metric asked for is not defined for so few rows.
pub fn evaluate<'a>(
    reference: impl Into<Given<'a>>,
    samples: impl Into<Given<'a>>,
    logits: Option<FeatureMatrix<'_>>,
    config: &Config,
) -> Result<Metrics> {
    let (normal, features) = reference.into().parts()?;
    let (drawn, samples) = samples.into().parts()?;
    if let (Some(logits), Some(samples)) = (logits, samples)
        && logits.rows() != samples.rows()
    {
        return Err(Error::Mismatch {
            what: "rows of samples and of logits",
            first: samples.rows(),
            second: logits.rows(),
        });
    }
    let frechet = frechet_distance(&normal, &drawn)?;
    let rows = |side: Option<FeatureMatrix<'_>>| side.map_or(0, |side| side.rows() as u64);
    let mut metrics = Metrics {
        fid: frechet.distance,
        frechet,
        inception_score: None,
        inception_score_std: None,
        precision: None,
        recall: None,
        kid: None,
        kid_std: None,
        n_reference: normal.n(),
        n_reference_features: rows(features),
        n_samples: drawn.n(),
        n_sample_features: rows(samples),
        columns: normal.columns(),
        config: config.clone(),
        warnings: Vec::new(),
    };
    metrics.warn_about_frechet();

    match (config.inception_score, logits) {
        (Some(splits), Some(logits)) => {
            let InceptionScore { mean, std, scores } = inception_score(logits, &splits)?;
            metrics.inception_score = Some(mean);
            metrics.inception_score_std = Some(std);
            if matches!(splits, Splits::Adm { .. }) && scores.len() > 1 && looks_sorted(logits) {
                metrics.warn("the samples look sorted by class: each split of the Inception Score holds few classes, which lowers it; draw or shuffle them in random order".into());
            }
        }
        (Some(_), None) => metrics.warn("no logits were given: no Inception Score".into()),
        (None, _) => {}
    }

    let (Some(features), Some(samples)) = (features, samples) else {
        if config.needs_rows() {
            let side = if features.is_none() {
                "reference has"
            } else {
                "samples have"
            };
            metrics.warn(format!(
                "the {side} statistics but no features: no precision, recall and KID"
            ));
        }
        return Ok(metrics);
    };
    features.same_columns(&samples)?;
    if let Some(settings) = &config.precision_recall {
        let found = precision_recall(features, samples, settings)?;
        metrics.precision = Some(found.precision);
        metrics.recall = Some(found.recall);
    }
    if let Some(settings) = config.kid {
        // Samples first: torch-fidelity draws from its input 1, the generated set, first.
        let found = kid(samples, features, &settings)?;
        metrics.kid = Some(found.mean);
        metrics.kid_std = found.std;
    }
    Ok(metrics)
}

impl<'a> Given<'a> {
    /// For the Fréchet distance, and for the other metrics.
    fn parts(self) -> Result<(Gaussian, Option<FeatureMatrix<'a>>)> {
        Ok(match self {
            Self::Features(features) => (Gaussian::from_features(features)?, Some(features)),
            Self::Statistics(statistics) => (Gaussian::from_statistics(statistics)?, None),
            Self::Both {
                statistics,
                features,
            } => (Gaussian::from_statistics(statistics)?, Some(features)),
        })
    }
}

/// What to say of a Fréchet distance over `n` rows of `columns` features on the side called so, if anything.
pub fn few_rows_warning(side: &str, n: u64, columns: usize) -> Option<String> {
    let d = columns as u64;
    if n <= d {
        Some(format!(
            "{side}: {n} rows for {d} features: the covariance is rank-deficient and the Fréchet distance far too high; use at least {}, or KID",
            d + 1
        ))
    } else if n < FEW_ROWS {
        Some(format!(
            "{side}: {n} rows: the Fréchet distance is biased upwards; compare it only with others at the same N, or use KID"
        ))
    } else {
        None
    }
}

impl Metrics {
    fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    fn warn_about_frechet(&mut self) {
        for (side, n) in [("reference", self.n_reference), ("samples", self.n_samples)] {
            match n {
                Some(n) => self
                    .warnings
                    .extend(few_rows_warning(side, n, self.columns)),
                None => self.warn(format!(
                    "the {side} statistics do not say over how many images they were taken"
                )),
            }
        }
        if self.fid < NEGATIVE_FRECHET {
            self.warn(format!(
                "the Fréchet distance is {}, below zero beyond rounding: the stored covariance is damaged or not a covariance",
                self.fid
            ));
        }
    }
}

/// Whether neighbouring rows share their most likely class far more often than a random order would.
fn looks_sorted(logits: FeatureMatrix<'_>) -> bool {
    let classes: Vec<usize> = logits
        .iter()
        .map(|row| {
            row.iter().enumerate().fold(
                0,
                |best, (class, &z)| if z > row[best] { class } else { best },
            )
        })
        .collect();
    let mut counts = vec![0.0f64; logits.columns()];
    classes.iter().for_each(|&class| counts[class] += 1.0);
    let n = classes.len() as f64;
    let expected: f64 = counts.iter().map(|count| (count / n) * (count / n)).sum();
    let same =
        classes.windows(2).filter(|pair| pair[0] == pair[1]).count() as f64 / (n - 1.0).max(1.0);
    // Halfway between a random order and one where all neighbours agree.
    expected < 0.9 && same > 0.5 * (1.0 + expected)
}
