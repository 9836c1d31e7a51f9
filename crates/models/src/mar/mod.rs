//! MAR: masked autoregression with a diffusion loss.

mod block;
mod config;
mod width;

pub use config::MarConfig;

use block::{Block, BlockDropout, TokenMlp};
use candle_core::{DType, Tensor};
use tinyfusion_core::{
    BlockLayout, BlockStack, Error, Parts, Result, Rows, StateDict, TokenDenoiser, TokenQuery,
};
use tinyfusion_nn::layers::{LayerNorm, Linear};
use tinyfusion_nn::{Scope, ops, recompute, record};

/// LayerNorm's ε throughout MAR.
const EPS: f64 = 1e-6;

/// A masked autoregressive model (Li et al. 2024, arXiv 2406.11838): an encoder of the visible tokens, a decoder that
/// tells every hidden token a condition z, and a small denoiser that draws tokens from z.
///
/// The stack's output is z (B, L, D); the denoiser is asked through [`TokenDenoiser`].
#[derive(Debug, Clone)]
pub struct Mar {
    config: MarConfig,
    layout: BlockLayout,
    class_emb: Tensor,   // (classes, E)
    fake_latent: Tensor, // (1, E)
    z_proj: Linear,
    z_proj_ln: LayerNorm,
    encoder_pos: Tensor, // (buffer + L, E)
    encoder_norm: LayerNorm,
    decoder_embed: Linear,
    mask_token: Tensor,  // (1, D)
    decoder_pos: Tensor, // (1, buffer + L, D)
    decoder_norm: LayerNorm,
    diffusion_pos: Tensor, // (1, L, D)
    blocks: Vec<Block>,    // the encoder's, then the decoder's
    denoiser: TokenMlp,
    recomputing: bool,
    dropping: bool,
    dtype: DType,
}

impl Mar {
    /// The network on `weights`, whose storage it shares: variables are trained, the rest is frozen.
    pub fn new(config: &MarConfig, weights: &StateDict) -> Result<Self> {
        Self::with_lora(config, weights, 0.0)
    }

    /// As [`new`](Self::new), where linear layers with low-rank tensors beside them add `scale`·B·A.
    pub fn with_lora(config: &MarConfig, weights: &StateDict, scale: f64) -> Result<Self> {
        config.validate()?;
        let root = Scope::new(weights, scale);
        let (e, d) = (config.encoder_embed_dim, config.decoder_embed_dim);
        let (l, c) = (config.seq_len(), config.token_embed_dim());
        let positions = config.buffer_size + l;
        let mut blocks = Vec::with_capacity(config.encoder_depth + config.decoder_depth);
        for stage in [config.stage(0), config.stage(1)] {
            for i in 0..stage.depth {
                let width = config.block_width(blocks.len());
                blocks.push(Block::load(&root.at(stage.name).at(i), stage, width)?);
            }
        }
        Ok(Self {
            layout: BlockLayout::stages([config.encoder_depth, config.decoder_depth]),
            class_emb: root.get("class_emb.weight", &[config.class_num, e])?,
            fake_latent: root.get("fake_latent", &[1, e])?,
            z_proj: Linear::load(&root.at("z_proj"), c, e)?,
            z_proj_ln: LayerNorm::load(&root.at("z_proj_ln"), e, EPS)?,
            encoder_pos: root
                .get("encoder_pos_embed_learned", &[1, positions, e])?
                .squeeze(0)?,
            encoder_norm: LayerNorm::load(&root.at("encoder_norm"), e, EPS)?,
            decoder_embed: Linear::load(&root.at("decoder_embed"), e, d)?,
            mask_token: root.get("mask_token", &[1, 1, d])?.squeeze(0)?,
            decoder_pos: root.get("decoder_pos_embed_learned", &[1, positions, d])?,
            decoder_norm: LayerNorm::load(&root.at("decoder_norm"), d, EPS)?,
            diffusion_pos: root.get("diffusion_pos_embed_learned", &[1, l, d])?,
            blocks,
            denoiser: TokenMlp::load(
                &root.at("diffloss.net"),
                c,
                d,
                config.diffloss_w,
                config.diffloss_d,
            )?,
            config: config.clone(),
            recomputing: false,
            dropping: true,
            dtype: DType::F32,
        })
    }

    /// The same network, whose blocks keep nothing for their backward but their input and run once more there
    /// (activation checkpointing): same gradients, for the time of one more forward.
    #[must_use]
    pub fn recomputing(self, recomputing: bool) -> Self {
        Self {
            recomputing,
            ..self
        }
    }

    /// The same network, which never drops values, whatever seeds a question brings: a teacher, who is asked the
    /// student's questions.
    #[must_use]
    pub fn without_dropout(self) -> Self {
        Self {
            dropping: false,
            ..self
        }
    }

