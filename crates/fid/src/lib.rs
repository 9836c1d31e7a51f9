#![doc = include_str!("../README.md")]

// From images to features.
mod network;
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

// All of them at once, with warnings.
mod evaluate;

// What the metrics share.
mod distances;
mod hash;
mod numpy_random;

pub use error::{Error, Result};
pub use evaluate::{Config, Metrics, Reference, evaluate};
pub use features::FeatureMatrix;
pub use frechet::{Frechet, Gaussian, frechet_distance};
pub use inception_score::{InceptionScore, Splits, inception_score};
pub use kid::{Kid, KidConfig, kid, kid_of_subsets, kid_subsets};
pub use network::{ImageFeatures, Inception, resize};
pub use numpy_random::NumpyRandomState;
pub use precision_recall::{PrecisionRecall, PrecisionRecallConfig, precision_recall};
pub use statistics::{Accumulator, Statistics};
pub use weights::{Weights, known_weights};
