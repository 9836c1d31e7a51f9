use std::ops::Range;

use faer::{Accum, Mat, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use crate::FeatureMatrix;

/// Feature vectors with their squared lengths, between which distances are taken block by block.
pub(crate) struct Points<'a> {
    features: FeatureMatrix<'a>,
    squared_norms: Vec<f64>,
}

impl<'a> Points<'a> {
    pub(crate) fn new(features: FeatureMatrix<'a>) -> Self {
        let squared_norms = features
            .values()
            .par_chunks_exact(features.columns())
            .map(|row| {
                row.iter()
                    .map(|&value| f64::from(value) * f64::from(value))
                    .sum()
            })
            .collect();
        Self {
            features,
            squared_norms,
        }
    }

    /// Number of points N.
    pub(crate) fn len(&self) -> usize {
        self.features.rows()
    }

    /// The points of `range`, widened to f64 once for many blocks.
    pub(crate) fn block(&self, range: Range<usize>) -> Block<'_> {
        Block {
            columns: self.features.columns(),
            values: self.features.to_f64(range.clone()),
            squared_norms: &self.squared_norms[range],
        }
    }

    /// |u − v|² of point `i` and point `j` of `other`, summed from the differences: symmetric, exactly
    /// zero for equal points, and the same wherever the pair turns up.
    pub(crate) fn exact(&self, i: usize, other: &Self, j: usize) -> f64 {
        self.features
            .row(i)
            .iter()
            .zip(other.features.row(j))
            .map(|(&u, &v)| {
                let difference = f64::from(u) - f64::from(v);
                difference * difference
            })
            .sum()
    }

    /// Bound on how far a value of [`Block::squared_distances`] for point `i` and point `j` of `other`
    /// can be from [`exact`](Self::exact).
    pub(crate) fn rounding(&self, i: usize, other: &Self, j: usize) -> f64 {
        self.rounding_of_row(i, other.squared_norms[j])
    }

    /// The same for point `i` and any point whose squared length is at most `squared_norm`.
    pub(crate) fn rounding_of_row(&self, i: usize, squared_norm: f64) -> f64 {
        // Each of |u|², 2uv and |v|² is a sum of D rounded products: at most γ_D (|u|² + 2|u||v| + |v|²)
        // <= 2 γ_D (|u|² + |v|²); twice that covers the three final additions and the exact sum's own error.
        4.0 * (self.features.columns() + 4) as f64
            * f64::EPSILON
            * (self.squared_norms[i] + squared_norm)
    }

    /// Largest squared length.
    pub(crate) fn largest_squared_norm(&self) -> f64 {
        self.squared_norms.iter().copied().fold(0.0, f64::max)
    }
}

/// Some consecutive [`Points`] in f64.
pub(crate) struct Block<'a> {
    columns: usize,
    values: Vec<f64>,
    squared_norms: &'a [f64],
}

impl Block<'_> {
    /// max(|u|² − 2 u·v + |v|², 0) between the points of this block and those of `others`:
    /// (others, this block), so that the distances of one point of this block are a column, a slice.
    ///
    /// Runs on the calling thread; the callers spread the blocks.
    pub(crate) fn squared_distances(&self, others: &Block<'_>) -> Mat<f64> {
        let mut distances = self.products(others); // (others, this)
        for (column, &norm) in self.squared_norms.iter().enumerate() {
            let column = distances.col_as_slice_mut(column);
            for (value, other) in column.iter_mut().zip(others.squared_norms) {
                *value = (norm - 2.0 * *value + other).max(0.0);
            }
        }
        distances
    }

    /// The dot products u·v: (others, this block).
    pub(crate) fn products(&self, others: &Block<'_>) -> Mat<f64> {
        let this = self.matrix(); // (this, D)
        let others = others.matrix(); // (others, D)
        let mut products = Mat::zeros(others.nrows(), this.nrows());
        matmul(
            &mut products,
            Accum::Replace,
            others,
            this.transpose(),
            1.0,
            Par::Seq,
        );
        products
    }

    fn matrix(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.values, self.squared_norms.len(), self.columns)
    }
}
