use faer::{Accum, Mat, MatRef, get_global_parallelism, linalg::matmul::matmul};
use serde::{Deserialize, Serialize};

use crate::features::{ranges, same_columns};
use crate::{Error, FeatureMatrix, Result};

/// Rows merged at a time: enough for an efficient matrix product, little memory.
pub(crate) const CHUNK: usize = 1024;

/// Relative asymmetry and negative variance that are still taken for rounding (f32 files have 6e-8).
const ROUNDING: f64 = 1e-6;

/// Count, mean (D) and covariance (D × D, divided by n − 1) of a set of features, in f64.
///
/// Made by an [`Accumulator`], or from a file's `mu` and `sigma` by [`Statistics::from_parts`];
/// deserialising runs the same checks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Parts", into = "Parts")]
pub struct Statistics {
    n: Option<u64>,
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

/// The fields as they are written.
#[derive(Serialize, Deserialize)]
struct Parts {
    n: Option<u64>,
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

impl From<Statistics> for Parts {
    fn from(
        Statistics {
            n,
            mean,
            covariance,
        }: Statistics,
    ) -> Self {
        Self {
            n,
            mean,
            covariance,
        }
    }
}

impl TryFrom<Parts> for Statistics {
    type Error = Error;

    fn try_from(
        Parts {
            n,
            mean,
            covariance,
        }: Parts,
    ) -> Result<Self> {
        Self::from_parts(n, mean, covariance)
    }
}

impl Statistics {
    /// Statistics of all rows of `features` (at least two).
    pub fn of(features: FeatureMatrix<'_>) -> Result<Self> {
        let mut sums = Accumulator::new(features.columns())?;
        sums.push(features)?;
        sums.finish()
    }

    /// Stored statistics: `mean` (D), `covariance` (D × D row-major, divided by n − 1), and the
    /// count where the file has one (`mu`/`sigma` files do not).
    ///
    /// # Errors
    /// When sizes do not fit, a value is not finite, the matrix is not symmetric, or a variance is
    /// negative (each beyond f32 rounding, which is averaged away).
    pub fn from_parts(n: Option<u64>, mean: Vec<f64>, mut covariance: Vec<f64>) -> Result<Self> {
        let d = mean.len();
        if d == 0 {
            return Err(Error::Statistics(
                "the mean is empty; expected one value per feature".into(),
            ));
        }
        if d.checked_mul(d) != Some(covariance.len()) {
            return Err(Error::Statistics(format!(
                "the mean has {d} values, so the covariance must have {d} x {d}; it has {}",
                covariance.len()
            )));
        }
        if let Some(n) = n.filter(|&n| n < 2) {
            return Err(Error::Statistics(format!(
                "n is {n}, but a covariance needs at least 2 rows"
            )));
        }
        if let Some(at) = mean.iter().position(|value| !value.is_finite()) {
            return Err(Error::Statistics(format!(
                "mean[{at}] is {}, expected a finite number",
                mean[at]
            )));
        }
        if let Some(at) = covariance.iter().position(|value| !value.is_finite()) {
            let (i, j) = (at / d, at % d);
            return Err(Error::Statistics(format!(
                "covariance[{i}, {j}] is {}, expected a finite number",
                covariance[at]
            )));
        }
        let largest = (0..d).fold(0.0f64, |largest, i| {
            largest.max(covariance[i * d + i].abs())
        });
        for i in 0..d {
            if covariance[i * d + i] < -ROUNDING * largest {
                return Err(Error::Statistics(format!(
                    "covariance[{i}, {i}] is {}, expected a variance, which is not negative",
                    covariance[i * d + i]
                )));
            }
            for j in 0..i {
                let (below, above) = (covariance[i * d + j], covariance[j * d + i]);
                // Halved before they are subtracted, so that huge values cannot overflow.
                if (0.5 * below - 0.5 * above).abs() > 0.5 * ROUNDING * largest {
                    return Err(Error::Statistics(format!(
                        "the covariance is not symmetric: [{i}, {j}] is {below} and [{j}, {i}] is {above}"
                    )));
                }
                let value = 0.5 * below + 0.5 * above;
                covariance[i * d + j] = value;
                covariance[j * d + i] = value;
            }
        }
        Ok(Self {
            n,
            mean,
            covariance,
        })
    }

    /// Number of rows they were taken over, where known.
    pub fn n(&self) -> Option<u64> {
        self.n
    }

    /// Dimension D.
    pub fn columns(&self) -> usize {
        self.mean.len()
    }

    /// Mean (D).
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Covariance (D × D, row-major, symmetric), divided by n − 1.
    pub fn covariance(&self) -> &[f64] {
        &self.covariance
    }

