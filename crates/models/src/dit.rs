use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{
    BlockLayout, BlockStack, Error, Index, LatentQuery, ParamSpec, Parts, Result, Rows, StateDict,
    StepRng, stream,
};
use tinyfusion_nn::layers::{
    Attention, LabelEmbedder, Linear, Mlp, PatchEmbed, TimestepEmbedder, sincos_2d, unpatchify,
};
use tinyfusion_nn::{Scope, ops, recompute, record};

use crate::bounds::{check_sizes, check_values};
use crate::width::{self, BlockWidth};

/// LayerNorm's ε throughout DiT.
const EPS: f64 = 1e-6;

/// The sizes of a DiT, under the names of the official constructor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiTConfig {
    /// Side of the latent or image.
    pub input_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Channels of the latent or image.
    pub in_channels: usize,
    /// Width D.
    pub hidden_size: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Hidden width of the MLP over D.
    pub mlp_ratio: f64,
    /// Number of classes, the null class not counted.
    pub num_classes: usize,
    /// Probability of dropping a label in training; above 0 the table has a row for the null class.
    pub class_dropout_prob: f64,
    /// Whether the network also predicts the variance (twice the output channels).
    pub learn_sigma: bool,
    /// Heads and MLP channels of every block, for a model cut in width; none where all blocks are dense. `num_heads` and
    /// `mlp_ratio` stay those of the dense model, whose heads have the same size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub widths: Option<Vec<BlockWidth>>,
}

impl Default for DiTConfig {
    /// DiT-XL/2 on 256×256 ImageNet latents.
    fn default() -> Self {
        Self {
            input_size: 32,
            patch_size: 2,
            in_channels: 4,
            hidden_size: 1152,
            depth: 28,
            num_heads: 16,
            mlp_ratio: 4.0,
            num_classes: 1000,
            class_dropout_prob: 0.1,
            learn_sigma: true,
            widths: None,
        }
    }
}

impl DiTConfig {
    /// Checks that every size is in bounds and that they fit together; after that [`params`](Self::params)
    /// is a short list without overflow.
    pub fn validate(&self) -> Result<()> {
        self.validate_as("DiT config")
    }

    /// As [`validate`](Self::validate); `what` starts the error.
    pub(crate) fn validate_as(&self, what: &str) -> Result<()> {
        let fail = |fault: String| Err(Error::usage(format!("{what}: {fault}")));
        check_sizes(
            what,
            self.depth,
            &[
                ("input_size", self.input_size),
                ("patch_size", self.patch_size),
                ("in_channels", self.in_channels),
                ("hidden_size", self.hidden_size),
                ("num_heads", self.num_heads),
                ("num_classes", self.num_classes),
                // A ratio that is negative or not a number gives 0, an infinite one usize::MAX.
                ("hidden_size times mlp_ratio", self.mlp_hidden()),
            ],
        )?;
        if !self.input_size.is_multiple_of(self.patch_size) {
            return fail(format!(
                "patch_size {} does not divide input_size {}",
                self.patch_size, self.input_size
            ));
        }
        if !self.hidden_size.is_multiple_of(self.num_heads) {
            return fail(format!(
                "{} heads (num_heads) do not divide hidden_size {}",
                self.num_heads, self.hidden_size
            ));
        }
        if !self.hidden_size.is_multiple_of(4) {
            return fail(format!(
                "hidden_size {} is not divisible by 4 (2-D positions)",
                self.hidden_size
            ));
        }
        if !(0.0..=1.0).contains(&self.class_dropout_prob) {
            return fail(format!(
                "class_dropout_prob {} is not a probability",
                self.class_dropout_prob
            ));
        }
        if let Some(widths) = &self.widths {
            width::check_widths(what, widths, &vec![self.dense_width(); self.depth])?;
        }
        check_values(what, &self.params())
    }

    /// Patches along one side, of a config that passes [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `patch_size` is 0.
    pub fn grid(&self) -> usize {
        self.input_size / self.patch_size
    }

    /// Channels of the output: twice the input's when the variance is learned.
    pub fn out_channels(&self) -> usize {
        if self.learn_sigma {
            2 * self.in_channels
        } else {
            self.in_channels
        }
    }

