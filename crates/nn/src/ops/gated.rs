use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};

use super::{host, is_fused_with, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::elementwise::{gated_residual as forward, gated_residual_backward};
use crate::tape::apply3;

/// x + gate·y for x, y (B, T, D), where the gate of sample b is chunk `chunk` of row b of
/// `modulation` (B, k·D).
///
/// In the type of x, which may be f32 where y and the gate are bf16.
///
/// The gate stays inside the packed projection: no chunk is copied out, and its gradient comes back
/// packed.
pub fn gated_residual(x: &Tensor, y: &Tensor, modulation: &Tensor, chunk: usize) -> Result<Tensor> {
    let (b, t, d) = x.dims3()?;
    let (mb, width) = modulation.dims2()?;
    if y.dims() != x.dims() || mb != b || (chunk + 1) * d > width {
        bail!(
            "gated residual: x {:?}, y {:?} and chunk {chunk} of {:?} do not fit",
            x.dims(),
            y.dims(),
            modulation.dims()
        );
    }
    if !is_fused_with(x, &[y, modulation]) {
        if [y.dtype(), modulation.dtype()] != [x.dtype(); 2] {
            let (y, modulation) = (y.to_dtype(x.dtype())?, modulation.to_dtype(x.dtype())?);
            return gated_residual(x, &y, &modulation, chunk);
        }
        let gate = modulation.narrow(1, chunk * d, d)?.unsqueeze(1)?; // (B, 1, D)
        return x + y.broadcast_mul(&gate)?;
    }
    let op = GatedResidual { chunk, t, d };
    apply3(
        &x.contiguous()?,
        &y.contiguous()?,
        &modulation.contiguous()?,
        op,
    )
}

struct GatedResidual {
    chunk: usize,
    t: usize,
    d: usize,
}

#[cfg(feature = "cuda")]
impl GatedResidual {
    fn gate(&self, width: usize) -> cuda::elementwise::Gate {
        cuda::elementwise::Gate {
            at: self.chunk * self.d,
            width,
            t: self.t,
            d: self.d,
        }
    }
}

impl CustomOp3 for GatedResidual {
    fn name(&self) -> &'static str {
        "gated-residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = ml.shape().dims2()?;
        let gate = &values(m, ml)?[self.chunk * self.d..];
        let out = forward(values(x, xl)?, values(y, yl)?, gate, width, self.t, self.d);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
        m: &CudaStorage,
        ml: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (b, width) = ml.shape().dims2()?;
        let dtype = x.dtype();
        let (x, y, m) = (
            cuda::View::new(x, xl)?,
            cuda::View::new(y, yl)?,
            cuda::View::new(m, ml)?,
        );
        let out = cuda::elementwise::gated(Some(x), y, m, b * self.t, self.gate(width), dtype)?;
        Ok((out, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        m: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, width) = m.dims2()?;
        #[cfg(feature = "cuda")]
        if m.device().is_cuda() {
            let (dy, dm) = cuda::elementwise::gated_backward(dout, y, m, self.gate(width))?;
            return Ok((x.track_op().then(|| dout.clone()), dy, dm));
        }
        let at = self.chunk * self.d;
        let (dy, dm) = host!(dout => dout, y => y, m => m; gated_residual_backward(
            dout, y, &m[at..], width, at, width, self.t, self.d,
        ));
        let dx = x.track_op().then(|| dout.clone());
        Ok((
            dx,
            Some(tensor(dy, y.shape())?),
            Some(tensor(dm, m.shape())?),
        ))
    }
}
