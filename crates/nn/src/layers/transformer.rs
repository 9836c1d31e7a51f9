use candle_core::Tensor;
use tinyfusion_core::Result;

use crate::{Scope, layers::Linear, ops};

/// Multi-head self-attention with a packed qkv projection, as timm's `Attention`.
#[derive(Debug, Clone)]
pub struct Attention {
    qkv: Linear,
    proj: Linear,
    heads: usize,
}

impl Attention {
    /// Takes `qkv` (3·D, D) and `proj` (D, D).
    pub fn load(scope: &Scope<'_>, width: usize, heads: usize) -> Result<Self> {
        Self::load_narrow(scope, width, heads, width)
    }

    /// Takes `qkv` (3·inner, D) and `proj` (D, inner): `heads` heads that together are `inner` wide.
    pub fn load_narrow(
        scope: &Scope<'_>,
        width: usize,
        heads: usize,
        inner: usize,
    ) -> Result<Self> {
        Ok(Self {
            qkv: Linear::load(&scope.at("qkv"), width, 3 * inner)?,
            proj: Linear::load(&scope.at("proj"), inner, width)?,
            heads,
        })
    }

    /// (B, T, D) → (B, T, D).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?; // (B, T, 3·inner)
        self.proj.forward(&ops::attention(&qkv, self.heads)?) // (B, T, D)
    }
}

/// fc2(GELU-tanh(fc1(x))), as timm's `Mlp`.
#[derive(Debug, Clone)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    /// Takes `fc1` (hidden, D) and `fc2` (D, hidden).
    pub fn load(scope: &Scope<'_>, width: usize, hidden: usize) -> Result<Self> {
        Ok(Self {
            fc1: Linear::load(&scope.at("fc1"), width, hidden)?,
            fc2: Linear::load(&scope.at("fc2"), hidden, width)?,
        })
    }

    /// (B, T, D) → (B, T, D).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.fc1.forward_gelu(x)?)
    }
}
