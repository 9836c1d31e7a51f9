use candle_core::{DType, Tensor};
use tinyfusion_core::Result;
use tinyfusion_nn::layers::{LayerNorm, Linear};
use tinyfusion_nn::ops::{Dropout, attention, attention_dropped, dropout};
use tinyfusion_nn::{Scope, ops};

use super::EPS;
use super::config::Stage;
use crate::BlockWidth;

/// Dropout at the four places of a block.
#[derive(Debug, Clone)]
pub(super) struct BlockDropout {
    /// Of the attention probabilities.
    attn: Dropout,
    /// Behind the attention's projection.
    proj: Dropout,
    /// Behind the MLP's activation.
    hidden: Dropout,
    /// Behind the MLP.
    mlp: Dropout,
}

impl BlockDropout {
    /// For block `i` of the network and samples with these seeds.
    pub(super) fn new(seeds: &[u64], i: usize, attn: f64, proj: f64) -> Result<Self> {
        let at = |rate: f64, place: u64| Dropout::new(rate, seeds, 4 * i as u64 + place);
        Ok(Self {
            attn: at(attn, 0)?,
            proj: at(proj, 1)?,
            hidden: at(proj, 2)?,
            mlp: at(proj, 3)?,
        })
    }
}

/// timm's `Block`: x + attn(norm1(x)), then x + mlp(norm2(x)), with exact GELU.
#[derive(Debug, Clone)]
pub(super) struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
}

impl Block {
    /// A block of `stage`, of its own width.
    pub(super) fn load(scope: &Scope<'_>, stage: Stage, own: BlockWidth) -> Result<Self> {
        let (width, hidden) = (stage.width, own.hidden);
        let inner = own.heads * stage.head_size();
        Ok(Self {
            norm1: LayerNorm::load(&scope.at("norm1"), width, EPS)?,
            qkv: Linear::load(&scope.at("attn.qkv"), width, 3 * inner)?,
            proj: Linear::load(&scope.at("attn.proj"), inner, width)?,
            norm2: LayerNorm::load(&scope.at("norm2"), width, EPS)?,
            fc1: Linear::load(&scope.at("mlp.fc1"), width, hidden)?,
            fc2: Linear::load(&scope.at("mlp.fc2"), hidden, width)?,
            heads: own.heads,
        })
    }

    /// x (B, T, D) → (B, T, D), with products in `dtype`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        drop: Option<&BlockDropout>,
        dtype: DType,
    ) -> Result<Tensor> {
        let normed = self.norm1.forward_in(x, dtype)?; // (B, T, D)
        let qkv = self.qkv.forward(&normed)?; // (B, T, 3·inner)
        let attn = match drop {
            None => attention(&qkv, self.heads)?, // (B, T, inner)
            Some(drop) => attention_dropped(&qkv, self.heads, &drop.attn)?,
        };
        let attn = dropped(self.proj.forward(&attn)?, drop.map(|d| &d.proj))?; // (B, T, D)
        let x = ops::residual(x, &attn)?; // (B, T, D)
        let normed = self.norm2.forward_in(&x, dtype)?; // (B, T, D)
        let hidden = self.fc1.forward_gelu_erf(&normed)?; // (B, T, hidden)
        let hidden = dropped(hidden, drop.map(|d| &d.hidden))?;
        let mlp = dropped(self.fc2.forward(&hidden)?, drop.map(|d| &d.mlp))?; // (B, T, D)
        Ok(ops::residual(&x, &mlp)?)
    }
}

fn dropped(x: Tensor, drop: Option<&Dropout>) -> Result<Tensor> {
    match drop {
        None => Ok(x),
        Some(drop) => Ok(dropout(&x, drop)?),
    }
}

/// The per-token denoiser of the diffusion loss: an MLP whose norms are modulated by time and condition
/// (`SimpleMLPAdaLN`, Li et al. 2024, §4).
#[derive(Debug, Clone)]
pub(super) struct TokenMlp {
    time_embed: tinyfusion_nn::layers::TimestepEmbedder,
    cond_embed: Linear,
    input_proj: Linear,
    blocks: Vec<TokenBlock>,
    modulation: Linear,
    linear: Linear,
}

impl TokenMlp {
    /// Of `depth` blocks and width W for tokens of `channels` under conditions of width `cond`.
    pub(super) fn load(
        scope: &Scope<'_>,
        channels: usize,
        cond: usize,
        width: usize,
        depth: usize,
    ) -> Result<Self> {
        let last = scope.at("final_layer");
        Ok(Self {
            time_embed: tinyfusion_nn::layers::TimestepEmbedder::load(
                &scope.at("time_embed"),
                width,
            )?,
            cond_embed: Linear::load(&scope.at("cond_embed"), cond, width)?,
            input_proj: Linear::load(&scope.at("input_proj"), channels, width)?,
            blocks: (0..depth)
                .map(|i| TokenBlock::load(&scope.at("res_blocks").at(i), width))
                .collect::<Result<_>>()?,
            modulation: Linear::load(&last.at("adaLN_modulation.1"), width, 2 * width)?,
            linear: Linear::load(&last.at("linear"), width, 2 * channels)?,
        })
    }

    /// x (N, C), t (N,), z (N, D) → (N, 2·C).
    pub(super) fn forward(&self, x: &Tensor, t: &Tensor, z: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        let mut x = self.input_proj.forward(x)?.to_dtype(DType::F32)?; // (N, W)
        let c = (self.time_embed.forward(t, dtype)? + self.cond_embed.forward(z)?)?; // (N, W)
        // Every adaLN projection starts with this activation, so it is taken once.
        let c = ops::silu(&c)?;
        for block in &self.blocks {
            x = block.forward(&x, &c)?; // (N, W)
        }
        let m = self.modulation.forward(&c)?; // (N, 2·W): shift, scale
        // A row is a sample of one token here.
        let normed = ops::layer_norm_modulate(&x.unsqueeze(1)?, &m, 0, 1, EPS)?; // (N, 1, W)
        self.linear.forward(&normed.squeeze(1)?) // (N, 2·C)
    }
}

/// x + gate·mlp(modulate(in_ln(x))).
#[derive(Debug, Clone)]
struct TokenBlock {
    in_ln: LayerNorm,
    first: Linear,
    second: Linear,
    modulation: Linear,
}

impl TokenBlock {
    fn load(scope: &Scope<'_>, width: usize) -> Result<Self> {
        Ok(Self {
            in_ln: LayerNorm::load(&scope.at("in_ln"), width, EPS)?,
            first: Linear::load(&scope.at("mlp.0"), width, width)?,
            second: Linear::load(&scope.at("mlp.2"), width, width)?,
            modulation: Linear::load(&scope.at("adaLN_modulation.1"), width, 3 * width)?,
        })
    }

    /// x (N, W), c (N, W) → (N, W).
    fn forward(&self, x: &Tensor, c: &Tensor) -> Result<Tensor> {
        let m = self.modulation.forward(c)?; // (N, 3·W): shift, scale, gate
        let h = ops::modulate(&self.in_ln.forward(x)?, &m, 0, 1)?; // (N, W)
        let h = self.second.forward(&ops::silu(&self.first.forward(&h)?)?)?; // (N, W)
        let out = ops::gated_residual(&x.unsqueeze(1)?, &h.unsqueeze(1)?, &m, 2)?; // (N, 1, W)
        Ok(out.squeeze(1)?)
    }
}
