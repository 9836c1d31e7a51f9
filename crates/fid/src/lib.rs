#![doc = include_str!("../README.md")]

// From images to features.
mod extract;
mod input;
mod network;
mod stored;
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

pub use check::{FEWEST, Known, KnownReference, PROTOCOL, check, check_count, check_shards};
pub use compare::{Comparison, Options, ReferenceSet, compare};
pub use error::{Error, Result};
pub use evaluate::{Config, Metrics, Reference, evaluate};
pub use extract::{FeatureSet, PREPROCESSING, Provenance, extract};
pub use features::FeatureMatrix;
pub use frechet::{Frechet, Gaussian, frechet_distance};
pub use inception_score::{InceptionScore, Splits, inception_score};
pub use input::{ImageSet, Npz};
pub use kid::{Kid, KidConfig, kid, kid_of_subsets, kid_subsets};
pub use network::{ImageFeatures, Inception, See, resize};
pub use numpy_random::NumpyRandomState;
pub use precision_recall::{PrecisionRecall, PrecisionRecallConfig, precision_recall};
pub use statistics::{Accumulator, Statistics};
pub use stored::StoredStatistics;
pub use weights::{Values, Weights, known_weights, read_tensors};
