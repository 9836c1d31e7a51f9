use faer::{Mat, MatRef, Side};
use serde::{Deserialize, Serialize};

use crate::features::{ranges, same_columns};
use crate::{Error, FeatureMatrix, Result, Statistics};

/// Fewest rows folded into the triangular factor at a time.
const QR_ROWS: usize = 512;

/// Smallest squared pivot, relative to the largest variance, at which a Cholesky factor is trusted;
/// below it the eigenvalues decide what is rank and what is rounding.
const TRUSTED_PIVOT: f64 = 1e-10;

/// A negative eigenvalue beyond this share of the largest is no rounding, even of an f32 file.
const INDEFINITE: f64 = 1e-3;

/// A normal distribution with its covariance in factored form, ready for [`frechet_distance`].
///
/// Keep it to compare one reference with many sample sets: the decomposition is done here, once.
///
/// With covariance Σ = s²·RᵀR, R is (rank × D): from features it is the centred matrix itself (N ≤ D,
/// the "Gram trick") or the triangle of its QR decomposition (N > D), so squares of features are never
/// formed; from statistics it is a Cholesky factor, or √λ·uᵀ over the eigenvalues above rounding.
#[derive(Debug, Clone)]
pub struct Gaussian {
    n: Option<u64>,
    mean: Vec<f64>,
    /// R, with entries of at most about 1, so that products neither overflow nor vanish.
    root: Mat<f64>,
    /// s.
    scale: f64,
    /// tr Σ.
    trace: f64,
}

impl Gaussian {
    /// Mean and covariance (divided by N − 1) of the rows of `features`, at least two.
    pub fn from_features(features: FeatureMatrix<'_>) -> Result<Self> {
        let (n, d) = (features.rows(), features.columns());
        check_rows(n)?;
        let mean = features.mean(0..n);
        let root = if n <= d {
            let centred = features.centred(0..n, &mean);
            MatRef::from_row_major_slice(&centred, n, d).to_owned() // (N, D)
        } else {
            triangle(features, &mean) // (D, D)
        };
        let largest = largest(root.as_ref());
        let root = scaled(root, largest);
        let scale = largest / ((n - 1) as f64).sqrt();
        let trace = root.squared_norm_l2() * scale * scale;
        Ok(Self {
            n: Some(n as u64),
            mean,
            root,
            scale,
            trace,
        })
    }

    /// Stored or accumulated statistics.
    pub fn from_statistics(statistics: &Statistics) -> Result<Self> {
        let d = statistics.columns();
        let covariance = statistics.covariance_matrix();
        let trace = (0..d).map(|i| covariance[(i, i)].max(0.0)).sum();
        let largest = largest(covariance);
        let root = root_of(&scaled(covariance.to_owned(), largest))?;
        Ok(Self {
            n: statistics.n(),
            mean: statistics.mean().to_vec(),
            root,
            scale: largest.sqrt(),
            trace,
        })
    }

    /// Number of rows behind it, where known.
    pub fn n(&self) -> Option<u64> {
        self.n
    }

    /// Dimension D.
    pub fn columns(&self) -> usize {
        self.mean.len()
    }
}

/// A covariance needs two rows.
pub(crate) fn check_rows(n: usize) -> Result<()> {
    if n >= 2 {
        return Ok(());
    }
    Err(Error::TooFewRows {
        what: "a Fréchet distance",
        expected: 2,
        found: n,
        advice: "add more images",
    })
}

/// A Fréchet distance and its parts: `distance` = `mean_term` + `trace_first` + `trace_second` − 2·`trace_sqrt`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Frechet {
    /// The squared distance that is called FID. Rounding may leave it slightly below zero for equal
    /// sets; it is never clamped, so that a real error shows.
    pub distance: f64,
    /// |μ₁ − μ₂|².
    pub mean_term: f64,
    /// tr Σ₁.
    pub trace_first: f64,
    /// tr Σ₂.
    pub trace_second: f64,
    /// tr (Σ₁Σ₂)^½.
    pub trace_sqrt: f64,
}

