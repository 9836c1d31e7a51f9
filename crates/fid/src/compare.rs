use serde::Serialize;

use crate::{
    Config, Error, FeatureSet, Gaussian, Known, KnownReference, Metrics, Reference, Result, Splits,
    StoredStatistics, check, evaluate, frechet_distance,
};

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
/// When [`check`] refuses them, statistics are no covariance, or a decomposition fails.
pub fn compare(
    reference: &ReferenceSet,
    samples: &FeatureSet,
    options: &Options,
) -> Result<Comparison> {
    let known = KnownReference {
        name: "the reference",
        statistics: reference.statistics.as_ref(),
        images: reference
            .features
            .as_ref()
            .map(|f| f.known("the reference")),
    };
    let mut warnings = check(&known, &[samples.known("the samples")], options)?;
    let sides = [reference.features.as_ref(), Some(samples)];
    for Known { provenance, .. } in sides.into_iter().flatten().map(|f| f.known("")) {
        warnings.extend(provenance.warnings.iter().cloned());
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
        sfid(reference, samples)?
    } else {
        None
    };
    warnings.append(&mut metrics.warnings);
    for warning in warnings {
        if !metrics.warnings.contains(&warning) {
            metrics.warnings.push(warning);
        }
    }
    Ok(Comparison { metrics, sfid })
}

/// The Fréchet distance of the spatial features (Nash et al. 2021).
fn sfid(reference: &ReferenceSet, samples: &FeatureSet) -> Result<Option<f64>> {
    let normal = match (&reference.statistics, &reference.features) {
        (
            Some(StoredStatistics {
                spatial: Some(spatial),
                ..
            }),
            _,
        ) => Gaussian::from_statistics(spatial)?,
        (None, Some(features)) => Gaussian::from_features(features.spatial()?)?,
        // [`check`] has said so.
        _ => return Ok(None),
    };
    let samples = Gaussian::from_features(samples.spatial()?)?;
    Ok(Some(frechet_distance(&normal, &samples)?.distance))
}
