use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_checkpoint::keep_blocks;
use tinyfusion_core::{Error, ParamSpec, Result, StateDict, StepRng, stream};
use tinyfusion_diffusion::{LabelDrop, MarTraining, Respacing, token_diffusion};

use crate::Preset;
use crate::bounds::{check_sizes, check_values};
use crate::presets::find;
use crate::width::{self, BlockWidth};

/// The sizes of a MAR and the settings of its training and sampling, under the names of the official constructor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MarConfig {
    /// Side of the image.
    pub img_size: usize,
    /// Pixels of the image per value of the latent along a side; 1 where the tokens are pixels.
    pub vae_stride: usize,
    /// Side of the patch of latents (or pixels) that makes a token.
    pub patch_size: usize,
    /// Width of the encoder.
    pub encoder_embed_dim: usize,
    /// Blocks of the encoder.
    pub encoder_depth: usize,
    /// Attention heads of the encoder.
    pub encoder_num_heads: usize,
    /// Width of the decoder.
    pub decoder_embed_dim: usize,
    /// Blocks of the decoder.
    pub decoder_depth: usize,
    /// Attention heads of the decoder.
    pub decoder_num_heads: usize,
    /// Hidden width of the MLPs over the width of their stage.
    pub mlp_ratio: f64,
    /// Channels of the latent (or of the image).
    pub vae_embed_dim: usize,
    /// Smallest share of the tokens that training hides.
    pub mask_ratio_min: f64,
    /// Probability of replacing a label by the fake latent in training.
    pub label_drop_prob: f64,
    /// Number of classes, the fake latent not counted.
    pub class_num: usize,
    /// Dropout of attention probabilities in training.
    pub attn_dropout: f64,
    /// Dropout behind projections and activations of the blocks in training.
    pub proj_dropout: f64,
    /// Tokens in front of the image's that carry the class embedding.
    pub buffer_size: usize,
    /// Blocks of the per-token denoiser.
    pub diffloss_d: usize,
    /// Width of the per-token denoiser.
    pub diffloss_w: usize,
    /// Steps of the per-token diffusion in sampling, as a respacing of its 1000 steps: `"100"` or `"ddim50"`.
    pub num_sampling_steps: String,
    /// Times and noises per token and training step, at most 1024.
    pub diffusion_batch_mul: usize,
    /// Heads and MLP channels of every block, the encoder's first, for a model cut in width; none where all blocks are
    /// dense. Heads and `mlp_ratio` above stay those of the dense model, whose heads have the same size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub widths: Option<Vec<BlockWidth>>,
}

impl Default for MarConfig {
    /// MAR-L on 256×256 ImageNet latents (16×16×16), as the official training runs it.
    fn default() -> Self {
        Self {
            img_size: 256,
            vae_stride: 16,
            patch_size: 1,
            encoder_embed_dim: 1024,
            encoder_depth: 16,
            encoder_num_heads: 16,
            decoder_embed_dim: 1024,
            decoder_depth: 16,
            decoder_num_heads: 16,
            mlp_ratio: 4.0,
            vae_embed_dim: 16,
            mask_ratio_min: 0.7,
            label_drop_prob: 0.1,
            class_num: 1000,
            attn_dropout: 0.1,
            proj_dropout: 0.1,
            buffer_size: 64,
            diffloss_d: 8,
            diffloss_w: 1280,
            num_sampling_steps: "100".into(),
            diffusion_batch_mul: 4,
            widths: None,
        }
    }
}

/// Width, depth, heads and MLP width of one stage, dense.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage {
    pub(super) name: &'static str,
    pub(super) width: usize,
    pub(super) depth: usize,
    pub(super) heads: usize,
    pub(super) hidden: usize,
}

/// (name, width, depth and heads of each stage, depth and width of the denoiser): Li et al. 2024, §4 and the official
/// training commands.
const SIZES: [(&str, usize, usize, usize, usize, usize); 3] = [
    ("MAR-B", 768, 12, 12, 6, 1024),
    ("MAR-L", 1024, 16, 16, 8, 1280),
    ("MAR-H", 1280, 20, 16, 12, 1536),
];

/// Most values of noise per sample and training step: 1 GiB in f32, sixteen thousand times MAR-L's.
const MAX_NOISE: u128 = 1 << 28;

/// Width of the sinusoidal features of the denoiser's time.
const FREQUENCIES: usize = 256;