/// |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ (Dowson & Landau 1982; Heusel et al. 2017), in f64.
///
/// Σ₁Σ₂ has the eigenvalues of MMᵀ with M = R₁R₂ᵀ, so the last trace is the sum of the singular values
/// of M: no unsymmetric square root, right at any rank, never NaN.
///
/// # Errors
/// When the dimensions differ, or the result is beyond the range of f64.
pub fn frechet_distance(first: &Gaussian, second: &Gaussian) -> Result<Frechet> {
    same_columns(first.columns(), second.columns())?;
    let mean_term: f64 = first
        .mean
        .iter()
        .zip(&second.mean)
        .map(|(a, b)| (a - b) * (a - b))
        .sum();
    let cross = &first.root * second.root.transpose(); // (rank 1, rank 2)
    let trace_sqrt = nuclear_norm(cross)? * first.scale * second.scale;
    let distance = mean_term + first.trace + second.trace - 2.0 * trace_sqrt;
    if !distance.is_finite() {
        return Err(Error::Numerics(format!(
            "the Fréchet distance exceeds the range of f64 (mean term {mean_term:e}, traces {:e} and {:e}); \
             check the scale of the features",
            first.trace, second.trace
        )));
    }
    Ok(Frechet {
        distance,
        mean_term,
        trace_first: first.trace,
        trace_second: second.trace,
        trace_sqrt,
    })
}

/// The triangle R (D × D) of the QR decomposition of the centred features, N > D, folded over blocks
/// of rows so that the f64 copy of the features never stands in memory at once.
fn triangle(features: FeatureMatrix<'_>, mean: &[f64]) -> Mat<f64> {
    let d = features.columns();
    let mut root = Mat::<f64>::zeros(0, d);
    for range in ranges(features.rows(), QR_ROWS.max(2 * d)) {
        let above = root.nrows();
        let block = features.centred(range.clone(), mean);
        let stack = Mat::from_fn(above + range.len(), d, |i, j| {
            if i < above {
                root[(i, j)]
            } else {
                block[(i - above) * d + j]
            }
        }); // (rows so far + block, D)
        root = stack.qr().thin_R().to_owned(); // (min(rows, D), D)
    }
    root
}

/// R (rank × D) with RᵀR = `covariance` (D × D), whose entries are at most 1.
fn root_of(covariance: &Mat<f64>) -> Result<Mat<f64>> {
    let d = covariance.nrows();
    if let Ok(cholesky) = covariance.llt(Side::Lower) {
        let l = cholesky.L();
        if (0..d).all(|i| l[(i, i)] * l[(i, i)] > TRUSTED_PIVOT) {
            return Ok(l.transpose().to_owned());
        }
    }
    let eigen = covariance
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| no_convergence("eigenvalues"))?;
    let (values, vectors) = (eigen.S().column_vector(), eigen.U());
    let (lowest, highest) = (values[0], values[d - 1]);
    if lowest < -INDEFINITE * highest.max(0.0) {
        return Err(Error::Statistics(format!(
            "the covariance has an eigenvalue of {:.3} times the largest, expected none below zero; the file is damaged or no covariance",
            lowest / highest.abs()
        )));
    }
    // Rounding fills the null space with eigenvalues of this size; each would add its square root.
    let rounding = d as f64 * f64::EPSILON * highest;
    let kept: Vec<usize> = (0..d).filter(|&i| values[i] > rounding).collect();
    Ok(Mat::from_fn(kept.len(), d, |row, j| {
        values[kept[row]].sqrt() * vectors[(j, kept[row])]
    })) // (rank, D)
}

/// Sum of the singular values.
fn nuclear_norm(matrix: Mat<f64>) -> Result<f64> {
    let largest = largest(matrix.as_ref());
    if largest == 0.0 {
        return Ok(0.0);
    }
    let values = scaled(matrix, largest)
        .singular_values()
        .map_err(|_| no_convergence("singular values"))?;
    // Smallest first, so that the sum loses nothing to the large ones.
    let sum: f64 = values.iter().rev().sum();
    Ok(sum * largest)
}

/// Largest magnitude of an entry; 0 for an empty matrix.
fn largest(matrix: MatRef<'_, f64>) -> f64 {
    if matrix.nrows() == 0 || matrix.ncols() == 0 {
        0.0
    } else {
        matrix.norm_max()
    }
}

/// The matrix divided by `largest`, unless that is zero.
fn scaled(mut matrix: Mat<f64>, largest: f64) -> Mat<f64> {
    if largest > 0.0 {
        for column in matrix.col_iter_mut() {
            column.iter_mut().for_each(|value| *value /= largest);
        }
    }
    matrix
}

fn no_convergence(what: &str) -> Error {
    Error::Numerics(format!(
        "the {what} of the covariances did not converge; check the scale of the features"
    ))
}
