//! Ways to choose which blocks to keep, one file each, behind one trait.

mod block_influence;
mod calibration;
mod flux_lite;
mod greedy;
mod hidden;
mod learned;
mod magnitude;
mod oracle;
mod random;
mod random_search;
mod ranking;
mod sensitivity;
mod subject;

use serde::{Deserialize, Serialize};
use tinyfusion_core::{BlockStack, Result, Selection};
use tinyfusion_diffusion::Objective;

pub use subject::{Choice, Subject};

pub use block_influence::BlockInfluence;
pub use flux_lite::FluxLite;
pub use greedy::Greedy;
pub use learned::{LearnedMask, keep_probabilities};
pub use magnitude::Magnitude;
pub use oracle::Oracle;
pub use random::Random;
pub use random_search::RandomSearch;
pub use sensitivity::Sensitivity;

/// A way to choose which blocks of a network to keep.
///
/// A criterion streams: it keeps sums and no activations, so that its memory does not grow with the samples.
pub trait Criterion<S: BlockStack, O: Objective<S>> {
    /// Its name, as in `selection.json`.
    fn name(&self) -> &'static str;

    /// Passes of calibration batches through the network that [`choose`](Self::choose) will make, for a progress bar.
    fn passes(&self, subject: &Subject<'_, S, O>) -> u64;

    /// Judges the blocks and chooses.
    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement>;
}

/// What a criterion found: the content of `scores.json`, and the selection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The blocks to keep.
    pub selection: Selection,
    /// How much every block matters, in the order of the blocks; empty where single blocks are not judged.
    pub blocks: Vec<BlockScore>,
    /// Whole masks that were judged, in the order in which they were tried.
    pub masks: Vec<MaskScore>,
}

/// How much one block matters; the highest are kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BlockScore {
    /// Index of the block.
    pub block: usize,
    /// The score, in the criterion's own unit.
    pub score: f64,
    /// Standard error of the score over samples; none where no samples were used.
    pub standard_error: Option<f64>,
}

/// The calibration loss of one mask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MaskScore {
    /// Blocks that ran.
    pub kept: Vec<usize>,
    /// Mean loss over the calibration samples, without any recovery; none where it is not a finite number.
    pub loss: Option<f64>,
    /// Its standard error.
    pub standard_error: Option<f64>,
}
