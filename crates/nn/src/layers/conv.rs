use candle_core::Tensor;
use tinyfusion_core::Result;

use crate::ops::{self, Conv2d};
use crate::{Scope, layers::Linear};

/// Convolution with a square kernel and a bias; for inference, see [`ops::conv2d`].
#[derive(Debug, Clone)]
pub struct Conv {
    weight: Tensor, // (O, C, k, k)
    bias: Tensor,   // (O,)
    conv: Conv2d,
}

impl Conv {
    /// Takes `weight` (O, C, k, k) and `bias` (O,).
    pub fn load(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        conv: Conv2d,
    ) -> Result<Self> {
        Ok(Self {
            weight: scope.get("weight", &[outputs, inputs, kernel, kernel])?,
            bias: scope.get("bias", &[outputs])?,
            conv,
        })
    }

    /// (B, C, H, W) → (B, O, H', W').
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::conv2d(x, &self.weight, &self.bias, self.conv)?)
    }
}

/// GroupNorm with weights; for inference, see [`ops::group_norm`].
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor, // (C,)
    bias: Tensor,   // (C,)
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Takes `weight` (C,) and `bias` (C,).
    pub fn load(scope: &Scope<'_>, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: scope.get("weight", &[channels])?,
            bias: scope.get("bias", &[channels])?,
            groups,
            eps,
        })
    }

    /// (B, C, …) → (B, C, …).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (&self.weight, &self.bias);
        Ok(ops::group_norm(x, weight, bias, self.groups, self.eps)?)
    }

    /// SiLU of [`forward`](Self::forward), in one pass.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (&self.weight, &self.bias);
        Ok(ops::group_norm_silu(
            x,
            weight,
            bias,
            self.groups,
            self.eps,
        )?)
    }
}

/// Self-attention between the pixels of an image, one head as wide as its channels, on the GroupNorm of the image and
/// added to it: diffusers' `Attention` in an autoencoder, LDM's `AttnBlock` (Rombach et al. 2022, arXiv 2112.10752).
#[derive(Debug, Clone)]
pub struct PixelAttention {
    norm: GroupNorm,
    qkv: (Tensor, Tensor), // (3·C, C), (3·C,)
    out: Linear,
}

impl PixelAttention {
    /// Takes `group_norm`, and `to_q`, `to_k`, `to_v`, `to_out.0`, (C, C) each with a bias.
    pub fn load(scope: &Scope<'_>, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        let get = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let parts = ["to_q", "to_k", "to_v"].map(|part| scope.at(part).get(name, shape));
            let [q, k, v] = parts;
            Ok(Tensor::cat(&[q?, k?, v?], 0)?)
        };
        Ok(Self {
            norm: GroupNorm::load(&scope.at("group_norm"), channels, groups, eps)?,
            qkv: (
                get("weight", &[channels, channels])?,
                get("bias", &[channels])?,
            ),
            out: Linear::load(&scope.at("to_out.0"), channels, channels)?,
        })
    }

    /// (B, C, H, W) → (B, C, H, W).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = self.norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?; // (B, H·W, C)
        let (weight, bias) = &self.qkv;
        let qkv = ops::linear(&tokens.contiguous()?, weight, Some(bias))?; // (B, H·W, 3·C)
        let seen = self.out.forward(&ops::attention(&qkv, 1)?)?; // (B, H·W, C)
        let seen = seen.transpose(1, 2)?.reshape(x.shape())?; // (B, C, H, W)
        Ok((x + seen)?)
    }
}