    /// Statistics of the two sets together.
    ///
    /// # Errors
    /// When the dimensions differ or a count is unknown.
    pub fn merge(&self, other: &Self) -> Result<Self> {
        let mut sums = Accumulator::from_statistics(self)?;
        sums.merge(&Accumulator::from_statistics(other)?)?;
        sums.finish()
    }

    /// The covariance as a matrix (D × D).
    pub(crate) fn covariance_matrix(&self) -> MatRef<'_, f64> {
        // Symmetric, so row-major and column-major are the same.
        MatRef::from_column_major_slice(&self.covariance, self.columns(), self.columns())
    }
}

/// Streaming mean and covariance: feed batches, merge shards, [`finish`](Self::finish) into [`Statistics`].
///
/// Holds the count, the mean and the scatter matrix Σ (x − mean)(x − mean)ᵀ; two of them merge by the
/// pairwise update of Chan, Golub & LeVeque 1983, which subtracts no large sums.
#[derive(Debug, Clone)]
pub struct Accumulator {
    n: u64,
    mean: Vec<f64>,
    scatter: Mat<f64>,
}

impl Accumulator {
    /// Nothing yet, for features of dimension `columns`.
    pub fn new(columns: usize) -> Result<Self> {
        if columns == 0 {
            return Err(Error::Empty { rows: 0, columns });
        }
        Ok(Self {
            n: 0,
            mean: vec![0.0; columns],
            scatter: Mat::zeros(columns, columns),
        })
    }

    /// The sums behind `statistics`, so that more can be added; the count must be known.
    pub fn from_statistics(statistics: &Statistics) -> Result<Self> {
        let n = statistics.n.ok_or_else(|| {
            Error::Statistics(
                "the number of rows is unknown (a mu/sigma file has none), so nothing can be merged with them"
                    .into(),
            )
        })?;
        let covariance = statistics.covariance_matrix();
        Ok(Self {
            n,
            mean: statistics.mean.clone(),
            scatter: Mat::from_fn(statistics.columns(), statistics.columns(), |i, j| {
                covariance[(i, j)] * (n - 1) as f64
            }),
        })
    }

    /// Rows seen so far.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Adds the rows of `batch` (any number, down to one).
    pub fn push(&mut self, batch: FeatureMatrix<'_>) -> Result<()> {
        let d = self.mean.len();
        same_columns(d, batch.columns())?;
        for range in ranges(batch.rows(), CHUNK) {
            let mean = batch.mean(range.clone());
            let centred = batch.centred(range.clone(), &mean);
            let centred = MatRef::from_row_major_slice(&centred, range.len(), d); // (chunk, D)
            matmul(
                &mut self.scatter, // (D, D)
                Accum::Add,
                centred.transpose(), // (D, chunk)
                centred,
                1.0,
                get_global_parallelism(),
            );
            self.shift(range.len() as u64, &mean);
        }
        Ok(())
    }

    /// Adds everything that `other` has seen.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        same_columns(self.mean.len(), other.mean.len())?;
        if other.n > 0 {
            self.scatter += &other.scatter;
            self.shift(other.n, &other.mean);
        }
        Ok(())
    }

    /// The statistics of all rows seen (at least two).
    pub fn finish(&self) -> Result<Statistics> {
        let d = self.mean.len();
        if self.n < 2 {
            return Err(Error::TooFewRows {
                what: "a covariance",
                expected: 2,
                found: self.n as usize,
                advice: "add more images",
            });
        }
        let scale = (self.n - 1) as f64;
        // The product rounds the two halves differently; their mean is symmetric to the bit.
        let covariance = (0..d * d)
            .map(|at| {
                0.5 * (self.scatter[(at / d, at % d)] + self.scatter[(at % d, at / d)]) / scale
            })
            .collect();
        Statistics::from_parts(Some(self.n), self.mean.clone(), covariance)
    }

    /// The part of Chan's update that moves the mean: scatter += δδᵀ·n·m/(n + m), mean += δ·m/(n + m).
    fn shift(&mut self, n: u64, mean: &[f64]) {
        let (ours, theirs) = (self.n as f64, n as f64);
        let total = ours + theirs;
        let delta: Vec<f64> = mean
            .iter()
            .zip(&self.mean)
            .map(|(theirs, ours)| theirs - ours)
            .collect();
        if self.n == 0 {
            self.mean.copy_from_slice(mean);
        } else {
            let weight = ours * theirs / total;
            for (j, &dj) in delta.iter().enumerate() {
                let column = self.scatter.col_as_slice_mut(j);
                for (value, &di) in column.iter_mut().zip(&delta) {
                    *value += di * dj * weight;
                }
            }
            for (mean, delta) in self.mean.iter_mut().zip(&delta) {
                *mean += delta * theirs / total;
            }
        }
        self.n += n;
    }
}
