use serde::Serialize;

use crate::provenance::add_new;
use crate::{
    Config, Error, FeatureSet, Gaussian, Given, KnownSide, Metrics, Result, StoredStatistics,
    check, evaluate, frechet_distance,
};

/// One side of a comparison: statistics, features, or both. With both (ADM's reference batches, of different images)
/// FID and sFID are of the statistics and the other metrics of the features, as ADM's evaluator has it for either side.
#[derive(Debug, Clone, Default)]
pub struct Side {
    /// For FID and sFID, where there are any.
    pub statistics: Option<StoredStatistics>,
    /// For the other metrics; without statistics also for FID and sFID.
    pub features: Option<FeatureSet>,
}

impl From<FeatureSet> for Side {
    fn from(features: FeatureSet) -> Self {
        Self {
            statistics: None,
            features: Some(features),
        }
    }
}

impl From<StoredStatistics> for Side {
    fn from(statistics: StoredStatistics) -> Self {
        Self {
            statistics: Some(statistics),
            features: None,
        }
    }
}

/// What [`compare`] computes besides FID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// sFID.
    pub sfid: bool,
    /// The other metrics.
    pub config: Config,
    /// Whether too few images are warned of instead of refused.
    pub force: bool,
    /// Whether the metrics were asked for by name: one that cannot be computed is then an error, and else left out with
    /// a warning.
    pub named: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sfid: true,
            config: Config::default(),
            force: false,
            named: false,
        }
    }
}

/// What [`compare`] found.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// FID, IS, precision, recall, KID, and all warnings.
    pub metrics: Metrics,
    /// sFID; `None` if it was not asked for or a side has no spatial statistics.
    pub sfid: Option<f64>,
}

/// All metrics of the `samples` against the `reference`, with the guards against usual mistakes.
///
/// # Errors
/// When [`check`] refuses them, statistics are no covariance, or a decomposition fails.
pub fn compare(reference: &Side, samples: &Side, options: &Options) -> Result<Comparison> {
    let checked = check(
        &reference.known("the reference"),
        &samples.known("the samples"),
        options,
    )?;
    let options = checked.options;
    let logits = match (&samples.features, options.config.inception_score) {
        (Some(features), Some(_)) => Some(features.logits()?),
        _ => None,
    };
    let mut metrics = evaluate(reference.pool()?, samples.pool()?, logits, &options.config)?;
    let sfid = match options.sfid {
        true => {
            // Nash et al. 2021.
            let (normal, drawn) = (reference.spatial()?, samples.spatial()?);
            Some(frechet_distance(&normal, &drawn)?.distance)
        }
        false => None,
    };
    let mut warnings = checked.warnings;
    add_new(&mut warnings, &metrics.warnings);
    metrics.warnings = warnings;
    Ok(Comparison { metrics, sfid })
}

impl Side {
    fn known<'a>(&'a self, name: &'a str) -> KnownSide<'a> {
        KnownSide {
            name,
            statistics: self.statistics.as_ref(),
            images: self.features.iter().map(|f| f.known(name)).collect(),
        }
    }

    /// For FID and the metrics of single rows.
    fn pool(&self) -> Result<Given<'_>> {
        Ok(match (&self.statistics, &self.features) {
            (Some(statistics), Some(features)) => Given::Both {
                statistics: &statistics.pool,
                features: features.pool()?,
            },
            (Some(statistics), None) => Given::Statistics(&statistics.pool),
            (None, Some(features)) => Given::Features(features.pool()?),
            (None, None) => return Err(nothing()),
        })
    }

    /// For sFID.
    fn spatial(&self) -> Result<Gaussian> {
        match (&self.statistics, &self.features) {
            (Some(statistics), _) => {
                let spatial = statistics.spatial.as_ref().ok_or_else(nothing)?;
                Gaussian::from_statistics(spatial)
            }
            (None, Some(features)) => Gaussian::from_features(features.spatial()?),
            (None, None) => Err(nothing()),
        }
    }
}

/// [`check`] has said so before.
fn nothing() -> Error {
    Error::Config("a side has neither statistics nor features".into())
}
