use candle_core::Tensor;
use tinyfusion_core::Result;
use tinyfusion_nn::Scope;
use tinyfusion_nn::layers::{Conv, GroupNorm, PixelAttention};
use tinyfusion_nn::ops::Conv2d;

use super::config::{Stage, VaeConfig};

/// GroupNorm's ε throughout the autoencoder, the attention included.
const EPS: f64 = 1e-6;

/// A 3×3 convolution that keeps the size.
pub(super) fn conv3(scope: &Scope<'_>, inputs: usize, outputs: usize) -> Result<Conv> {
    Conv::load(scope, inputs, outputs, 3, Conv2d::padded(1))
}

/// A convolution of single pixels.
pub(super) fn conv1(scope: &Scope<'_>, inputs: usize, outputs: usize) -> Result<Conv> {
    Conv::load(scope, inputs, outputs, 1, Conv2d::padded(0))
}

/// GroupNorm with the network's groups.
pub(super) fn norm(scope: &Scope<'_>, channels: usize, config: &VaeConfig) -> Result<GroupNorm> {
    GroupNorm::load(scope, channels, config.norm_num_groups, EPS)
}

/// shortcut(x) + conv2(SiLU(GN(conv1(SiLU(GN x))))): LDM's `ResnetBlock` without a time embedding, after He et al. 2016
/// (arXiv 1603.05027).
#[derive(Debug, Clone)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv,
    norm2: GroupNorm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl ResnetBlock {
    fn load(scope: &Scope<'_>, inputs: usize, outputs: usize, config: &VaeConfig) -> Result<Self> {
        let shortcut = || conv1(&scope.at("conv_shortcut"), inputs, outputs);
        Ok(Self {
            norm1: norm(&scope.at("norm1"), inputs, config)?,
            conv1: conv3(&scope.at("conv1"), inputs, outputs)?,
            norm2: norm(&scope.at("norm2"), outputs, config)?,
            conv2: conv3(&scope.at("conv2"), outputs, outputs)?,
            shortcut: (inputs != outputs).then(shortcut).transpose()?,
        })
    }

    /// (B, C, H, W) → (B, O, H, W).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?; // (B, O, H, W)
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?; // (B, O, H, W)
        Ok(match &self.shortcut {
            None => (x + h)?,
            Some(shortcut) => (shortcut.forward(x)? + h)?, // (B, O, H, W)
        })
    }
}

/// Residual blocks, perhaps each followed by attention, and a resampling unless it is the last stage.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    resnets: Vec<ResnetBlock>,
    /// One per block, or none.
    attentions: Vec<PixelAttention>,
    resampling: Option<Conv>,
}

impl Blocks {
    /// A stage of the encoder. Its downsampling pads right and bottom by one, then strides by 2.
    pub(super) fn down(scope: &Scope<'_>, stage: Stage, config: &VaeConfig) -> Result<Self> {
        let halve = Conv2d {
            stride: 2,
            before: 0,
            after: 1,
            upsample: 1,
        };
        Self::load(scope, stage, config, ("downsamplers.0.conv", halve))
    }

    /// A stage of the decoder. Its upsampling repeats every pixel in a square of four, then convolves.
    pub(super) fn up(scope: &Scope<'_>, stage: Stage, config: &VaeConfig) -> Result<Self> {
        let double = Conv2d {
            upsample: 2,
            ..Conv2d::padded(1)
        };
        Self::load(scope, stage, config, ("upsamplers.0.conv", double))
    }

    fn load(
        scope: &Scope<'_>,
        stage: Stage,
        config: &VaeConfig,
        (name, conv): (&str, Conv2d),
    ) -> Result<Self> {
        let c = stage.outputs;
        let resnet = |j: usize| {
            let at = scope.at("resnets").at(j);
            ResnetBlock::load(&at, stage.inputs_of(j), c, config)
        };
        let attention = |j: usize| {
            let at = scope.at("attentions").at(j);
            PixelAttention::load(&at, c, config.norm_num_groups, EPS)
        };
        let attentions = if stage.attention { stage.blocks } else { 0 };
        let resampling = || Conv::load(&scope.at(name), c, c, 3, conv);
        Ok(Self {
            resnets: (0..stage.blocks).map(resnet).collect::<Result<_>>()?,
            attentions: (0..attentions).map(attention).collect::<Result<_>>()?,
            resampling: stage.resamples.then(resampling).transpose()?,
        })
    }

    /// (B, C, H, W) → (B, O, H', W'), half or twice the size where it resamples.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (j, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x)?; // (B, O, H, W)
            if let Some(attention) = self.attentions.get(j) {
                x = attention.forward(&x)?; // (B, O, H, W)
            }
        }
        match &self.resampling {
            None => Ok(x),
            Some(conv) => conv.forward(&x), // (B, O, H', W')
        }
    }
}

/// A residual block, attention, a residual block, at the latent's size.
#[derive(Debug, Clone)]
pub(super) struct Middle {
    pub(super) first: ResnetBlock,
    pub(super) attention: Option<PixelAttention>,
    pub(super) second: ResnetBlock,
}

impl Middle {
    pub(super) fn load(scope: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let (c, groups) = (config.deepest(), config.norm_num_groups);
        let resnet = |j: usize| ResnetBlock::load(&scope.at("resnets").at(j), c, c, config);
        let attention = || PixelAttention::load(&scope.at("attentions.0"), c, groups, EPS);
        let attends = config.mid_block_add_attention;
        Ok(Self {
            first: resnet(0)?,
            attention: attends.then(attention).transpose()?,
            second: resnet(1)?,
        })
    }

    /// (B, C, h, w) → (B, C, h, w).
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.first.forward(x)?; // (B, C, h, w)
        let x = match &self.attention {
            None => x,
            Some(attention) => attention.forward(&x)?, // (B, C, h, w)
        };
        self.second.forward(&x)
    }
}
