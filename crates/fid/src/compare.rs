use serde::Serialize;

use crate::{
    Config, Error, FeatureSet, Gaussian, ImageFeatures, Metrics, Provenance, Reference, Result,
    Splits, StoredStatistics, evaluate, frechet_distance,
};

/// Fewer samples than this are refused: the bias of an FID over 2048 features is then many times what it measures.
pub const FEWEST: usize = 1000;

/// Samples behind published numbers; at other counts FID has another bias.
pub const PROTOCOL: usize = 50_000;

/// What samples are compared with: statistics, features, or (ADM's reference batches) both, then of different images.
#[derive(Debug, Clone, Default)]
pub struct ReferenceSet {
    /// For FID and sFID, where there are any.
    pub statistics: Option<StoredStatistics>,
    /// For precision, recall and KID; without statistics also for FID and sFID.
    pub features: Option<FeatureSet>,
}

/// What [`compare`] computes besides FID.
#[derive(Debug, Clone)]
pub struct Options {
    /// sFID.
    pub sfid: bool,
    /// The other metrics.
    pub config: Config,
    /// Whether too few samples are warned of instead of refused.
    pub force: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sfid: true,
            config: Config::default(),
            force: false,
        }
    }
}

/// What [`compare`] found.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// FID, IS, precision, recall, KID, and all warnings.
    pub metrics: Metrics,
    /// sFID; `None` if it was not asked for or the reference has no spatial statistics.
    pub sfid: Option<f64>,
}

/// All metrics of the `samples` against the `reference`, with the guards against usual mistakes.
///
/// # Errors
/// When there are fewer than [`FEWEST`] samples and nothing forces, the two sides come from different networks or
/// preprocessing, or the statistics are not of Inception's features.
pub fn compare(
    reference: &ReferenceSet,
    samples: &FeatureSet,
    options: &Options,
) -> Result<Comparison> {
    let mut warnings = Vec::new();
    check_count("samples", samples.len(), options.force)?;
    let sides = [
        reference
            .statistics
            .as_ref()
            .and_then(|s| s.provenance.as_ref()),
        reference.features.as_ref().map(|f| &f.provenance),
    ];
    for provenance in sides.into_iter().flatten() {
        provenance.same_network(&samples.provenance)?;
        warnings.extend(size_warning(provenance, &samples.provenance));
    }
    warnings.dedup();
    if let Some(statistics) = &reference.statistics {
        check_dimensions(statistics)?;
        if statistics.provenance.is_none() {
            warnings.push("the reference statistics do not say which network and resize made them; only those of ADM, pytorch-fid's TensorFlow-compatible port or `tinyfusion stats` compare (clean-fid's and jax-fid's do not)".into());
        }
    } else if let Some(features) = &reference.features {
        check_count("reference images", features.len(), options.force)?;
    }
    if samples.len() != PROTOCOL {
        warnings.push(format!(
            "{} samples; published FIDs are of {PROTOCOL}, and fewer give larger values",
            samples.len()
        ));
    }
    for provenance in [
        reference.features.as_ref().map(|f| &f.provenance),
        Some(&samples.provenance),
    ] {
        warnings.extend(
            provenance
                .into_iter()
                .flat_map(|p| p.warnings.iter().cloned()),
        );
    }

    let pool = reference
        .features
        .as_ref()
        .map(FeatureSet::pool)
        .transpose()?;
    let normal = match (&reference.statistics, pool) {
        (Some(statistics), Some(features)) => Reference::Both {
            statistics: &statistics.pool,
            features,
        },
        (Some(statistics), None) => Reference::Statistics(&statistics.pool),
        (None, Some(features)) => Reference::Features(features),
        (None, None) => {
            return Err(Error::Config(
                "the reference has neither statistics nor features".into(),
            ));
        }
    };
    let logits = options
        .config
        .inception_score
        .map(|_: Splits| samples.logits())
        .transpose()?;
    let mut metrics = evaluate(normal, samples.pool()?, logits, &options.config)?;
    let sfid = if options.sfid {
        sfid(reference, samples, &mut warnings)?
    } else {
        None
    };
    metrics.warnings.splice(0..0, warnings);
    Ok(Comparison { metrics, sfid })
}

/// The Fréchet distance of the spatial features (Nash et al. 2021).
fn sfid(
    reference: &ReferenceSet,
    samples: &FeatureSet,
    warnings: &mut Vec<String>,
) -> Result<Option<f64>> {
    let normal = match (&reference.statistics, &reference.features) {
        (
            Some(StoredStatistics {
                spatial: Some(spatial),
                ..
            }),
            _,
        ) => Gaussian::from_statistics(spatial)?,
        (None, Some(features)) => Gaussian::from_features(features.spatial()?)?,
        _ => {
            warnings.push("the reference statistics have no mu_s and sigma_s: no sFID".into());
            return Ok(None);
        }
    };
    let samples = Gaussian::from_features(samples.spatial()?)?;
    Ok(Some(frechet_distance(&normal, &samples)?.distance))
}

/// At least [`FEWEST`] of `what`, or `force`.
///
/// # Errors
/// Otherwise, with the counts that are needed.
pub fn check_count(what: &str, n: usize, force: bool) -> Result<()> {
    if n >= FEWEST || force {
        return Ok(());
    }
    Err(Error::Config(format!(
        "{n} {what}, expected at least {FEWEST} (published: {PROTOCOL}): over so few an FID of {} features says nothing; draw more, or force it to see the machinery run",
        ImageFeatures::POOL
    )))
}

fn check_dimensions(statistics: &StoredStatistics) -> Result<()> {
    let spatial = statistics
        .spatial
        .as_ref()
        .map(|s| ("mu_s", s.columns(), ImageFeatures::SPATIAL));
    let pool = ("mu", statistics.pool.columns(), ImageFeatures::POOL);
    match [Some(pool), spatial]
        .into_iter()
        .flatten()
        .find(|(_, found, expected)| found != expected)
    {
        None => Ok(()),
        Some((name, found, expected)) => Err(Error::Statistics(format!(
            "the reference's `{name}` has {found} values, expected the {expected} of Inception's features; it is of another network"
        ))),
    }
}

fn size_warning(reference: &Provenance, samples: &Provenance) -> Option<String> {
    let ([h, w], [height, width]) = (reference.size, samples.size);
    ([h, w] != [height, width]).then(|| {
        format!("the reference images are {w} x {h}, the samples {width} x {height}: their difference in sharpness counts as distance")
    })
}
