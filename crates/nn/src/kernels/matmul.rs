use gemm::Parallelism;

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
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Into {
    /// dst = β·A·B
    Overwrite,
    /// dst = dst + β·A·B
    Accumulate,
}

/// dst (rows `dst_stride` apart) ← β·A·B, on the current rayon pool when the product is large.
#[allow(unsafe_code)]
pub(crate) fn matmul(
    dst: &mut [f32],
    dst_stride: usize,
    into: Into,
    beta: f32,
    a: Mat<'_>,
    b: Mat<'_>,
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
    // About 0.1 ms of one core.
    let parallel = m * n * k > 4_000_000 && rayon::current_num_threads() > 1;
    let parallelism = if parallel {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
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
}
