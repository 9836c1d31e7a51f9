use candle_core::{Device, Tensor};

use crate::{BlockLayout, Parts, Result};

/// Values that hold one entry per sample along their first axis.
pub trait Rows: Sized {
    /// The samples named by `index` (R,) u32, in that order. It may be on the CPU, whatever the values are on: there its
    /// numbers can be read without waiting for a GPU.
    fn select(&self, index: &Tensor) -> Result<Self>;
    /// As [`select`](Self::select) where the index is known on the CPU and on the values' device.
    fn select_by(&self, index: &Index) -> Result<Self> {
        self.select(&index.host)
    }
    /// The same values, cut off from the autograd graph.
    fn detach(&self) -> Self;
}

/// Samples of a batch, (R,) u32, in both places.
#[derive(Debug, Clone)]
pub struct Index {
    /// On the CPU, for what is looked up there.
    pub host: Tensor,
    /// Where the batch is.
    pub device: Tensor,
}

impl Rows for Tensor {
    fn select(&self, index: &Tensor) -> Result<Self> {
        Ok(self.index_select(&index.to_device(self.device())?, 0)?)
    }
    fn detach(&self) -> Self {
        Tensor::detach(self)
    }
}

/// A clean batch: latents or pixels with class labels.
#[derive(Debug, Clone)]
pub struct LatentBatch {
    /// (B, C, H, W) f32; pixels in [-1, 1] or scaled latents.
    pub x: Tensor,
    /// (B,) u32 class ids.
    pub y: Tensor,
}

impl LatentBatch {
    /// The same with x on a device. The labels stay where they are: objectives read them, to drop some, and would wait.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            x: self.x.to_device(device)?,
            y: self.y.clone(),
        })
    }
}

/// What DiT and SiT are asked: a noised latent, its time and its class.
#[derive(Debug, Clone)]
pub struct LatentQuery {
    /// (B, C, H, W) f32.
    pub x: Tensor,
    /// (B,) f32: 0..1000 for DiT, [0, 1] for SiT; may be fractional.
    pub t: Tensor,
    /// (B,) u32, on any device; the id `num_classes` is the null class.
    pub y: Tensor,
}

/// What MAR is asked: tokens, which of them are hidden, and the class.
#[derive(Debug, Clone)]
pub struct TokenQuery {
    /// (B, L, C) f32 patchified latents.
    pub tokens: Tensor,
    /// (B, L) f32, 1 where the token is to be predicted. Every row hides equally many. Best on the CPU, whatever the tokens
    /// are on: the network reads it.
    pub mask: Tensor,
    /// (B,) u32, on any device; the id `num_classes` is the fake latent.
    pub y: Tensor,
    /// One seed per sample by which a network with dropout drops; none asks for its plain function. They come with
    /// the question, so that a sample loses the same values in every part of its batch and in a resumed run.
    pub dropout: Option<Vec<u64>>,
}

/// A stack of residual blocks between an embedding and a head: the one trait over DiT, SiT and MAR.
///
/// Implementers keep three promises, tested as laws for every family: a block keeps the shape of
/// `h`; samples do not mix (row b of the output depends on row b of the input alone); a forward
/// writes no state.
pub trait BlockStack {
    /// What one forward pass is asked.
    type Input;
    /// What all blocks of one pass share, for example c (B, D).
    type Cond: Rows;

    /// Number of blocks and the stages they form.
    fn layout(&self) -> &BlockLayout;
    /// The tokens before the first block, h_0 (B, T, D), and the conditioning.
    fn embed(&self, input: &Self::Input) -> Result<(Tensor, Self::Cond)>;
    /// Block `i` on h (B, T, D), the residual connection included; keeps the shape.
    fn block(&self, i: usize, h: &Tensor, cond: &Self::Cond) -> Result<Tensor>;
    /// Between stages, before the first block of stage `into` (1-based from the second stage): MAR
    /// puts its mask tokens back here.
    fn bridge(&self, into: usize, h: &Tensor, cond: &Self::Cond) -> Result<Tensor> {
        let _ = (into, cond);
        Ok(h.clone())
    }
    /// The samples `index` (R,) u32 of h (B, T, D) for the exact blend. A network may have a faster way than this one.
    fn pick(&self, h: &Tensor, index: &Tensor) -> Result<Tensor> {
        h.select(index)
    }
    /// The batch behind a block of the exact blend: as [`Parts::joined`] says. A network may have a faster way.
    fn join(&self, parts: &Parts<'_>) -> Result<Tensor> {
        parts.joined()
    }
    /// From the last block's output (B, T, D) to the network's output.
    fn head(&self, h: &Tensor, cond: &Self::Cond) -> Result<Tensor>;
}

/// A stack whose output conditions a small denoiser of single tokens, which is part of the model (MAR's diffusion
/// loss): the stack's head gives z (B, L, D), one condition per token.
pub trait TokenDenoiser: BlockStack<Input = TokenQuery> {
    /// The denoiser's output (N, 2·C) for noised tokens `x` (N, C) at the times `t` (N,) f32, in units of the trained
    /// chain, under the conditions `z` (N, D): C channels of the estimate, then C of the variance.
    fn denoise_tokens(&self, x: &Tensor, t: &Tensor, z: &Tensor) -> Result<Tensor>;
}

/// A handle on one block during [`walk`], with the pass's conditioning already bound.
pub struct BlockCall<'a, S: BlockStack> {
    net: &'a S,
    i: usize,
    cond: &'a S::Cond,
}

impl<S: BlockStack> BlockCall<'_, S> {
    /// [`BlockStack::pick`]
    pub(crate) fn pick(&self, h: &Tensor, index: &Tensor) -> Result<Tensor> {
        self.net.pick(h, index)
    }

    /// [`BlockStack::join`]
    pub(crate) fn join(&self, parts: &Parts<'_>) -> Result<Tensor> {
        self.net.join(parts)
    }

    /// Runs the block on every sample: (B, T, D) → (B, T, D).
    pub fn all(&self, h: &Tensor) -> Result<Tensor> {
        self.net.block(self.i, h, self.cond)
    }

    /// Runs the block on some samples: `h_rows` (R, T, D) are the samples `index` (R,) of the batch.
    pub fn rows(&self, h_rows: &Tensor, index: &Index) -> Result<Tensor> {
        self.net.block(self.i, h_rows, &self.cond.select_by(index)?)
    }

    /// As [`rows`](Self::rows), recording nothing: `untracked` is the same net built on detached
    /// weights, so the result has no graph and keeps no activations.
    pub fn rows_untracked(&self, untracked: &S, h_rows: &Tensor, index: &Index) -> Result<Tensor> {
        untracked.block(
            self.i,
            &h_rows.detach(),
            &self.cond.detach().select_by(index)?,
        )
    }
}

/// The only loop over blocks: embeds, lets `visit(i, h, call)` turn h_i into h_{i+1} for every
/// block, crosses the bridges, applies the head.
pub fn walk<S: BlockStack>(
    net: &S,
    input: &S::Input,
    mut visit: impl FnMut(usize, &Tensor, BlockCall<'_, S>) -> Result<Tensor>,
) -> Result<Tensor> {
    let (mut h, cond) = net.embed(input)?; // (B, T, D)
    for (stage, blocks) in net.layout().ranges().enumerate() {
        if stage > 0 {
            h = net.bridge(stage, &h, &cond)?;
        }
        for i in blocks {
            h = visit(
                i,
                &h,
                BlockCall {
                    net,
                    i,
                    cond: &cond,
                },
            )?;
        }
    }
    net.head(&h, &cond)
}
