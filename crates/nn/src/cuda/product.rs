use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{WrapErr, gemm_reduced_precision_f32};
use candle_core::{CudaStorage, DType, Result, bail};

use super::{View, pointer, pointer_mut};
use crate::kernels::matmul::Into;

/// A row-major matrix of f32 or bf16, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    values: View<'a>,
    rows: usize,
    cols: usize,
    /// Columns of the matrix as it is stored, whose rows they are where it is transposed.
    stride: usize,
    transposed: bool,
}

impl<'a> Mat<'a> {
    pub(crate) fn new(values: View<'a>, rows: usize, cols: usize) -> Self {
        Self {
            values,
            rows,
            cols,
            stride: cols,
            transposed: false,
        }
    }

    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            transposed: !self.transposed,
            ..self
        }
    }

    fn op(self) -> sys::cublasOperation_t {
        match self.transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        }
    }
}

/// dst ← by·a·b, from value `from` of `dst` on: a (m, k) and b (k, n) of one type, dst (m, n) of theirs or f32. Summed in f32;
/// f32 is rounded to TF32 where candle is told so.
///
/// candle's own product makes a new tensor of the operands' type: gradients of f32 weights of bf16 layers would be rounded,
/// converted, and added to the others in passes of their own.
pub(crate) fn product(
    dst: &mut CudaStorage,
    from: usize,
    into: Into,
    by: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) -> Result<()> {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let dtype = a.values.dtype();
    if b.rows != k || b.values.dtype() != dtype {
        bail!(
            "a product of ({m}, {k}) {dtype:?} and ({}, {n}) {:?}",
            b.rows,
            b.values.dtype()
        );
    }
    let compute = match dtype {
        DType::F32 if gemm_reduced_precision_f32() => {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        }
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let size = |n: usize| match i32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("cuBLAS counts up to {}, found {n}", i32::MAX),
    };
    let beta = match into {
        Into::Overwrite => 0f32,
        Into::Accumulate => 1.0,
    };
    let device = a.values.device().clone();
    let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
    let (dst_type, dst_size) = (cuda_type(dst.dtype())?, dst.dtype().size_in_bytes());
    let at = |mat: Mat<'_>, pointer: u64| {
        pointer + (mat.values.start * mat.values.dtype().size_in_bytes()) as u64
    };
    let (a_at, _a) = pointer(a.values.storage, &stream)?;
    let (b_at, _b) = pointer(b.values.storage, &stream)?;
    let (dst_at, _dst) = pointer_mut(dst, &stream)?;
    // cuBLAS has matrices by columns: a row-major matrix is the transpose of one of those, and so dstᵀ = bᵀ·aᵀ is asked for.
    // SAFETY: the pointers are of live memory of this stream, kept by their guards; the callers' views hold the sizes named.
    #[allow(unsafe_code)]
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            b.op(),
            a.op(),
            size(n)?,
            size(m)?,
            size(k)?,
            (&raw const by).cast(),
            at(b, b_at) as *const _,
            cuda_type(dtype)?,
            size(b.stride)?,
            at(a, a_at) as *const _,
            cuda_type(dtype)?,
            size(a.stride)?,
            (&raw const beta).cast(),
            (dst_at + (from * dst_size) as u64) as *mut _,
            dst_type,
            size(n)?,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}

fn cuda_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => bail!("a product of {other:?}; f32 and bf16 are known"),
    }
}
