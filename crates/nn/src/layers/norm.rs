use candle_core::{DType, Tensor};
use tinyfusion_core::Result;

use crate::{Scope, ops};

/// LayerNorm with weights: LN(x)·weight + bias over the last axis.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor, // (D,)
    bias: Tensor,   // (D,)
    eps: f64,
}

impl LayerNorm {
    /// Takes `weight` (D,) and `bias` (D,).
    pub fn load(scope: &Scope<'_>, width: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: scope.get("weight", &[width])?,
            bias: scope.get("bias", &[width])?,
            eps,
        })
    }

    /// (…, D) → (…, D).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_in(x, x.dtype())
    }

    /// (…, D) → (…, D) in `dtype`.
    pub fn forward_in(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let Self { weight, bias, eps } = self;
        Ok(ops::layer_norm_in(x, weight, bias, *eps, dtype)?)
    }
}
