use gemm::Parallelism;

use super::{dot, simd};

/// Up to so many rows of A a product is a matter of reading B, which gemm would first copy into its own order.
const FEW_ROWS: usize = 16;

/// A matrix inside a slice: element (r, c) stands at `r·row_stride + c·col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A contiguous row-major matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// Row-major rows that are `row_stride` values apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn fits(&self) -> bool {
        self.rows == 0
            || self.cols == 0
            || (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride
                < self.data.len()
    }
}

/// What becomes of the values already in the destination.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Into {
    /// dst = β·A·B
    Overwrite,
    /// dst = dst + β·A·B
    Accumulate,
}

/// dst (rows `dst_stride` apart) ← β·A·B, on the current rayon pool when the product is large.
pub(crate) fn matmul(
    dst: &mut [f32],
    dst_stride: usize,
    into: Into,
    beta: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    // About 0.1 ms of one core.
    let parallel = a.rows * b.cols * a.cols > 4_000_000 && rayon::current_num_threads() > 1;
    let parallelism = if parallel {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    product(dst, dst_stride, into, beta, a, b, parallelism);
}

/// As [`matmul`] on the calling thread alone, for callers that keep every core busy themselves.
pub(crate) fn matmul_on_one(
    dst: &mut [f32],
    dst_stride: usize,
    into: Into,
    beta: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    product(dst, dst_stride, into, beta, a, b, Parallelism::None);
}

#[allow(unsafe_code)]
fn product(
    dst: &mut [f32],
    dst_stride: usize,
    into: Into,
    beta: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    parallelism: Parallelism,
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert!(b.rows == k, "inner sizes {k} and {}", b.rows);
    assert!(a.fits() && b.fits(), "a matrix reaches past its slice");
    assert!(
        m == 0 || n == 0 || (m - 1) * dst_stride + n <= dst.len() && (n <= dst_stride || m <= 1),
        "the destination is too small"
    );
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        // An empty sum: gemm would leave the destination as it is.
        if into == Into::Overwrite {
            dst.chunks_mut(dst_stride)
                .take(m)
                .for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    if m <= FEW_ROWS && a.col_stride == 1 && (b.row_stride == 1 || b.col_stride == 1) {
        simd(
            #[inline(always)]
            || few_rows(dst, dst_stride, into, beta, a, b),
        );
        return;
    }
    // SAFETY: every element that gemm reads or writes lies inside its slice (asserted above); rows of
    // dst do not overlap (n <= dst_stride) and dst is borrowed mutably, so it aliases neither a nor b.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            into == Into::Accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            beta,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// [`matmul`] that reads B once, as it lies, on one core. A row of the result does not depend on how many there are.
#[inline(always)]
fn few_rows(dst: &mut [f32], dst_stride: usize, into: Into, beta: f32, a: Mat<'_>, b: Mat<'_>) {
    let (k, n) = (a.cols, b.cols);
    let a_rows = || (0..a.rows).map(|r| &a.data[r * a.row_stride..][..k]);
    if into == Into::Overwrite {
        dst.chunks_mut(dst_stride)
            .take(a.rows)
            .for_each(|row| row[..n].fill(0.0));
    }
    if b.row_stride == 1 {
        // The columns of B lie in one piece each: W of x·Wᵀ.
        for j in 0..n {
            let column = &b.data[j * b.col_stride..][..k];
            for (r, row) in a_rows().enumerate() {
                dst[r * dst_stride + j] += beta * dot(row, column);
            }
        }
        return;
    }
    for i in 0..k {
        let row_of_b = &b.data[i * b.row_stride..][..n];
        for (r, row) in a_rows().enumerate() {
            let factor = beta * row[i];
            for (d, v) in dst[r * dst_stride..][..n].iter_mut().zip(row_of_b) {
                *d += factor * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_and_accumulation() {
        // A is the middle two columns of a 3x4 matrix, B the transpose of a 2x2.
        let a: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let b = [1.0, 2.0, 3.0, 4.0];
        let mut dst = vec![10.0; 9];
        let a_mid = Mat::strided(&a[1..], 3, 2, 4);
        matmul(
            &mut dst,
            3,
            Into::Accumulate,
            2.0,
            a_mid,
            Mat::new(&b, 2, 2).t(),
        );
        // Row 0 of A is (1, 2): products 1·1+2·2 = 5 and 1·3+2·4 = 11.
        assert_eq!(&dst[..3], &[20.0, 32.0, 10.0]);
        assert_eq!(&dst[6..], &[10.0 + 2.0 * 29.0, 10.0 + 2.0 * 67.0, 10.0]);
    }

    #[test]
    fn few_rows_and_many_give_the_same_product() {
        let (k, n) = (37, 29);
        let value = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
        for m in [1, 2, FEW_ROWS, FEW_ROWS + 1, 40] {
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..n * k).map(|i| value(i + 13)).collect();
            let start: Vec<f32> = (0..m * n).map(|i| value(i + 5)).collect();
            // B as it lies, and B as the transpose of what lies there.
            for (b, at) in [
                (Mat::new(&b, k, n), (n, 1)),
                (Mat::new(&b, n, k).t(), (1, k)),
            ] {
                for into in [Into::Overwrite, Into::Accumulate] {
                    let mut dst = start.clone();
                    matmul(&mut dst, n, into, 0.5, Mat::new(&a, m, k), b);
                    for r in 0..m {
                        for j in 0..n {
                            let sum: f64 = (0..k)
                                .map(|i| {
                                    f64::from(a[r * k + i]) * f64::from(b.data[i * at.0 + j * at.1])
                                })
                                .sum();
                            let before = if into == Into::Accumulate {
                                start[r * n + j]
                            } else {
                                0.0
                            };
                            let want = f64::from(before) + 0.5 * sum;
                            let found = f64::from(dst[r * n + j]);
                            assert!((found - want).abs() < 1e-5, "{m} rows: {found} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (k, n) = (64, 48);
        let a: Vec<f32> = (0..FEW_ROWS * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.11).cos()).collect();
        let of = |m: usize| {
            let mut dst = vec![0.0; m * n];
            let a = Mat::new(&a[..m * k], m, k);
            matmul(&mut dst, n, Into::Overwrite, 1.0, a, Mat::new(&b, n, k).t());
            dst
        };
        let all = of(FEW_ROWS);
        for m in 1..FEW_ROWS {
            assert_eq!(of(m), all[..m * n], "{m} rows");
        }
    }
}
