use std::ops::Range;

use crate::{Error, Result};

/// N feature vectors of dimension D: borrowed f32 values, row-major (N × D), all finite.
///
/// Logits are feature matrices too (N × classes).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FeatureMatrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
}

impl<'a> FeatureMatrix<'a> {
    /// A view of `rows` × `columns` row-major values.
    ///
    /// # Errors
    /// When the length does not fit, a side is zero, or a value is NaN or infinite.
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Result<Self> {
        if rows == 0 || columns == 0 {
            return Err(Error::Empty { rows, columns });
        }
        if rows.checked_mul(columns) != Some(values.len()) {
            return Err(Error::Length {
                rows,
                columns,
                found: values.len(),
            });
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFinite {
                row: at / columns,
                column: at % columns,
                value: f64::from(values[at]),
            });
        }
        Ok(Self {
            values,
            rows,
            columns,
        })
    }

    /// Number of vectors N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Dimension D of each vector.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All values, row-major (N × D).
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// Vector `index` (D); panics when `index` is not below [`rows`](Self::rows), as slices do.
    pub fn row(&self, index: usize) -> &'a [f32] {
        &self.values[index * self.columns..][..self.columns]
    }

    /// The vectors in order, each (D).
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [f32]> + use<'a> {
        self.values.chunks_exact(self.columns)
    }

    /// Both sides have the same D, or an error that names both.
    pub(crate) fn same_columns(&self, other: &Self) -> Result<()> {
        same_columns(self.columns, other.columns)
    }

    /// Rows of `range` in f64, row-major.
    pub(crate) fn to_f64(self, range: Range<usize>) -> Vec<f64> {
        self.values[range.start * self.columns..range.end * self.columns]
            .iter()
            .map(|&value| f64::from(value))
            .collect()
    }

    /// Rows of `range` in f64 with `mean` (D) taken off, row-major.
    pub(crate) fn centred(self, range: Range<usize>, mean: &[f64]) -> Vec<f64> {
        self.values[range.start * self.columns..range.end * self.columns]
            .chunks_exact(self.columns)
            .flat_map(|row| {
                row.iter()
                    .zip(mean)
                    .map(|(&value, mean)| f64::from(value) - mean)
            })
            .collect()
    }

    /// Mean of the rows of `range` (D), summed in f64.
    pub(crate) fn mean(self, range: Range<usize>) -> Vec<f64> {
        let mut mean = vec![0.0; self.columns];
        let count = range.len() as f64;
        for row in range {
            for (sum, &value) in mean.iter_mut().zip(self.row(row)) {
                *sum += f64::from(value);
            }
        }
        mean.iter_mut().for_each(|sum| *sum /= count);
        mean
    }
}

/// Equal dimensions on both sides, or an error that names both.
pub(crate) fn same_columns(first: usize, second: usize) -> Result<()> {
    if first == second {
        Ok(())
    } else {
        Err(Error::Mismatch {
            what: "feature dimensions",
            first,
            second,
        })
    }
}

/// 0..n cut into ranges of at most `size`.
pub(crate) fn ranges(n: usize, size: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    (0..n.div_ceil(size)).map(move |i| i * size..((i + 1) * size).min(n))
}
