#![doc = include_str!("../README.md")]

// From images to features.
mod extract;
mod feature_set;
mod input;
mod network;
mod provenance;
mod stored;
mod sums;
mod weights;

// What goes in.
mod error;
mod features;
mod statistics;

// The metrics, each usable alone.
mod frechet;
mod inception_score;
mod kid;
mod precision_recall;

// All of them at once, with refusals and warnings.
mod check;
mod compare;
mod evaluate;

// What the metrics share.
mod distances;
mod hash;
mod numpy_random;

pub use check::{Checked, FEWEST, Known, KnownSide, PROTOCOL, check, check_count, check_shards};
pub use compare::{Comparison, Options, Side, compare};
pub use error::{Error, Result};
pub use evaluate::{Config, Given, Metrics, evaluate, few_rows_warning};
pub use extract::{Sink, Work, extract, extract_into};
pub use feature_set::{FeatureSet, Keep};
pub use features::FeatureMatrix;
pub use frechet::{Frechet, Gaussian, frechet_distance};
pub use inception_score::{InceptionScore, Splits, inception_score};
pub use input::{ImageSet, Npz, file_sha256};
pub use kid::{Kid, KidConfig, kid, kid_of_subsets, kid_subsets};
pub use network::{ImageFeatures, Inception, See, resize};
pub use numpy_random::NumpyRandomState;
pub use precision_recall::{PrecisionRecall, PrecisionRecallConfig, precision_recall};
pub use provenance::{PREPROCESSING, Provenance};
pub use statistics::{Accumulator, Statistics};
pub use stored::StoredStatistics;
pub use sums::StatisticsSums;
pub use weights::{Values, Weights, known_weights, read_tensors};