    /// The same network, whose blocks' products and attention are of `dtype`. The denoiser and the residual streams stay f32, for
    /// what is rounded there adds up over the blocks; so does what it is asked and answers, and so do weights that are trained
    /// with their gradients.
    #[must_use]
    pub fn computing_in(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The sizes.
    pub fn config(&self) -> &MarConfig {
        &self.config
    }

    /// The class embeddings (B, E), the fake latent's where the id is `class_num`.
    fn classes(&self, y: &Tensor) -> Result<Tensor> {
        let table = Tensor::cat(&[&self.class_emb, &self.fake_latent], 0)?; // (classes + 1, E)
        Ok(table.select(y)?.to_dtype(DType::F32)?)
    }

    /// Checks a question's shapes and sorts its positions.
    fn condition(&self, q: &TokenQuery) -> Result<MarCond> {
        let (b, l, c) = q.tokens.dims3()?;
        let expected = (self.config.seq_len(), self.config.token_embed_dim());
        if (l, c) != expected || q.mask.dims() != [b, l] || q.y.dims() != [b] {
            return Err(Error::usage(format!(
                "MAR was asked about tokens {:?} with a mask {:?} and classes {:?}; it expects (B, {}, {}), (B, {}), (B,)",
                q.tokens.dims(),
                q.mask.dims(),
                q.y.dims(),
                expected.0,
                expected.1,
                expected.0
            )));
        }
        if let Some(seeds) = q.dropout.as_ref().filter(|s| s.len() != b) {
            return Err(Error::usage(format!(
                "{} dropout seeds were given for {b} samples",
                seeds.len()
            )));
        }
        let mask = q.mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let seen = |row: &[f32]| -> Vec<u32> {
            let visible = (0u32..).zip(row).filter(|(_, m)| **m == 0.0);
            visible.map(|(i, _)| i).collect()
        };
        let visible: Vec<Vec<u32>> = mask.iter().map(|row| seen(row)).collect();
        let buffer = self.config.buffer_size;
        let count = visible.first().map_or(0, Vec::len);
        if visible.iter().any(|v| v.len() != count) {
            return Err(Error::usage(
                "every sample of a batch must hide equally many tokens, or the encoder's lengths differ",
            ));
        }
        // Rows of a sample's encoder output, and one behind them for the mask token, unless told otherwise.
        let mut places = vec![(buffer + count) as u32; b * (buffer + l)];
        for (places, visible) in places.chunks_exact_mut(buffer + l).zip(&visible) {
            let seen = (0..buffer).chain(visible.iter().map(|&i| buffer + i as usize));
            seen.zip(0..).for_each(|(at, row)| places[at] = row);
        }
        let (visible, device) = (visible.concat(), q.tokens.device());
        let dropping =
            self.dropping && (self.config.attn_dropout > 0.0 || self.config.proj_dropout > 0.0);
        Ok(MarCond {
            visible: match count {
                0 => None, // a GPU has no tensors of nothing
                _ => Some(Tensor::from_vec(visible, (b, count), device)?),
            },
            places: Tensor::from_vec(places, (b, buffer + l), device)?,
            seeds: q.dropout.clone().filter(|_| dropping),
        })
    }
}

/// What all blocks of a pass of [`Mar`] share.
#[derive(Debug, Clone)]
pub struct MarCond {
    /// Positions of the visible tokens, ascending, (B, V) u32, if any are.
    visible: Option<Tensor>,
    /// Where the decoder's tokens come from: a row of the sample's encoder output, or the one behind its last, which stands
    /// for the mask token; (B, buffer + L) u32.
    places: Tensor,
    /// Dropout's seeds, one per sample.
    seeds: Option<Vec<u64>>,
}

impl Rows for MarCond {
    fn select(&self, index: &Tensor) -> Result<Self> {
        let seeds = match &self.seeds {
            None => None,
            Some(seeds) => {
                let rows = index.to_vec1::<u32>()?;
                let of = |&row: &u32| seeds.get(row as usize).copied();
                let picked: Option<Vec<u64>> = rows.iter().map(of).collect();
                Some(picked.ok_or_else(|| {
                    Error::usage(format!(
                        "rows {rows:?} were asked of {} samples",
                        seeds.len()
                    ))
                })?)
            }
        };
        Ok(Self {
            visible: match &self.visible {
                None => None,
                Some(visible) => Some(visible.select(index)?),
            },
            places: self.places.select(index)?,
            seeds,
        })
    }

    fn detach(&self) -> Self {
        self.clone()
    }
}

impl BlockStack for Mar {
    type Input = TokenQuery;
    type Cond = MarCond;

    fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// The buffer and the visible tokens, (B, buffer + V, E).
    fn embed(&self, q: &TokenQuery) -> Result<(Tensor, MarCond)> {
        let cond = self.condition(q)?;
        let ((b, l, c), buffer) = (q.tokens.dims3()?, self.config.buffer_size);
        let e = self.config.encoder_embed_dim;
        let class = self.classes(&q.y)?.unsqueeze(1)?; // (B, 1, E)
        let all_positions = self.encoder_pos.to_dtype(DType::F32)?; // (buffer + L, E)
        let positions = all_positions.narrow(0, 0, buffer)?; // (buffer, E)
        let mut h = class.broadcast_add(&positions.unsqueeze(0)?)?; // (B, buffer, E)
        if let Some(visible) = &cond.visible {
            let (_, v) = visible.dims2()?;
            // Only what is seen is embedded.
            let rows = (0..b as u32).map(|b| b * l as u32).collect::<Vec<_>>();
            let rows = Tensor::from_vec(rows, (b, 1), visible.device())?;
            let rows = visible.broadcast_add(&rows)?.flatten_all()?; // (B·V,)
            let tokens = q.tokens.reshape((b * l, c))?.index_select(&rows, 0)?; // (B·V, C)
            let tokens = tokens.to_dtype(self.dtype)?;
            let places = (visible.flatten_all()? + buffer as f64)?; // (B·V,)
            let positions = all_positions.index_select(&places, 0)?; // (B·V, E)
            let tokens = self.z_proj.forward(&tokens)?.to_dtype(DType::F32)?;
            let tokens = (tokens + positions)?; // (B·V, E)
            h = Tensor::cat(&[h, tokens.reshape((b, v, e))?], 1)?; // (B, buffer + V, E)
        }
        Ok((self.z_proj_ln.forward(&h)?, cond))
    }

    fn block(&self, i: usize, h: &Tensor, cond: &MarCond) -> Result<Tensor> {
        let MarConfig {
            attn_dropout,
            proj_dropout,
            ..
        } = self.config;
        let drop = match &cond.seeds {
            None => None,
            Some(seeds) => Some(BlockDropout::new(seeds, i, attn_dropout, proj_dropout)?),
        };
        let block = self.blocks[i].clone(); // its tensors are shared
        let dtype = self.dtype;
        let forward = move |h: &Tensor, _: &Tensor| Ok(block.forward(h, drop.as_ref(), dtype)?);
        // A block of MAR is told nothing but its input.
        if !self.recomputing {
            return Ok(record(h, h, forward)?);
        }
        let nothing = Tensor::zeros(1, h.dtype(), h.device())?;
        Ok(recompute(h, &nothing, forward)?)
    }

    fn pick(&self, h: &Tensor, index: &Tensor) -> Result<Tensor> {
        ops::pick(h, index)
    }

    fn join(&self, parts: &Parts<'_>) -> Result<Tensor> {
        ops::join(parts)
    }

    /// From the encoder's (B, buffer + V, E) to the decoder's (B, buffer + L, D): the mask token stands where a token
    /// is hidden.
    fn bridge(&self, _into: usize, h: &Tensor, cond: &MarCond) -> Result<Tensor> {
        let h = self.encoder_norm.forward_in(h, self.dtype)?; // (B, buffer + V, E)
        let h = self.decoder_embed.forward(&h)?.to_dtype(DType::F32)?; // (B, buffer + V, D)
        let (b, t, d) = h.dims3()?;
        let mask_token = self.mask_token.to_dtype(DType::F32)?.unsqueeze(0)?; // (1, 1, D)
        let rows = Tensor::cat(&[&h, &mask_token.broadcast_as((b, 1, d))?], 1)?; // (B, buffer + V + 1, D)
        let first = (0..b as u32).map(|sample| sample * (t as u32 + 1));
        let first = Tensor::from_iter(first, h.device())?.unsqueeze(1)?; // (B, 1)
        let places = cond.places.broadcast_add(&first)?; // (B, buffer + L)
        let (_, all) = places.dims2()?;
        let h = rows
            .reshape((b * (t + 1), d))?
            .index_select(&places.flatten_all()?, 0)?
            .reshape((b, all, d))?; // (B, buffer + L, D)
        Ok(h.broadcast_add(&self.decoder_pos.to_dtype(DType::F32)?)?)
    }

    /// z (B, L, D), the conditions of all tokens.
    fn head(&self, h: &Tensor, _cond: &MarCond) -> Result<Tensor> {
        let h = self.decoder_norm.forward(h)?; // (B, buffer + L, D)
        let h = h.narrow(1, self.config.buffer_size, self.config.seq_len())?; // (B, L, D)
        Ok(h.broadcast_add(&self.diffusion_pos.to_dtype(DType::F32)?)?)
    }
}

impl TokenDenoiser for Mar {
    fn denoise_tokens(&self, x: &Tensor, t: &Tensor, z: &Tensor) -> Result<Tensor> {
        // In f32 whatever the blocks compute in: it is asked a hundred times for a token, and its errors add up.
        let (x, z) = (x.to_dtype(DType::F32)?, z.to_dtype(DType::F32)?);
        self.denoiser.forward(&x, t, &z)
    }
}