    /// Hidden width of a dense block's MLP.
    pub fn mlp_hidden(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    /// Rows of the label table.
    fn label_rows(&self) -> usize {
        self.num_classes + usize::from(self.class_dropout_prob > 0.0)
    }

    /// The same network with `depth` blocks. Of a model cut in width, whose blocks differ, take
    /// [`with_blocks`](Self::with_blocks): here its widths stay and no longer fit.
    #[must_use]
    pub fn with_depth(&self, depth: usize) -> Self {
        Self {
            depth,
            ..self.clone()
        }
    }

    /// The sizes of the network cut to its blocks `kept`, each as wide as it was.
    #[must_use]
    pub fn with_blocks(&self, kept: &[usize]) -> Self {
        let widths = kept.iter().map(|&i| self.block_width(i)).collect();
        self.with_depth(kept.len()).with_widths(widths)
    }

    /// Every tensor of the checkpoint, by name and shape, of a config that passes
    /// [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `patch_size` or `num_heads` is 0.
    pub fn params(&self) -> Vec<ParamSpec> {
        let (d, p, c) = (self.hidden_size, self.patch_size, self.in_channels);
        let mut specs = Vec::new();
        let mut add = |name: &str, shape: &[usize]| {
            specs.push(ParamSpec {
                name: name.into(),
                shape: shape.to_vec(),
            });
        };
        add("pos_embed", &[1, self.grid() * self.grid(), d]);
        add("x_embedder.proj.weight", &[d, c, p, p]);
        add("x_embedder.proj.bias", &[d]);
        let mut linear = |name: &str, o: usize, i: usize| {
            add(&format!("{name}.weight"), &[o, i]);
            add(&format!("{name}.bias"), &[o]);
        };
        linear("t_embedder.mlp.0", d, 256);
        linear("t_embedder.mlp.2", d, d);
        for i in 0..self.depth {
            let (a, h) = self.inner(i);
            linear(&format!("blocks.{i}.attn.qkv"), 3 * a, d);
            linear(&format!("blocks.{i}.attn.proj"), d, a);
            linear(&format!("blocks.{i}.mlp.fc1"), h, d);
            linear(&format!("blocks.{i}.mlp.fc2"), d, h);
            linear(&format!("blocks.{i}.adaLN_modulation.1"), 6 * d, d);
        }
        linear("final_layer.linear", p * p * self.out_channels(), d);
        linear("final_layer.adaLN_modulation.1", 2 * d, d);
        add("y_embedder.embedding_table.weight", &[self.label_rows(), d]);
        specs
    }

    /// Whether `name` is a fixed table rather than a trained weight.
    pub fn is_fixed(name: &str) -> bool {
        name == "pos_embed"
    }

    /// Number of values in the network, the position table included (as in the official count), of a config
    /// that passes [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `patch_size` or `num_heads` is 0.
    pub fn parameters(&self) -> usize {
        self.params()
            .iter()
            .map(|s| s.shape.iter().product::<usize>())
            .sum()
    }

    /// Initial weights as the reference draws them: Xavier-uniform linear layers with zero bias, normal
    /// (0.02) embeddings, zero adaLN projections and a zero final layer.
    pub fn init(&self, seed: u64, device: &Device) -> Result<StateDict> {
        self.validate()?;
        let mut rng = StepRng::new(seed, 0, stream::INIT);
        let mut dict = StateDict::new();
        for ParamSpec { name, shape } in self.params() {
            let tensor = if Self::is_fixed(&name) {
                sincos_2d(self.hidden_size, self.grid(), device)?
            } else if name.ends_with(".bias")
                || name.contains("adaLN_modulation")
                || name.starts_with("final_layer")
            {
                Tensor::zeros(shape, DType::F32, device)?
            } else if name.starts_with("t_embedder") || name.starts_with("y_embedder") {
                (rng.normal(shape, device)? * 0.02)?
            } else {
                let (outputs, inputs) = (shape[0], shape[1..].iter().product::<usize>());
                let bound = (6.0 / (inputs + outputs) as f64).sqrt();
                let values: Vec<f32> = rng
                    .uniform(inputs * outputs)
                    .into_iter()
                    .map(|u| ((2.0 * u - 1.0) * bound) as f32)
                    .collect();
                Tensor::from_vec(values, shape, device)?
            };
            dict.insert(name, tensor);
        }
        Ok(dict)
    }
}

/// A diffusion transformer (Peebles & Xie 2023, arXiv 2212.09748).
#[derive(Debug, Clone)]
pub struct DiT {
    config: DiTConfig,
    layout: BlockLayout,
    x_embedder: PatchEmbed,
    t_embedder: TimestepEmbedder,
    y_embedder: LabelEmbedder,
    pos_embed: Tensor, // (1, T, D)
    blocks: Vec<DiTBlock>,
    final_layer: FinalLayer,
    recomputing: bool,
    dtype: DType,
}

impl DiT {
    /// The network on `weights`, whose storage it shares: variables are trained, the rest is frozen.
    pub fn new(config: &DiTConfig, weights: &StateDict) -> Result<Self> {
        Self::with_lora(config, weights, 0.0)
    }

