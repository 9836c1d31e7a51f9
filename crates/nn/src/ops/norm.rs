use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail,
};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};

use super::{host, is_fused, is_fused_with, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::elementwise::sum_rows;
use crate::kernels::matmul::Into;
use crate::kernels::norm::{Affine, layer_norm as forward, layer_norm_backward};
use crate::kernels::unwritten;
use crate::tape::{apply2, apply3};

/// modulate(LayerNorm(x), shift, scale) = LN(x)·(1 + scale) + shift for x (B, T, D), LayerNorm without
/// weights; shift and scale are chunks of the packed adaLN projection `modulation` (B, k·D).
///
/// In the type of `modulation`, computed in that of x: a residual stream may be f32 where what reads it is bf16.
///
/// Peebles & Xie 2023 (DiT), `modulate`.
pub fn layer_norm_modulate(
    x: &Tensor,
    modulation: &Tensor,
    shift_chunk: usize,
    scale_chunk: usize,
    eps: f64,
) -> Result<Tensor> {
    let (b, t, d) = x.dims3()?;
    let (mb, width) = modulation.dims2()?;
    if mb != b || (shift_chunk.max(scale_chunk) + 1) * d > width {
        bail!(
            "modulate: x {:?} does not fit chunks of {:?}",
            x.dims(),
            modulation.dims()
        );
    }
    if !is_fused_with(x, &[modulation]) {
        if x.dtype() != modulation.dtype() {
            let modulation_too = modulation.to_dtype(x.dtype())?;
            return layer_norm_modulate(x, &modulation_too, shift_chunk, scale_chunk, eps)?
                .to_dtype(modulation.dtype());
        }
        let chunk = |k: usize| modulation.narrow(1, k * d, d)?.unsqueeze(1); // (B, 1, D)
        let scaled = normalize_composed(x, eps)?.broadcast_mul(&(chunk(scale_chunk)? + 1.0)?)?;
        return scaled.broadcast_add(&chunk(shift_chunk)?);
    }
    let op = Modulate {
        shift: shift_chunk * d,
        scale: scale_chunk * d,
        eps: eps as f32,
        t,
        d,
    };
    apply2(&x.contiguous()?, &modulation.contiguous()?, op)
}

/// LN(x)·weight + bias over the last axis; weight, bias (D,), in x's type or rounded to it.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    layer_norm_in(x, weight, bias, eps, x.dtype())
}

/// As [`layer_norm`], rounded to `dtype`: what a layer reads of a residual stream that is f32.
pub fn layer_norm_in(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    let d = x.dim(D::Minus1)?;
    if weight.dims() != [d] || bias.dims() != [d] {
        bail!(
            "layer norm: x {:?}, weight {:?}, bias {:?} do not fit",
            x.dims(),
            weight.dims(),
            bias.dims()
        );
    }
    let (weight, bias) = (&weight.to_dtype(x.dtype())?, &bias.to_dtype(x.dtype())?);
    if !is_fused(&[x, weight, bias]) {
        return normalize_composed(x, eps)?
            .broadcast_mul(weight)?
            .broadcast_add(bias)?
            .to_dtype(dtype);
    }
    // A kernel rounds what it writes to bf16; other types are another pass.
    #[cfg(feature = "cuda")]
    let rounds = x.device().is_cuda() && (x.dtype(), dtype) == (DType::F32, DType::BF16);
    let op = AffineNorm {
        eps: eps as f32,
        d,
        #[cfg(feature = "cuda")]
        dtype: if rounds { dtype } else { x.dtype() },
    };
    let (weight, bias) = (&weight.contiguous()?, &bias.contiguous()?);
    apply3(&x.contiguous()?, weight, bias, op)?.to_dtype(dtype)
}

/// (x − mean)/√(var + ε) over the last axis, from candle's operations.
pub(crate) fn normalize_composed(x: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(var + eps)?.sqrt()?)
}

struct Modulate {
    /// Offsets in a row of the packed modulation.
    shift: usize,
    scale: usize,
    eps: f32,
    t: usize,
    d: usize,
}

