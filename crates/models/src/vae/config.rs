use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict, StepRng, stream};

use super::names::{self, Layout};
use crate::bounds::{check_sizes, check_values};

/// Most stages: an image side of 2¹⁵ pixels per latent pixel is a mistake.
const MAX_STAGES: usize = 16;

/// Most residual blocks of a stage.
const MAX_LAYERS: usize = 256;

/// The class that a config.json of diffusers names.
const CLASS: &str = "AutoencoderKL";

/// What diffusers writes beside the settings: where they came from. Nothing depends on it.
const ORIGIN: [&str; 4] = [
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "_commit_hash",
];

/// What diffusers knows and this network does not: must be absent or null.
const NOT_HONOURED: [&str; 3] = ["shift_factor", "latents_mean", "latents_std"];

/// A stage of the encoder, under diffusers' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DownBlock {
    /// Residual blocks.
    #[serde(rename = "DownEncoderBlock2D")]
    Plain,
    /// Residual blocks, each followed by attention.
    #[serde(rename = "AttnDownEncoderBlock2D")]
    Attention,
}

/// A stage of the decoder, under diffusers' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UpBlock {
    /// Residual blocks.
    #[serde(rename = "UpDecoderBlock2D")]
    Plain,
    /// Residual blocks, each followed by attention.
    #[serde(rename = "AttnUpDecoderBlock2D")]
    Attention,
}

/// The activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// x·σ(x).
    Silu,
}

