use std::borrow::Cow;
use std::ops::Range;

use faer::{Accum, Mat, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use crate::FeatureMatrix;

/// Largest magnitudes of a set at which products of its values neither overflow nor vanish in f32.
const COMFORTABLE: Range<f32> = 1e-6..1e6;

/// Feature vectors with their squared lengths, between which distances are taken block by block.
pub(crate) struct Points<'a> {
    features: FeatureMatrix<'a>,
    /// The features divided by `factor`, a power of two.
    scaled: Cow<'a, [f32]>,
    factor: f64,
    squared_norms: Vec<f64>,
    norms: Vec<f64>,
    largest_norm: f64,
}

impl<'a> Points<'a> {
    pub(crate) fn new(features: FeatureMatrix<'a>) -> Self {
        let squared_norms: Vec<f64> = features
            .values()
            .par_chunks_exact(features.columns())
            .map(|row| sum_of(row, row, |u, v| u * v))
            .collect();
        let norms: Vec<f64> = squared_norms.iter().map(|n| n.sqrt()).collect();
        let largest = features.values().iter().fold(0f32, |m, v| m.max(v.abs()));
        let (scaled, factor) = if largest == 0.0 || COMFORTABLE.contains(&largest) {
            (Cow::Borrowed(features.values()), 1.0)
        } else {
            let factor = f64::from(largest).log2().floor().exp2();
            let divided = |&value: &f32| (f64::from(value) / factor) as f32;
            (features.values().iter().map(divided).collect(), factor)
        };
        Self {
            features,
            scaled,
            factor,
            largest_norm: norms.iter().copied().fold(0.0, f64::max),
            norms,
            squared_norms,
        }
    }

    /// Number of points N.
    pub(crate) fn len(&self) -> usize {
        self.features.rows()
    }

    /// |u − v|² of point `i` and point `j` of `other`, summed from the differences: symmetric, exactly
    /// zero for equal points, and the same wherever the pair turns up.
    pub(crate) fn exact(&self, i: usize, other: &Self, j: usize) -> f64 {
        let (u, v) = (self.features.row(i), other.features.row(j));
        sum_of(u, v, |u, v| (u - v) * (u - v))
    }

    /// max(|u|² − 2 u·v + |v|², 0) between the points `rows` and the points `others` of `other`, with the products
    /// u·v in f32.
    ///
    /// Runs on the calling thread; the callers spread the blocks.
    pub(crate) fn distances<'b>(
        &'b self,
        rows: Range<usize>,
        other: &'b Self,
        others: Range<usize>,
    ) -> Distances<'b> {
        let d = self.features.columns();
        let matrix = |points: &'b Self, range: &Range<usize>| {
            let values = &points.scaled[range.start * d..range.end * d];
            MatRef::from_row_major_slice(values, range.len(), d)
        };
        let mut products = Mat::zeros(others.len(), rows.len()); // (others, rows)
        matmul(
            &mut products,
            Accum::Replace,
            matrix(other, &others),
            matrix(self, &rows).transpose(),
            1.0,
            Par::Seq,
        );
        Distances {
            products,
            factor: self.factor * other.factor,
            norms: &self.squared_norms[rows],
            other_norms: &other.squared_norms[others],
        }
    }

    /// Bound on how far a value of [`distances`](Self::distances) for point `i` and point `j` of `other`
    /// can be from [`exact`](Self::exact).
    pub(crate) fn rounding(&self, i: usize, other: &Self, j: usize) -> f64 {
        self.rounding_to(i, other, other.norms[j])
    }

    /// The same for point `i` and any of `other`.
    pub(crate) fn rounding_to_any(&self, i: usize, other: &Self) -> f64 {
        self.rounding_to(i, other, other.largest_norm)
    }

    fn rounding_to(&self, i: usize, other: &Self, norm: f64) -> f64 {
        let d = (self.features.columns() + 4) as f64;
        let product = self.norms[i] * norm; // |u||v| >= Σ|uᵢvᵢ|
        // 2 u·v is off by at most 2γ|u||v| in f32, γ = D·u/(1 − D·u) with u = 2⁻²⁴ (Higham 2002, §3.1), here doubled
        // for the denominator and the scaling; by D of the smallest f32 where products of scaled values vanish;
        // the sums in f64 add their share.
        let single = 2.0 * d * f64::from(f32::EPSILON) * product;
        let vanished = 4.0 * d * f64::from(f32::MIN_POSITIVE) * self.factor * other.factor;
        let double = 4.0 * d * f64::EPSILON * (self.squared_norms[i] + norm * norm);
        single + vanished + double
    }
}

/// Squared distances between two blocks of [`Points`].
pub(crate) struct Distances<'a> {
    products: Mat<f32>, // (others, rows)
    factor: f64,
    norms: &'a [f64],
    other_norms: &'a [f64],
}

impl Distances<'_> {
    /// The distances of the block's row `row` to the others, into `out` (others).
    pub(crate) fn of(&self, row: usize, out: &mut Vec<f64>) {
        let norm = self.norms[row];
        let products = self.products.col_as_slice(row);
        out.clear();
        out.extend(
            products
                .iter()
                .zip(self.other_norms)
                .map(|(&product, other)| {
                    (norm - 2.0 * self.factor * f64::from(product) + other).max(0.0)
                }),
        );
    }
}

/// Σ f(uᵢ, vᵢ) in f64, in eight sums that the compiler can keep side by side; always in the same order.
fn sum_of(u: &[f32], v: &[f32], f: impl Fn(f64, f64) -> f64) -> f64 {
    let (u, u_rest) = u.as_chunks::<8>();
    let (v, v_rest) = v.as_chunks::<8>();
    let mut sums = [0f64; 8];
    for (u, v) in u.iter().zip(v) {
        for lane in 0..8 {
            sums[lane] += f(f64::from(u[lane]), f64::from(v[lane]));
        }
    }
    let rest = u_rest.iter().zip(v_rest);
    rest.fold(sums.iter().sum(), |sum, (&u, &v)| {
        sum + f(f64::from(u), f64::from(v))
    })
}