impl MarConfig {
    /// What the keys of the blocks start with, stage by stage.
    pub const STAGES: [&'static str; 2] = ["encoder_blocks", "decoder_blocks"];

    /// Every published size, smallest first, and TinyMAR-D16: MAR-L cut to half its depth (TinyFusion, table 4).
    pub fn presets() -> Vec<Preset<Self>> {
        let published = SIZES.map(
            |(name, width, depth, heads, diffloss_d, diffloss_w)| Preset {
                name: name.into(),
                config: Self {
                    encoder_embed_dim: width,
                    encoder_depth: depth,
                    encoder_num_heads: heads,
                    decoder_embed_dim: width,
                    decoder_depth: depth,
                    decoder_num_heads: heads,
                    diffloss_d,
                    diffloss_w,
                    ..Self::default()
                },
            },
        );
        let shallow = Preset {
            name: "MAR-D16".into(),
            config: Self::default().with_depths(8, 8),
        };
        published.into_iter().chain([shallow]).collect()
    }

    /// The preset called `name` (case does not matter).
    pub fn preset(name: &str) -> Result<Self> {
        find(Self::presets(), name)
    }

    /// Checks that every size is in bounds and that they fit together; after that [`params`](Self::params)
    /// is a short list without overflow.
    pub fn validate(&self) -> Result<()> {
        const WHAT: &str = "MAR config";
        let fail = |what: String| Err(Error::usage(format!("{WHAT}: {what}")));
        check_sizes(
            WHAT,
            self.encoder_depth.max(self.decoder_depth),
            &[
                ("img_size", self.img_size),
                ("vae_stride", self.vae_stride),
                ("patch_size", self.patch_size),
                ("encoder_embed_dim", self.encoder_embed_dim),
                ("encoder_depth", self.encoder_depth),
                ("encoder_num_heads", self.encoder_num_heads),
                ("decoder_embed_dim", self.decoder_embed_dim),
                ("decoder_depth", self.decoder_depth),
                ("decoder_num_heads", self.decoder_num_heads),
                ("vae_embed_dim", self.vae_embed_dim),
                ("class_num", self.class_num),
                ("buffer_size", self.buffer_size),
                ("diffloss_d", self.diffloss_d),
                ("diffloss_w", self.diffloss_w),
                // A ratio that is negative or not a number gives 0, an infinite one usize::MAX.
                ("encoder_embed_dim times mlp_ratio", self.stage(0).hidden),
                ("decoder_embed_dim times mlp_ratio", self.stage(1).hidden),
            ],
        )?;
        // The denoiser's depth lists tensors, too.
        check_sizes("MAR config: diffloss_d", self.diffloss_d, &[])?;
        let (noises, most) = (self.diffusion_batch_mul, MarTraining::MAX_BATCH_MUL);
        if !(1..=most).contains(&noises) {
            return fail(format!(
                "diffusion_batch_mul is {noises}; it must be in 1..={most}"
            ));
        }
        let token = self.vae_stride * self.patch_size;
        if !self.img_size.is_multiple_of(token) {
            return fail(format!(
                "vae_stride {} times patch_size {} does not divide img_size {}",
                self.vae_stride, self.patch_size, self.img_size
            ));
        }
        for (name, Stage { width, heads, .. }) in
            [("encoder", self.stage(0)), ("decoder", self.stage(1))]
        {
            if !width.is_multiple_of(heads) {
                return fail(format!(
                    "{heads} heads ({name}_num_heads) do not divide {name}_embed_dim {width}"
                ));
            }
        }
        for (name, value) in [
            ("mask_ratio_min", self.mask_ratio_min),
            ("label_drop_prob", self.label_drop_prob),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return fail(format!("{name} {value} is not in [0, 1]"));
            }
        }
        for (name, value) in [
            ("attn_dropout", self.attn_dropout),
            ("proj_dropout", self.proj_dropout),
        ] {
            if !(0.0..1.0).contains(&value) {
                return fail(format!("{name} {value} is not in [0, 1)"));
            }
        }
        self.sampling_steps()?;
        if let Some(widths) = &self.widths {
            width::check_widths(WHAT, widths, &self.dense_widths())?;
        }
        check_values(WHAT, &self.params())?;
        let noise = (noises as u128)
            .saturating_mul(self.seq_len() as u128)
            .saturating_mul(self.token_embed_dim() as u128);
        if noise > MAX_NOISE {
            return fail(format!(
                "diffusion_batch_mul {noises} asks for {noise} values of noise per sample; at most {MAX_NOISE} are allowed"
            ));
        }
        Ok(())
    }