/// The sizes of an autoencoder, under the names of diffusers' `AutoencoderKL` and with its defaults where one is absent.
///
/// An unknown field is an error. [`from_diffusers`](Self::from_diffusers) reads the config.json of a folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VaeConfig {
    /// Channels of the image that is encoded.
    pub in_channels: usize,
    /// Channels of the image that is decoded.
    pub out_channels: usize,
    /// The encoder's stages, from the image on.
    pub down_block_types: Vec<DownBlock>,
    /// The decoder's stages, from the latent on.
    pub up_block_types: Vec<UpBlock>,
    /// Channels of every stage, from the image on.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of a stage of the encoder; the decoder's stages have one more.
    pub layers_per_block: usize,
    /// The activation.
    pub act_fn: Activation,
    /// Channels of the latent.
    pub latent_channels: usize,
    /// Groups of every GroupNorm.
    pub norm_num_groups: usize,
    /// Side in pixels of the images of its training; a tile is as large unless told otherwise.
    pub sample_size: usize,
    /// What latents are multiplied with so that they have a standard deviation near 1.
    pub scaling_factor: f64,
    /// Whether diffusers leaves half precision for f32 here. We compute in the type of the weights; kept for writing it back.
    pub force_upcast: bool,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    /// The defaults of diffusers' constructor (0.42), for fields that a config.json leaves out; [`sd`](Self::sd) and
    /// [`kl16`](Self::kl16) are networks that exist.
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DownBlock::Plain],
            up_block_types: vec![UpBlock::Plain],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// Stable Diffusion's autoencoder f8 with 4 channels, which DiT and SiT work on: the published fine-tunings ft-ema and
    /// ft-mse (Rombach et al. 2022, arXiv 2112.10752).
    pub fn sd() -> Self {
        Self {
            down_block_types: vec![DownBlock::Plain; 4],
            up_block_types: vec![UpBlock::Plain; 4],
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            sample_size: 256,
            ..Self::default()
        }
    }

    /// MAR's KL-16: f16 with 16 channels, attention in the encoder's last stage and in none of the decoder's (Li et al. 2024,
    /// arXiv 2406.11838; its code's `models/vae.py` with `ch_mult` 1, 1, 2, 2, 4 and the factor 0.2325 of its training loop).
    pub fn kl16() -> Self {
        let mut down = vec![DownBlock::Plain; 5];
        down[4] = DownBlock::Attention;
        Self {
            down_block_types: down,
            up_block_types: vec![UpBlock::Plain; 5],
            block_out_channels: vec![128, 128, 256, 256, 512],
            layers_per_block: 2,
            latent_channels: 16,
            sample_size: 256,
            scaling_factor: 0.2325,
            ..Self::default()
        }
    }

    /// Reads the text of a config.json that diffusers wrote for an `AutoencoderKL`; the caller knows the file and names it
    /// in the error.
    ///
    /// Another class, an unknown field and a field that would have to be honoured and is not are errors.
    pub fn from_diffusers(text: &str) -> Result<Self> {
        let fail = |fault: String| Error::usage(format!("VAE config: {fault}"));
        let mut fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| fail(e.to_string()))?;
        match fields.get(ORIGIN[0]) {
            Some(Value::String(class)) if class == CLASS => {}
            Some(class) => {
                return Err(fail(format!(
                    "_class_name is {class}, expected \"{CLASS}\""
                )));
            }
            None => {
                return Err(fail(format!(
                    "_class_name is missing, expected \"{CLASS}\""
                )));
            }
        }
        for name in ORIGIN {
            fields.remove(name);
        }
        for name in NOT_HONOURED {
            match fields.remove(name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    return Err(fail(format!(
                        "{name} is {value}, which is not supported; only null is"
                    )));
                }
            }
        }
        let config: Self =
            serde_json::from_value(Value::Object(fields)).map_err(|e| fail(e.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// The text of a config.json that diffusers reads.
    pub fn to_diffusers(&self) -> Result<String> {
        let mut fields = Map::new();
        fields.insert(ORIGIN[0].into(), CLASS.into());
        let fault = |e: serde_json::Error| Error::usage(format!("VAE config: {e}"));
        if let Value::Object(own) = serde_json::to_value(self).map_err(fault)? {
            fields.extend(own);
        }
        serde_json::to_string_pretty(&fields).map_err(fault)
    }

    /// Checks that every size is in bounds and that they fit together; after that [`params`](Self::params) is a short list
    /// without overflow.
    pub fn validate(&self) -> Result<()> {
        let what = "VAE config";
        let fail = |fault: String| Err(Error::usage(format!("{what}: {fault}")));
        let stages = self.block_out_channels.len();
        if !(1..=MAX_STAGES).contains(&stages) {
            return fail(format!(
                "block_out_channels names {stages} stages; 1 to {MAX_STAGES} are allowed"
            ));
        }
        for (name, count) in [
            ("down_block_types", self.down_block_types.len()),
            ("up_block_types", self.up_block_types.len()),
        ] {
            if count != stages {
                return fail(format!(
                    "{name} names {count} stages, block_out_channels {stages}"
                ));
            }
        }
        let mut sizes = vec![
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("norm_num_groups", self.norm_num_groups),
            ("sample_size", self.sample_size),
        ];
        sizes.extend(
            self.block_out_channels
                .iter()
                .map(|&c| ("block_out_channels", c)),
        );
        check_sizes(what, stages, &sizes)?;
        let layers = self.layers_per_block;
        if !(1..=MAX_LAYERS).contains(&layers) {
            return fail(format!(
                "layers_per_block is {layers}; it must be in 1..={MAX_LAYERS}"
            ));
        }
        for channels in &self.block_out_channels {
            if !channels.is_multiple_of(self.norm_num_groups) {
                return fail(format!(
                    "{} groups (norm_num_groups) do not divide {channels} channels (block_out_channels)",
                    self.norm_num_groups
                ));
            }
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return fail(format!(
                "scaling_factor {} is not a positive number",
                self.scaling_factor
            ));
        }
        check_values(what, &self.params())
    }

    /// Pixels of the image along one side of a pixel of the latent: 8 for Stable Diffusion's, 16 for KL-16.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Channels of the stages around which the middle lies.
    pub(super) fn deepest(&self) -> usize {
        self.block_out_channels.last().copied().unwrap_or(0)
    }

    /// The encoder's stages, in order.
    pub(super) fn down(&self) -> Vec<Stage> {
        let mut inputs = self.block_out_channels.first().copied().unwrap_or(0);
        let stages = self.block_out_channels.iter().zip(&self.down_block_types);
        let last = self.block_out_channels.len().saturating_sub(1);
        let stage = |(i, (&outputs, block)): (usize, (&usize, &DownBlock))| {
            let inputs = std::mem::replace(&mut inputs, outputs);
            Stage {
                inputs,
                outputs,
                blocks: self.layers_per_block,
                attention: *block == DownBlock::Attention,
                resamples: i < last,
            }
        };
        stages.enumerate().map(stage).collect()
    }

    /// The decoder's stages, in order.
    pub(super) fn up(&self) -> Vec<Stage> {
        let mut inputs = self.deepest();
        let stages = self
            .block_out_channels
            .iter()
            .rev()
            .zip(&self.up_block_types);
        let last = self.block_out_channels.len().saturating_sub(1);
        let stage = |(i, (&outputs, block)): (usize, (&usize, &UpBlock))| {
            let inputs = std::mem::replace(&mut inputs, outputs);
            Stage {
                inputs,
                outputs,
                blocks: self.layers_per_block + 1,
                attention: *block == UpBlock::Attention,
                resamples: i < last,
            }
        };
        stages.enumerate().map(stage).collect()
    }

    /// Every tensor by name and shape, as today's diffusers names them, of a config that passes
    /// [`validate`](Self::validate).
    pub fn params(&self) -> Vec<ParamSpec> {
        names::params(self)
    }

    /// Every tensor by name and shape, as `layout` has them.
    pub fn params_in(&self, layout: Layout) -> Vec<ParamSpec> {
        names::params_in(self, layout)
    }

    /// Number of values in the network.
    pub fn parameters(&self) -> usize {
        let values = |spec: &ParamSpec| spec.shape.iter().product::<usize>();
        self.params().iter().map(values).sum()
    }

    /// Random weights of the right sizes, as PyTorch draws them: uniform in ±1/√(terms of a sum), norms 1 and 0. For
    /// measurements and tests; nobody trains an autoencoder here.
    pub fn init(&self, seed: u64, device: &Device) -> Result<StateDict> {
        self.validate()?;
        let mut rng = StepRng::new(seed, 0, stream::INIT);
        let (mut dict, mut terms) = (StateDict::new(), 1);
        for ParamSpec { name, shape } in self.params() {
            let count = shape.iter().product();
            let values: Vec<f32> = if name.contains("norm") {
                vec![f32::from(u8::from(name.ends_with(".weight"))); count]
            } else {
                if name.ends_with(".weight") {
                    // Its bias follows and has the same bound.
                    terms = shape[1..].iter().product();
                }
                let bound = 1.0 / (terms as f64).sqrt();
                let draw = rng.uniform(count).into_iter();
                draw.map(|u| ((2.0 * u - 1.0) * bound) as f32).collect()
            };
            dict.insert(name, Tensor::from_vec(values, shape, device)?);
        }
        Ok(dict)
    }
}

/// A stage of the encoder or the decoder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// Residual blocks.
    pub(super) blocks: usize,
    /// Whether each is followed by attention.
    pub(super) attention: bool,
    /// Whether it ends in a down- or upsampling.
    pub(super) resamples: bool,
}

impl Stage {
    /// Channels that go into its block `j`.
    pub(super) fn inputs_of(&self, j: usize) -> usize {
        if j == 0 { self.inputs } else { self.outputs }
    }
}
