use candle_core::{DType, Device, Tensor};

use crate::{
    BlockLayout, BlockStack, LatentQuery, ParamSpec, Result, Rows, StateDict, StepRng, TokenQuery,
    stream,
};

fn spec(name: String, shape: &[usize]) -> ParamSpec {
    ParamSpec {
        name,
        shape: shape.to_vec(),
    }
}

fn random(specs: &[ParamSpec], seed: u64) -> Result<StateDict> {
    let mut rng = StepRng::new(seed, 0, stream::INIT);
    specs
        .iter()
        .map(|s| {
            Ok((
                s.name.clone(),
                (rng.normal(s.shape.as_slice(), &Device::Cpu)? * 0.4)?,
            ))
        })
        .collect()
}

/// One stage, latents in and out, conditioned on time and class: the shape of DiT and SiT.
pub struct ToyLatent {
    layout: BlockLayout,
    weights: StateDict,
}

impl ToyLatent {
    /// Channels of the latents that [`ToyLatent`] takes; the width of its tokens.
    pub const CHANNELS: usize = 3;

    /// Names and shapes of the weights.
    pub fn specs(depth: usize) -> Vec<ParamSpec> {
        let d = Self::CHANNELS;
        let mut specs: Vec<_> = (0..depth)
            .map(|i| spec(format!("blocks.{i}.weight"), &[d, d]))
            .collect();
        specs.push(spec("head.weight".into(), &[d, d]));
        specs
    }

    /// Random weights.
    pub fn init(depth: usize, seed: u64) -> Result<StateDict> {
        random(&Self::specs(depth), seed)
    }

    /// The stack on given weights; shares their storage.
    pub fn new(depth: usize, weights: &StateDict) -> Result<Self> {
        weights.check(&Self::specs(depth))?;
        Ok(Self {
            layout: BlockLayout::single(depth),
            weights: weights.clone(),
        })
    }
}

impl BlockStack for ToyLatent {
    type Input = LatentQuery;
    type Cond = Tensor; // (B, D)

    fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        let h = q.x.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // (B, T, C)
        let c = (q.t.to_dtype(DType::F32)? / 1000.0)?.add(&q.y.to_dtype(DType::F32)?)?; // (B,)
        let c = c.unsqueeze(1)?.repeat((1, Self::CHANNELS))?; // (B, D)
        Ok((h, c))
    }

    fn block(&self, i: usize, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        let w = self.weights.require(&format!("blocks.{i}.weight"))?;
        let inner = h
            .broadcast_add(&c.unsqueeze(1)?)?
            .broadcast_matmul(w)?
            .tanh()?; // (B, T, D)
        Ok((h + inner)?)
    }

    fn head(&self, h: &Tensor, _c: &Tensor) -> Result<Tensor> {
        Ok(h.broadcast_matmul(self.weights.require("head.weight")?)?)
    }
}

/// [`ToyLatent`] with its tokens put back into a square image, (B, C, H, W) in and out, as DiT's head does:
/// for objectives that compare the output with their latents.
pub struct ToyImage(ToyLatent);

impl ToyImage {
    /// The stack on weights of [`ToyLatent::specs`]; shares their storage.
    pub fn new(depth: usize, weights: &StateDict) -> Result<Self> {
        Ok(Self(ToyLatent::new(depth, weights)?))
    }
}

impl BlockStack for ToyImage {
    type Input = LatentQuery;
    type Cond = Tensor; // (B, D)

    fn layout(&self) -> &BlockLayout {
        self.0.layout()
    }

    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        self.0.embed(q)
    }

    fn block(&self, i: usize, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        self.0.block(i, h, c)
    }

    fn head(&self, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        let tokens = self.0.head(h, c)?.transpose(1, 2)?.contiguous()?; // (B, C, T)
        let (b, channels, count) = tokens.dims3()?;
        let side = count.isqrt();
        Ok(tokens.reshape((b, channels, side, side))?) // (B, C, H, W)
    }
}

/// What the two stages of [`ToyTokens`] share.
#[derive(Debug, Clone)]
pub struct TokenCond {
    class: Tensor,  // (B, 1)
    hidden: Tensor, // (B, L), 1 where the token is hidden
}

impl Rows for TokenCond {
    fn select(&self, index: &Tensor) -> Result<Self> {
        Ok(Self {
            class: self.class.select(index)?,
            hidden: self.hidden.select(index)?,
        })
    }
    fn detach(&self) -> Self {
        Self {
            class: self.class.detach(),
            hidden: self.hidden.detach(),
        }
    }
}

/// Two stages with a bridge at which hidden tokens are put back: the shape of MAR.
///
/// The encoder sees hidden tokens as zeros here; MAR's encoder leaves them out, so that the number
/// of tokens changes at the bridge.
pub struct ToyTokens {
    layout: BlockLayout,
    weights: StateDict,
}

impl ToyTokens {
    /// Channels of a token.
    pub const CHANNELS: usize = 3;

    /// Names and shapes of the weights.
    pub fn specs(stages: [usize; 2]) -> Vec<ParamSpec> {
        let d = Self::CHANNELS;
        let mut specs: Vec<_> = (0..stages[0] + stages[1])
            .map(|i| spec(format!("blocks.{i}.weight"), &[d, d]))
            .collect();
        specs.push(spec("mask_token".into(), &[1, 1, d]));
        specs
    }

    /// Random weights.
    pub fn init(stages: [usize; 2], seed: u64) -> Result<StateDict> {
        random(&Self::specs(stages), seed)
    }

    /// The stack on given weights; shares their storage.
    pub fn new(stages: [usize; 2], weights: &StateDict) -> Result<Self> {
        weights.check(&Self::specs(stages))?;
        Ok(Self {
            layout: BlockLayout::stages(stages),
            weights: weights.clone(),
        })
    }
}

impl BlockStack for ToyTokens {
    type Input = TokenQuery;
    type Cond = TokenCond;

    fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    fn embed(&self, q: &TokenQuery) -> Result<(Tensor, TokenCond)> {
        let visible = (1.0 - &q.mask)?.unsqueeze(2)?; // (B, L, 1)
        let h = q.tokens.broadcast_mul(&visible)?; // (B, L, C)
        let class = q.y.to_dtype(DType::F32)?.unsqueeze(1)?; // (B, 1)
        Ok((
            h,
            TokenCond {
                class,
                hidden: q.mask.clone(),
            },
        ))
    }

    fn block(&self, i: usize, h: &Tensor, cond: &TokenCond) -> Result<Tensor> {
        let w = self.weights.require(&format!("blocks.{i}.weight"))?;
        let inner = h
            .broadcast_add(&cond.class.unsqueeze(2)?)?
            .broadcast_matmul(w)?
            .tanh()?; // (B, L, C)
        Ok((h + inner)?)
    }

    fn bridge(&self, _into: usize, h: &Tensor, cond: &TokenCond) -> Result<Tensor> {
        let token = self.weights.require("mask_token")?;
        Ok((h + cond.hidden.unsqueeze(2)?.broadcast_mul(token)?)?) // (B, L, C)
    }

    fn head(&self, h: &Tensor, _cond: &TokenCond) -> Result<Tensor> {
        Ok(h.clone())
    }
}