    /// The steps of the per-token diffusion that [`num_sampling_steps`](Self::num_sampling_steps) names.
    pub fn sampling_steps(&self) -> Result<Respacing> {
        let steps = || {
            let steps: Respacing = self.num_sampling_steps.parse()?;
            steps.timesteps(token_diffusion().steps)?; // there are as many
            Ok(steps)
        };
        steps().map_err(|e: Error| Error::usage(format!("MAR config: num_sampling_steps: {e}")))
    }

    /// The training problem, of a config that passes [`validate`](Self::validate).
    pub fn training(&self) -> MarTraining {
        MarTraining {
            patch_size: self.patch_size,
            labels: LabelDrop {
                num_classes: self.class_num as u32,
                probability: self.label_drop_prob,
            },
            mask_ratio_min: self.mask_ratio_min,
            diffusion_batch_mul: self.diffusion_batch_mul,
            dropout: self.attn_dropout > 0.0 || self.proj_dropout > 0.0,
        }
    }

    /// Tokens along one side, of a config that passes [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `vae_stride` or `patch_size` is 0.
    pub fn grid(&self) -> usize {
        self.img_size / self.vae_stride.saturating_mul(self.patch_size)
    }

    /// Tokens L of an image, the buffer not counted.
    ///
    /// # Panics
    /// When `vae_stride` or `patch_size` is 0.
    pub fn seq_len(&self) -> usize {
        self.grid().saturating_mul(self.grid())
    }

    /// Channels C of a token.
    pub fn token_embed_dim(&self) -> usize {
        self.vae_embed_dim
            .saturating_mul(self.patch_size)
            .saturating_mul(self.patch_size)
    }

    pub(super) fn stage(&self, stage: usize) -> Stage {
        let (width, depth, heads) = if stage == 0 {
            (
                self.encoder_embed_dim,
                self.encoder_depth,
                self.encoder_num_heads,
            )
        } else {
            (
                self.decoder_embed_dim,
                self.decoder_depth,
                self.decoder_num_heads,
            )
        };
        Stage {
            name: Self::STAGES[stage.min(1)],
            width,
            depth,
            heads,
            hidden: (width as f64 * self.mlp_ratio) as usize,
        }
    }

    /// The same network with that many blocks in encoder and decoder.
    #[must_use]
    pub fn with_depths(&self, encoder_depth: usize, decoder_depth: usize) -> Self {
        Self {
            encoder_depth,
            decoder_depth,
            ..self.clone()
        }
    }

    /// Kept blocks, numbered over both stages, as the kept blocks of each of the [`STAGES`](Self::STAGES), numbered
    /// within it: what a checkpoint is cut by. An error if a stage would be left without blocks.
    pub fn split_kept(&self, kept: &[usize]) -> Result<[Vec<usize>; 2]> {
        let (first, depth) = (self.encoder_depth, self.encoder_depth + self.decoder_depth);
        if let Some(block) = kept.iter().find(|&&i| i >= depth) {
            return Err(Error::usage(format!(
                "block {block} cannot be kept: the network has {first} blocks in its encoder and {} in its decoder",
                self.decoder_depth
            )));
        }
        let (encoder, decoder): (Vec<usize>, Vec<usize>) = kept.iter().partition(|&&i| i < first);
        for (name, blocks) in [("encoder", &encoder), ("decoder", &decoder)] {
            if blocks.is_empty() {
                return Err(Error::usage(format!(
                    "no block of the {name} is to be kept; at least one is needed in each stage"
                )));
            }
        }
        let decoder = decoder.into_iter().map(|i| i - first).collect();
        Ok([encoder, decoder])
    }

    /// The network cut to its blocks `kept`, numbered over both stages: its sizes and its part of `weights`.
    pub fn keep(&self, weights: &StateDict, kept: &[usize]) -> Result<(Self, StateDict)> {
        let stages = self.split_kept(kept)?;
        let mut weights = weights.clone();
        for (name, kept) in Self::STAGES.iter().zip(&stages) {
            weights = keep_blocks(&weights, name, kept)?;
        }
        let [encoder, decoder] = stages.map(|kept| kept.len());
        let widths = kept.iter().map(|&i| self.block_width(i)).collect();
        Ok((
            self.with_depths(encoder, decoder).with_widths(widths),
            weights,
        ))
    }

