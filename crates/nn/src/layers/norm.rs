use candle_core::Tensor;
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
        Ok(ops::layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}