    /// As [`new`](Self::new), where linear layers with low-rank tensors beside them add `scale`·B·A.
    pub fn with_lora(config: &DiTConfig, weights: &StateDict, scale: f64) -> Result<Self> {
        config.validate()?;
        let root = Scope::new(weights, scale);
        let (d, grid) = (config.hidden_size, config.grid());
        Ok(Self {
            layout: BlockLayout::single(config.depth),
            x_embedder: PatchEmbed::load(
                &root.at("x_embedder"),
                config.in_channels,
                config.patch_size,
                d,
            )?,
            t_embedder: TimestepEmbedder::load(&root.at("t_embedder"), d)?,
            y_embedder: LabelEmbedder::load(&root.at("y_embedder"), config.label_rows(), d)?,
            pos_embed: root.get("pos_embed", &[1, grid * grid, d])?.detach(),
            blocks: (0..config.depth)
                .map(|i| DiTBlock::load(&root.at("blocks").at(i), config, i))
                .collect::<Result<_>>()?,
            final_layer: FinalLayer::load(&root.at("final_layer"), config)?,
            config: config.clone(),
            recomputing: false,
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

    /// The same network, whose products and attention are of `dtype`. The residual stream stays f32, for what is rounded there
    /// adds up over the blocks; so do the output, and weights that are trained with their gradients.
    #[must_use]
    pub fn computing_in(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The sizes.
    pub fn config(&self) -> &DiTConfig {
        &self.config
    }

    /// c = t_emb + y_emb (B, D) in `dtype`.
    pub fn condition(&self, t: &Tensor, y: &Tensor, dtype: DType) -> Result<Tensor> {
        Ok((self.t_embedder.forward(t, dtype)? + self.y_embedder.forward(y, dtype)?)?)
    }
}

impl BlockStack for DiT {
    type Input = LatentQuery;
    type Cond = DiTCond;

    fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, DiTCond)> {
        let h = self
            .x_embedder
            .forward(&q.x.to_dtype(self.dtype)?)?
            .to_dtype(DType::F32)?
            .broadcast_add(&self.pos_embed.to_dtype(DType::F32)?)?; // (B, T, D)
        // Every adaLN projection starts with this activation.
        let c = ops::silu(&self.condition(&q.t, &q.y, self.dtype)?)?; // (B, D)
        let blocks = self.blocks.iter().map(|b| b.modulation.forward(&c)); // (B, 6·D) each
        let cond = DiTCond {
            blocks: blocks.collect::<Result<_>>()?,
            head: self.final_layer.modulation.forward(&c)?, // (B, 2·D)
            rows: None,
            detached: false,
        };
        Ok((h, cond))
    }

    fn block(&self, i: usize, h: &Tensor, cond: &DiTCond) -> Result<Tensor> {
        let m = cond.of(&cond.blocks[i])?; // (B, 6·D)
        let block = self.blocks[i].clone(); // its tensors are shared
        let forward = move |h: &Tensor, m: &Tensor| Ok(block.forward(h, m)?);
        Ok(match self.recomputing {
            false => record(h, &m, forward)?,
            true => recompute(h, &m, forward)?,
        })
    }

    fn pick(&self, h: &Tensor, index: &Tensor) -> Result<Tensor> {
        ops::pick(h, index)
    }

    fn join(&self, parts: &Parts<'_>) -> Result<Tensor> {
        ops::join(parts)
    }

    fn head(&self, h: &Tensor, cond: &DiTCond) -> Result<Tensor> {
        let patches = self.final_layer.forward(h, &cond.of(&cond.head)?)?; // (B, T, p·p·C_out)
        let patches = patches.to_dtype(DType::F32)?;
        unpatchify(
            &patches,
            self.config.grid(),
            self.config.patch_size,
            self.config.out_channels(),
        ) // (B, C_out, H, W)
    }
}

/// What all blocks of a pass of [`DiT`] share: the adaLN projections of every layer, each made once for the whole batch.
///
/// Of so few rows a product costs what reading its weights costs; blocks that run on a part of the batch pick rows of
/// what is there.
#[derive(Debug, Clone)]
pub struct DiTCond {
    /// (B, 6·D) of every block.
    blocks: Arc<[Tensor]>,
    /// (B, 2·D) of the final layer.
    head: Tensor,
    /// The samples (R,) u32 that are meant; all where there is none.
    rows: Option<Tensor>,
    detached: bool,
}

impl DiTCond {
    /// One of the projections, of the samples that are meant.
    fn of(&self, m: &Tensor) -> Result<Tensor> {
        let m = if self.detached { m.detach() } else { m.clone() };
        match &self.rows {
            None => Ok(m),
            Some(rows) => ops::pick(&m, &rows.to_device(m.device())?),
        }
    }
}

impl Rows for DiTCond {
    fn select(&self, index: &Tensor) -> Result<Self> {
        let rows = match &self.rows {
            None => index.clone(),
            Some(rows) => rows.select(index)?,
        };
        Ok(Self {
            rows: Some(rows),
            ..self.clone()
        })
    }

    fn select_by(&self, index: &Index) -> Result<Self> {
        self.select(&index.device)
    }

    fn detach(&self) -> Self {
        Self {
            detached: true,
            ..self.clone()
        }
    }
}

/// x + gate·attn(modulate(LN x)), then the same around the MLP (adaLN-Zero).
#[derive(Debug, Clone)]
struct DiTBlock {
    attn: Attention,
    mlp: Mlp,
    modulation: Linear,
}

impl DiTBlock {
    fn load(scope: &Scope<'_>, config: &DiTConfig, i: usize) -> Result<Self> {
        let d = config.hidden_size;
        let (heads, (inner, hidden)) = (config.block_width(i).heads, config.inner(i));
        Ok(Self {
            attn: Attention::load_narrow(&scope.at("attn"), d, heads, inner)?,
            mlp: Mlp::load(&scope.at("mlp"), d, hidden)?,
            modulation: Linear::load(&scope.at("adaLN_modulation.1"), d, 6 * d)?,
        })
    }

    /// x (B, T, D) and m (B, 6·D), the projection of the condition → (B, T, D).
    ///
    /// Chunks of m, in order: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp.
    fn forward(&self, x: &Tensor, m: &Tensor) -> Result<Tensor> {
        let attn = self
            .attn
            .forward(&ops::layer_norm_modulate(x, m, 0, 1, EPS)?)?; // (B, T, D)
        let x = ops::gated_residual(x, &attn, m, 2)?; // (B, T, D)
        let mlp = self
            .mlp
            .forward(&ops::layer_norm_modulate(&x, m, 3, 4, EPS)?)?; // (B, T, D)
        Ok(ops::gated_residual(&x, &mlp, m, 5)?) // (B, T, D)
    }
}

/// linear(modulate(LN x)).
#[derive(Debug, Clone)]
struct FinalLayer {
    linear: Linear,
    modulation: Linear,
}

impl FinalLayer {
    fn load(scope: &Scope<'_>, config: &DiTConfig) -> Result<Self> {
        let (d, p) = (config.hidden_size, config.patch_size);
        Ok(Self {
            linear: Linear::load(&scope.at("linear"), d, p * p * config.out_channels())?,
            modulation: Linear::load(&scope.at("adaLN_modulation.1"), d, 2 * d)?,
        })
    }

    /// x (B, T, D) and m (B, 2·D), shift and scale → (B, T, p·p·C_out).
    fn forward(&self, x: &Tensor, m: &Tensor) -> Result<Tensor> {
        self.linear
            .forward(&ops::layer_norm_modulate(x, m, 0, 1, EPS)?)
    }
}