    /// Every tensor of the checkpoint, by name and shape, of a config that passes
    /// [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `vae_stride`, `patch_size` or a stage's count of heads is 0.
    pub fn params(&self) -> Vec<ParamSpec> {
        let (e, d, w) = (
            self.encoder_embed_dim,
            self.decoder_embed_dim,
            self.diffloss_w,
        );
        let (l, c) = (self.seq_len(), self.token_embed_dim());
        let with_buffer = l.saturating_add(self.buffer_size);
        let mut list = List(Vec::new());
        list.add("class_emb.weight", &[self.class_num, e]);
        list.add("fake_latent", &[1, e]);
        list.linear("z_proj", e, c);
        list.norm("z_proj_ln", e);
        list.add("encoder_pos_embed_learned", &[1, with_buffer, e]);
        for (first, stage) in [(0, self.stage(0)), (self.encoder_depth, self.stage(1))] {
            let Stage { width, .. } = stage;
            for i in 0..stage.depth {
                let at = |name: &str| format!("{}.{i}.{name}", stage.name);
                let BlockWidth { heads, hidden } = self.block_width(first + i);
                let inner = heads * stage.head_size();
                list.norm(&at("norm1"), width);
                list.linear(&at("attn.qkv"), 3 * inner, width);
                list.linear(&at("attn.proj"), width, inner);
                list.norm(&at("norm2"), width);
                list.linear(&at("mlp.fc1"), hidden, width);
                list.linear(&at("mlp.fc2"), width, hidden);
            }
        }
        list.norm("encoder_norm", e);
        list.linear("decoder_embed", d, e);
        list.add("mask_token", &[1, 1, d]);
        list.add("decoder_pos_embed_learned", &[1, with_buffer, d]);
        list.norm("decoder_norm", d);
        list.add("diffusion_pos_embed_learned", &[1, l, d]);
        let net = |name: &str| format!("diffloss.net.{name}");
        list.linear(&net("time_embed.mlp.0"), w, FREQUENCIES);
        list.linear(&net("time_embed.mlp.2"), w, w);
        list.linear(&net("cond_embed"), w, d);
        list.linear(&net("input_proj"), w, c);
        for i in 0..self.diffloss_d {
            let at = |name: &str| format!("diffloss.net.res_blocks.{i}.{name}");
            list.norm(&at("in_ln"), w);
            list.linear(&at("mlp.0"), w, w);
            list.linear(&at("mlp.2"), w, w);
            list.linear(&at("adaLN_modulation.1"), 3 * w, w);
        }
        list.linear(&net("final_layer.adaLN_modulation.1"), 2 * w, w);
        list.linear(&net("final_layer.linear"), c.saturating_mul(2), w);
        list.0
    }

    /// Whether `name` is a fixed table rather than a trained weight: MAR has none, its positions are learned.
    pub fn is_fixed(_name: &str) -> bool {
        false
    }

    /// Number of values in the network, of a config that passes [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `vae_stride`, `patch_size` or a stage's count of heads is 0.
    pub fn parameters(&self) -> usize {
        self.params()
            .iter()
            .map(|s| s.shape.iter().product::<usize>())
            .sum()
    }

    /// Initial weights as the reference draws them: Xavier-uniform linear layers with zero bias, normal (0.02)
    /// embeddings, positions and time MLP, norms of weight 1, zero adaLN projections and a zero final layer.
    pub fn init(&self, seed: u64, device: &Device) -> Result<StateDict> {
        self.validate()?;
        let mut rng = StepRng::new(seed, 0, stream::INIT);
        let mut dict = StateDict::new();
        for ParamSpec { name, shape } in self.params() {
            let tensor = if name.ends_with(".bias")
                || name.contains("adaLN_modulation")
                || name.contains("final_layer")
            {
                Tensor::zeros(shape, DType::F32, device)?
            } else if let &[width] = shape.as_slice() {
                Tensor::ones(width, DType::F32, device)? // a norm's weight
            } else if name.contains("time_embed")
                || name == "class_emb.weight"
                || !name.ends_with(".weight")
            {
                (rng.normal(shape, device)? * 0.02)?
            } else {
                let (outputs, inputs) = (shape[0], shape[1]);
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

struct List(Vec<ParamSpec>);

impl List {
    fn add(&mut self, name: &str, shape: &[usize]) {
        self.0.push(ParamSpec {
            name: name.into(),
            shape: shape.to_vec(),
        });
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        self.add(&format!("{name}.weight"), &[outputs, inputs]);
        self.add(&format!("{name}.bias"), &[outputs]);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width]);
        self.add(&format!("{name}.bias"), &[width]);
    }
}

#[cfg(test)]
mod tests;