impl Modulate {
    fn affine<'a>(&self, m: &'a [f32], width: usize) -> Affine<'a> {
        Affine {
            scale: &m[self.scale..],
            shift: &m[self.shift..],
            stride: width,
            base: 1.0,
        }
    }
}

#[cfg(feature = "cuda")]
impl Modulate {
    fn rows(&self, batch: usize, width: usize) -> cuda::norm::Rows {
        cuda::norm::Rows {
            rows: batch * self.t,
            d: self.d,
            t: self.t,
            stride: width,
            base: 1.0,
            eps: self.eps,
        }
    }
}

impl CustomOp2 for Modulate {
    fn name(&self) -> &'static str {
        "layer-norm-modulate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = ml.shape().dims2()?;
        let affine = self.affine(values(m, ml)?, width);
        let y = forward(values(x, xl)?, &affine, self.eps, self.t, self.d);
        Ok((CpuStorage::F32(y), xl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        m: &CudaStorage,
        ml: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (b, width) = ml.shape().dims2()?;
        let dtype = m.dtype();
        let (x, m) = (cuda::View::new(x, xl)?, cuda::View::new(m, ml)?);
        let (scale, shift) = (m.at(self.scale), m.at(self.shift));
        let y = cuda::norm::layer_norm(x, scale, shift, self.rows(b, width), dtype)?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        m: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, width) = m.dims2()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let rows = self.rows(x.dim(0)?, width);
            return cuda::norm::modulated_backward(dy, x, m, (self.scale, self.shift), rows);
        }
        let (dx, dm) = host!(dy => dy, x => x, m => m; layer_norm_backward(
            dy, x, &self.affine(m, width), self.eps, (self.t, self.d), (self.scale, self.shift), width,
        ));
        Ok((Some(tensor(dx, x.shape())?), Some(tensor(dm, m.shape())?)))
    }
}

/// Rows that one task normalises. All rows share one weight, so any number does; the sums of their gradients are
/// grouped by it, and must not depend on the number of threads.
const ROWS: usize = 64;

struct AffineNorm {
    eps: f32,
    d: usize,
    /// Of the output on a GPU.
    #[cfg(feature = "cuda")]
    dtype: DType,
}

#[cfg(feature = "cuda")]
impl AffineNorm {
    fn rows(&self, shape: &Shape) -> cuda::norm::Rows {
        let rows = shape.elem_count() / self.d;
        cuda::norm::Rows {
            rows,
            d: self.d,
            t: rows,
            stride: 0,
            base: 0.0,
            eps: self.eps,
        }
    }
}

impl CustomOp3 for AffineNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = values(x, xl)?;
        let affine = Affine {
            scale: values(w, wl)?,
            shift: values(b, bl)?,
            stride: 0,
            base: 0.0,
        };
        let y = forward(x, &affine, self.eps, ROWS, self.d);
        Ok((CpuStorage::F32(y), xl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        w: &CudaStorage,
        wl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (x, w, b) = (
            cuda::View::new(x, xl)?,
            cuda::View::new(w, wl)?,
            cuda::View::new(b, bl)?,
        );
        let y = cuda::norm::layer_norm(x, w, b, self.rows(xl.shape()), self.dtype)?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::norm::affine_backward(dy, x, w, b, self.rows(x.shape()));
        }
        let (dx, daffine) = host!(dy => dy, x => x, w => w, b => b; {
            let affine = Affine { scale: w, shift: b, stride: 0, base: 0.0 };
            layer_norm_backward(dy, x, &affine, self.eps, (ROWS, self.d), (0, self.d), 2 * self.d)
        });
        let mut total = unwritten(2 * self.d);
        sum_rows(&daffine, &mut total, Into::Overwrite);
        let (dw, db) = total.split_at(self.d);
        Ok((
            Some(tensor(dx, x.shape())?),
            Some(tensor(dw.to_vec(), self.d)?),
            Some(tensor(db.to_vec(), self.d)?),
        ))
    }
}
