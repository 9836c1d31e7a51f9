#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{host, is_fused, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::elementwise::{Chunks, modulate as forward, modulate_backward};
use crate::tape::apply2;

/// x·(1 + scale) + shift for rows x (N, D), where shift and scale of row n are chunks of row n of the packed
/// projection `modulation` (N, k·D): adaLN behind a norm that has weights of its own. In the type of `modulation`, computed in
/// that of x.
pub fn modulate(
    x: &Tensor,
    modulation: &Tensor,
    shift_chunk: usize,
    scale_chunk: usize,
) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    let (rows, width) = modulation.dims2()?;
    if rows != n || (shift_chunk.max(scale_chunk) + 1) * d > width {
        bail!(
            "modulate: x {:?} does not fit chunks of {:?}",
            x.dims(),
            modulation.dims()
        );
    }
    if x.dtype() != modulation.dtype() {
        let modulation_too = modulation.to_dtype(x.dtype())?;
        return modulate(x, &modulation_too, shift_chunk, scale_chunk)?
            .to_dtype(modulation.dtype());
    }
    if !is_fused(&[x, modulation]) {
        let chunk = |k: usize| modulation.narrow(1, k * d, d); // (N, D)
        return (x * (chunk(scale_chunk)? + 1.0)?)? + chunk(shift_chunk)?;
    }
    let op = Modulate(Chunks {
        shift: shift_chunk * d,
        scale: scale_chunk * d,
        width,
        d,
    });
    apply2(&x.contiguous()?, &modulation.contiguous()?, op)
}

struct Modulate(Chunks);

impl CustomOp2 for Modulate {
    fn name(&self) -> &'static str {
        "modulate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = forward(values(x, xl)?, values(m, ml)?, self.0);
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
        let (rows, _) = xl.shape().dims2()?;
        let (x, m) = (cuda::View::new(x, xl)?, cuda::View::new(m, ml)?);
        let y = cuda::elementwise::modulate(x, m, rows, self.0)?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        m: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::elementwise::modulate_backward(dy, x, m, self.0);
        }
        let (dx, dm) = host!(dy => dy, x => x, m => m; modulate_backward(dy, x, m, self.0));
        Ok((Some(tensor(dx, x.shape())?), Some(tensor(dm, m.shape())?)))
    }
}
