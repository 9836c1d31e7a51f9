#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{host, is_fused, tensor, values};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::elementwise::{Act, act, act_backward};
use crate::tape::apply1;

/// GELU in its tanh form, 0.5·x·(1 + tanh(√(2/π)(x + 0.044715x³))); any shape.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if is_fused(&[x]) {
        apply1(&x.contiguous()?, Activation(Act::GeluTanh))
    } else {
        x.gelu()
    }
}

/// Exact GELU, x·Φ(x) with the normal distribution function Φ (Hendrycks & Gimpel 2016, arXiv 1606.08415); any shape.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    if is_fused(&[x]) {
        apply1(&x.contiguous()?, Activation(Act::GeluErf))
    } else {
        x.gelu_erf()
    }
}

/// SiLU, x·σ(x); any shape.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if is_fused(&[x]) {
        apply1(&x.contiguous()?, Activation(Act::Silu))
    } else {
        x.silu()
    }
}

struct Activation(Act);

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((
            CpuStorage::F32(act(self.0, values(x, xl)?)),
            xl.shape().clone(),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (x, n) = (cuda::View::new(x, xl)?, xl.shape().elem_count());
        Ok((cuda::elementwise::act(self.0, x, n)?, xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::elementwise::act_backward(self.0, x, dy).map(Some);
        }
        let dx = host!(x => x_values, dy => dy; act_backward(self.0, x_values, dy));
        Ok(Some(tensor(dx, x.shape())?))
    }
}
