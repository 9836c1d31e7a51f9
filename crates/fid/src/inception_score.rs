use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, FeatureMatrix, NumpyRandomState, Result};

/// Rows per parallel task. Fixed, so that the sums do not depend on the number of threads.
const CHUNK: usize = 128;

/// How the rows are divided; each split gives one score, the result is their mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Splits {
    /// ADM's evaluator: consecutive splits of `size` rows in file order; the last may be smaller and
    /// weighs the same.
    Adm {
        /// Rows per split; ADM uses 5000.
        size: usize,
    },
    /// torch-fidelity: `count` splits with bounds i·N/count, the rows shuffled first.
    Fidelity {
        /// Number of splits; torch-fidelity uses 10.
        count: usize,
        /// Seed of numpy's `RandomState` for the shuffle (2020 there); none keeps the file order.
        shuffle_seed: Option<u32>,
    },
}

impl Splits {
    /// The setting of ADM, DiT, SiT and TinyFusion.
    pub const ADM: Self = Self::Adm { size: 5000 };
    /// The default of torch-fidelity.
    pub const FIDELITY: Self = Self::Fidelity {
        count: 10,
        shuffle_seed: Some(2020),
    };

    /// No split of `n` rows is empty.
    pub(crate) fn check(&self, n: usize) -> Result<()> {
        match *self {
            Self::Adm { size: 0 } => Err(Error::Config(
                "the split size of the Inception Score is 0; ADM uses 5000".into(),
            )),
            Self::Fidelity { count: 0, .. } => Err(Error::Config(
                "the Inception Score has 0 splits; torch-fidelity uses 10".into(),
            )),
            Self::Fidelity { count, .. } if count > n => Err(Error::TooFewRows {
                what: "an Inception Score with one row per split",
                expected: count,
                found: n,
                advice: "use fewer splits or more samples",
            }),
            _ => Ok(()),
        }
    }
}

/// The Inception Score of each split, their mean and population standard deviation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InceptionScore {
    /// The score.
    pub mean: f64,
    /// Standard deviation over the splits (divided by their number); 0 for one split.
    pub std: f64,
    /// Score per split, in order.
    pub scores: Vec<f64>,
}

/// Inception Score exp(E_x KL(p(y|x) ‖ p(y))) (Salimans et al. 2016) of `logits` (N × classes).
///
/// For published numbers give the logits **without** bias over all 1008 outputs. Computed in f64 from
/// log-softmax, where a probability that underflows contributes 0, its limit.
///
/// # Errors
/// When a split would be empty.
pub fn inception_score(logits: FeatureMatrix<'_>, splits: &Splits) -> Result<InceptionScore> {
    let n = logits.rows();
    splits.check(n)?;
    let (order, bounds): (Vec<usize>, Vec<usize>) = match *splits {
        Splits::Adm { size } => ((0..n).collect(), (0..n).step_by(size).chain([n]).collect()),
        Splits::Fidelity {
            count,
            shuffle_seed,
        } => {
            let order = match shuffle_seed {
                Some(seed) => NumpyRandomState::new(seed).permutation(n),
                None => (0..n).collect(),
            };
            (order, (0..=count).map(|i| i * n / count).collect())
        }
    };
    let scores: Vec<f64> = bounds
        .windows(2)
        .map(|ends| score(logits, &order[ends[0]..ends[1]]))
        .collect();
    let (mean, std) = mean_and_std(&scores);
    Ok(InceptionScore { mean, std, scores })
}

/// The score of the rows `index`: with H the entropy, E KL(p(y|x) ‖ p(y)) = H(p(y)) − E H(p(y|x)).
fn score(logits: FeatureMatrix<'_>, index: &[usize]) -> f64 {
    let chunks: Vec<(Vec<f64>, f64)> = index
        .par_chunks(CHUNK)
        .map(|chunk| {
            let mut marginal = vec![0.0; logits.columns()];
            let mut weights = marginal.clone();
            let negative_entropy = chunk
                .iter()
                .map(|&row| add_row(logits.row(row), &mut weights, &mut marginal))
                .sum();
            (marginal, negative_entropy)
        })
        .collect();
    let n = index.len() as f64;
    let mut marginal = vec![0.0; logits.columns()];
    let mut conditional = 0.0;
    for (part, negative_entropy) in &chunks {
        conditional += negative_entropy;
        marginal.iter_mut().zip(part).for_each(|(sum, p)| *sum += p);
    }
    let entropy: f64 = marginal
        .iter()
        .map(|sum| sum / n)
        .filter(|&p| p > 0.0)
        .map(|p| -p * p.ln())
        .sum();
    (entropy + conditional / n).exp()
}

/// Adds softmax(`logits`) to `marginal` (classes) and returns Σ p·ln p. `weights` is scratch space (classes).
fn add_row(logits: &[f32], weights: &mut [f64], marginal: &mut [f64]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut total = 0.0;
    for (weight, &z) in weights.iter_mut().zip(logits) {
        *weight = (f64::from(z) - top).exp();
        total += *weight;
    }
    let log_total = total.ln();
    let mut sum = 0.0;
    for ((&z, weight), marginal) in logits.iter().zip(weights).zip(marginal) {
        let p = *weight / total;
        *marginal += p;
        // Finite also where p underflows to 0: the difference of two f32 is a finite f64.
        sum += p * (f64::from(z) - top - log_total);
    }
    sum
}

/// Mean and population standard deviation.
pub(crate) fn mean_and_std(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values
        .iter()
        .map(|value| (value - mean) * (value - mean))
        .sum::<f64>()
        / n;
    (mean, variance.sqrt())
}
