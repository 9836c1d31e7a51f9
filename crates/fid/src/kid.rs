use faer::{Accum, Mat, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::inception_score::mean_and_std;
use crate::{Error, FeatureMatrix, NumpyRandomState, Result};

/// Settings of [`kid`]; the defaults are torch-fidelity's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KidConfig {
    /// Number of subsets (100).
    pub subsets: usize,
    /// Rows drawn from each side per subset, without replacement (1000).
    pub subset_size: usize,
    /// Seed of numpy's `RandomState` that draws them (2020).
    pub seed: u32,
}

impl Default for KidConfig {
    fn default() -> Self {
        Self {
            subsets: 100,
            subset_size: 1000,
            seed: 2020,
        }
    }
}

/// The Kernel Inception Distance of each subset, their mean and population standard deviation.
/// Slightly negative values are legitimate: the estimate is unbiased.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kid {
    /// The distance.
    pub mean: f64,
    /// Standard deviation over the subsets (divided by their number); `None` of a single subset.
    pub std: Option<f64>,
    /// MMD² per subset, in order.
    pub subsets: Vec<f64>,
}

/// Kernel Inception Distance (Bińkowski et al. 2018) between two sets, over the subsets that
/// torch-fidelity draws. Give the generated set first to draw as it does.
///
/// # Errors
/// When the subset is larger than a set, smaller than 2, or the dimensions differ.
pub fn kid(first: FeatureMatrix<'_>, second: FeatureMatrix<'_>, config: &KidConfig) -> Result<Kid> {
    let (rows, others) = kid_subsets(first.rows(), second.rows(), config)?
        .into_iter()
        .unzip::<_, _, Vec<_>, Vec<_>>();
    kid_of_subsets(first, second, &rows, &others)
}

/// The row indices of every subset, of the first and of the second set: one stream,
/// `choice(n, m, replace=False)` for the first set, then for the second, subset after subset. Where a subset is all of both
/// sets there is only one: the others would be the same rows.
pub fn kid_subsets(
    first_rows: usize,
    second_rows: usize,
    config: &KidConfig,
) -> Result<Vec<(Vec<usize>, Vec<usize>)>> {
    let &KidConfig {
        subsets,
        subset_size,
        seed,
    } = config;
    if subsets == 0 || subset_size < 2 {
        return Err(Error::Config(format!(
            "KID needs at least 1 subset of at least 2 rows, found {subsets} of {subset_size}; the usual ones are 100 of 1000"
        )));
    }
    let fewest = first_rows.min(second_rows);
    if subset_size > fewest {
        return Err(Error::TooFewRows {
            what: "KID with subsets of that size",
            expected: subset_size,
            found: fewest,
            advice: "use a smaller subset size or more images",
        });
    }
    let mut random = NumpyRandomState::new(seed);
    let mut draw = |rows: usize| {
        let mut order = random.permutation(rows);
        order.truncate(subset_size);
        order
    };
    let all = subset_size == first_rows && subset_size == second_rows;
    let subsets = if all { 1 } else { subsets };
    Ok((0..subsets)
        .map(|_| (draw(first_rows), draw(second_rows)))
        .collect())
}

/// [`kid`] over given subsets: `first_rows[s]` and `second_rows[s]` list the rows of subset s and have
/// the same length.
///
/// # Errors
/// When the lists do not pair up, a subset has fewer than 2 rows, or a row does not exist.
pub fn kid_of_subsets(
    first: FeatureMatrix<'_>,
    second: FeatureMatrix<'_>,
    first_rows: &[Vec<usize>],
    second_rows: &[Vec<usize>],
) -> Result<Kid> {
    first.same_columns(&second)?;
    if first_rows.len() != second_rows.len() || first_rows.is_empty() {
        return Err(Error::Config(format!(
            "KID needs the same number of subsets of both sets, at least 1; found {} and {}",
            first_rows.len(),
            second_rows.len()
        )));
    }
    let subsets = first_rows
        .par_iter()
        .zip(second_rows)
        .map(|(rows, others)| {
            if rows.len() != others.len() || rows.len() < 2 {
                return Err(Error::Config(format!(
                    "a KID subset needs the same number of rows of both sets, at least 2; found {} and {}",
                    rows.len(),
                    others.len()
                )));
            }
            let (x, y) = (gather(first, rows)?, gather(second, others)?);
            let x = FeatureMatrix::new(&x, rows.len(), first.columns())?;
            let y = FeatureMatrix::new(&y, others.len(), first.columns())?;
            Ok(mmd_squared(x, y))
        })
        .collect::<Result<Vec<f64>>>()?;
    let (mean, std) = mean_and_std(&subsets);
    if !mean.is_finite() {
        return Err(Error::Numerics(
            "KID exceeds the range of f64; check the scale of the features".into(),
        ));
    }
    Ok(Kid {
        mean,
        std: (subsets.len() > 1).then_some(std),
        subsets,
    })
}

/// Unbiased MMD² of two sets of m rows: mean of k over distinct pairs within x, plus within y, minus
/// twice the mean between them.
fn mmd_squared(x: FeatureMatrix<'_>, y: FeatureMatrix<'_>) -> f64 {
    let m = x.rows() as f64;
    let pairs = m * (m - 1.0);
    kernel_sum(x, x, Pairs::Distinct) / pairs + kernel_sum(y, y, Pairs::Distinct) / pairs
        - 2.0 * kernel_sum(x, y, Pairs::All) / (m * m)
}

#[derive(Clone, Copy, PartialEq)]
enum Pairs {
    All,
    Distinct,
}

/// Sum of the polynomial kernel (x·y/D + 1)³ over pairs, in f64.
fn kernel_sum(x: FeatureMatrix<'_>, y: FeatureMatrix<'_>, pairs: Pairs) -> f64 {
    let d = x.columns();
    let [a, b] = [x, y].map(|set| set.to_f64(0..set.rows()));
    let x = MatRef::from_row_major_slice(&a, x.rows(), d); // (m, D)
    let y = MatRef::from_row_major_slice(&b, y.rows(), d);
    let mut products = Mat::zeros(y.nrows(), x.nrows()); // (m, m)
    // On the calling thread: the subsets are spread.
    matmul(
        &mut products,
        Accum::Replace,
        y,
        x.transpose(),
        1.0,
        Par::Seq,
    );
    let mut sum = 0.0;
    for column in 0..products.ncols() {
        // Column by column first: the partial sums stay small and lose less.
        sum += products
            .col_as_slice(column)
            .iter()
            .enumerate()
            .filter(|&(row, _)| pairs == Pairs::All || row != column)
            .map(|(_, product)| (product / d as f64 + 1.0).powi(3))
            .sum::<f64>();
    }
    sum
}

/// The rows `index`, one after the other.
fn gather(features: FeatureMatrix<'_>, index: &[usize]) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(index.len() * features.columns());
    for &row in index {
        if row >= features.rows() {
            return Err(Error::Config(format!(
                "a KID subset names row {row}, but the set has {} rows (counted from 0)",
                features.rows()
            )));
        }
        values.extend_from_slice(features.row(row));
    }
    Ok(values)
}
