use candle_core::Tensor;
use tinyfusion_core::Result;
use tinyfusion_nn::Scope;
use tinyfusion_nn::layers::{Conv, GroupNorm};

use super::blocks::{Blocks, Middle, conv1, conv3, norm};
use super::config::VaeConfig;

/// From an image to moments.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    pub(super) conv_in: Conv,
    pub(super) stages: Vec<Blocks>,
    pub(super) middle: Middle,
    pub(super) norm_out: GroupNorm,
    pub(super) conv_out: Conv,
    pub(super) quant: Option<Conv>,
}

impl Encoder {
    /// Takes `encoder` and `quant_conv` of `root`.
    pub(super) fn load(root: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let (at, stages) = (root.at("encoder"), config.down());
        let (deepest, moments) = (config.deepest(), 2 * config.latent_channels);
        let first = config.block_out_channels[0];
        let stage = |(i, &stage)| Blocks::down(&at.at("down_blocks").at(i), stage, config);
        let quant = || conv1(&root.at("quant_conv"), moments, moments);
        Ok(Self {
            conv_in: conv3(&at.at("conv_in"), config.in_channels, first)?,
            stages: stages
                .iter()
                .enumerate()
                .map(stage)
                .collect::<Result<_>>()?,
            middle: Middle::load(&at.at("mid_block"), config)?,
            norm_out: norm(&at.at("conv_norm_out"), deepest, config)?,
            conv_out: conv3(&at.at("conv_out"), deepest, moments)?,
            quant: config.use_quant_conv.then(quant).transpose()?,
        })
    }

    /// (B, 3, H, W) → (B, 2·L, H/f, W/f).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?; // (B, C₀, H, W)
        for stage in &self.stages {
            h = stage.forward(&h)?; // (B, Cᵢ, H/2ⁱ⁺¹, W/2ⁱ⁺¹), the last stage at the size of the one before
        }
        let h = self.middle.forward(&h)?; // (B, C, h, w)
        let h = self.conv_out.forward(&self.norm_out.forward_silu(&h)?)?; // (B, 2·L, h, w)
        match &self.quant {
            None => Ok(h),
            Some(quant) => quant.forward(&h), // (B, 2·L, h, w)
        }
    }
}

/// From a latent to an image.
#[derive(Debug, Clone)]
pub(super) struct Decoder {
    pub(super) post_quant: Option<Conv>,
    pub(super) conv_in: Conv,
    pub(super) middle: Middle,
    pub(super) stages: Vec<Blocks>,
    pub(super) norm_out: GroupNorm,
    pub(super) conv_out: Conv,
}

impl Decoder {
    /// Takes `decoder` and `post_quant_conv` of `root`.
    pub(super) fn load(root: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let (at, stages) = (root.at("decoder"), config.up());
        let (latent, first) = (config.latent_channels, config.block_out_channels[0]);
        let stage = |(i, &stage)| Blocks::up(&at.at("up_blocks").at(i), stage, config);
        let post_quant = || conv1(&root.at("post_quant_conv"), latent, latent);
        Ok(Self {
            post_quant: config.use_post_quant_conv.then(post_quant).transpose()?,
            conv_in: conv3(&at.at("conv_in"), latent, config.deepest())?,
            middle: Middle::load(&at.at("mid_block"), config)?,
            stages: stages
                .iter()
                .enumerate()
                .map(stage)
                .collect::<Result<_>>()?,
            norm_out: norm(&at.at("conv_norm_out"), first, config)?,
            conv_out: conv3(&at.at("conv_out"), first, config.out_channels)?,
        })
    }

    /// (B, L, h, w) → (B, 3, h·f, w·f).
    pub(super) fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let z = match &self.post_quant {
            None => z.clone(),
            Some(post_quant) => post_quant.forward(z)?, // (B, L, h, w)
        };
        let h = self.conv_in.forward(&z)?; // (B, C, h, w)
        let mut h = self.middle.forward(&h)?; // (B, C, h, w)
        for stage in &self.stages {
            h = stage.forward(&h)?; // (B, Cᵢ, h·2ⁱ⁺¹, w·2ⁱ⁺¹), the last stage at the size of the one before
        }
        self.conv_out.forward(&self.norm_out.forward_silu(&h)?) // (B, 3, h·f, w·f)
    }
}
