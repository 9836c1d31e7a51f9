use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict, StepRng, stream};
use tinyfusion_nn::layers::{Attention, Linear, Mlp, PatchEmbed};
use tinyfusion_nn::{Scope, ops};

use crate::bounds::{check_sizes, check_values};

const EPS: f64 = 1e-6;

/// The sizes of a [`Classifier`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassifierConfig {
    /// Side of the image.
    pub input_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Channels of the image.
    pub in_channels: usize,
    /// Width D, the length of the feature vector.
    pub hidden_size: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Number of classes.
    pub num_classes: usize,
}

impl Default for ClassifierConfig {
    fn default() -> Self {
        Self {
            input_size: 32,
            patch_size: 4,
            in_channels: 3,
            hidden_size: 64,
            depth: 4,
            num_heads: 4,
            num_classes: 10,
        }
    }
}

impl ClassifierConfig {
    /// Checks that every size is in bounds and that they fit together.
    pub fn validate(&self) -> Result<()> {
        const WHAT: &str = "classifier config";
        check_sizes(
            WHAT,
            self.depth,
            &[
                ("input_size", self.input_size),
                ("patch_size", self.patch_size),
                ("in_channels", self.in_channels),
                ("hidden_size", self.hidden_size),
                ("num_heads", self.num_heads),
                ("num_classes", self.num_classes),
            ],
        )?;
        if !self.input_size.is_multiple_of(self.patch_size) {
            return Err(Error::usage(format!(
                "{WHAT}: patch_size {} does not divide input_size {}",
                self.patch_size, self.input_size
            )));
        }
        if !self.hidden_size.is_multiple_of(self.num_heads) {
            return Err(Error::usage(format!(
                "{WHAT}: {} heads (num_heads) do not divide hidden_size {}",
                self.num_heads, self.hidden_size
            )));
        }
        check_values(WHAT, &self.params())
    }

    /// Every tensor, by name and shape, of a config that passes [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `patch_size` is 0.
    pub fn params(&self) -> Vec<ParamSpec> {
        let (d, p) = (self.hidden_size, self.patch_size);
        let tokens = (self.input_size / p).pow(2);
        let mut specs = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            specs.push(ParamSpec {
                name,
                shape: shape.to_vec(),
            });
        };
        add("pos_embed".into(), &[1, tokens, d]);
        add(
            "patch_embed.proj.weight".into(),
            &[d, self.in_channels, p, p],
        );
        add("patch_embed.proj.bias".into(), &[d]);
        for i in 0..self.depth {
            for (name, o, n) in [
                ("attn.qkv", 3 * d, d),
                ("attn.proj", d, d),
                ("mlp.fc1", 4 * d, d),
                ("mlp.fc2", d, 4 * d),
            ] {
                add(format!("blocks.{i}.{name}.weight"), &[o, n]);
                add(format!("blocks.{i}.{name}.bias"), &[o]);
            }
            for norm in ["norm1", "norm2"] {
                add(format!("blocks.{i}.{norm}.weight"), &[d]);
                add(format!("blocks.{i}.{norm}.bias"), &[d]);
            }
        }
        add("norm.weight".into(), &[d]);
        add("norm.bias".into(), &[d]);
        add("head.weight".into(), &[self.num_classes, d]);
        add("head.bias".into(), &[self.num_classes]);
        specs
    }

    /// Initial weights: norms 1, biases 0, the rest normal with standard deviation 1/√inputs (0.02 for positions).
    pub fn init(&self, seed: u64, device: &Device) -> Result<StateDict> {
        self.validate()?;
        let mut rng = StepRng::new(seed, 0, stream::INIT);
        let draw = |rng: &mut StepRng, spec: &ParamSpec| -> Result<Tensor> {
            let shape = spec.shape.as_slice();
            if spec.name.ends_with(".bias") {
                return Ok(Tensor::zeros(shape, DType::F32, device)?);
            }
            if shape.len() == 1 {
                return Ok(Tensor::ones(shape, DType::F32, device)?);
            }
            let inputs: usize = shape[1..].iter().product();
            let std = if spec.name == "pos_embed" {
                0.02
            } else {
                1.0 / (inputs as f64).sqrt()
            };
            Ok((rng.normal(shape, device)? * std)?)
        };
        self.params()
            .iter()
            .map(|spec| Ok((spec.name.clone(), draw(&mut rng, spec)?)))
            .collect()
    }
}

/// A small vision transformer that judges `shapes`: its pooled features give the Fréchet distance of the
/// embedded experiment, its logits the accuracy.
///
/// **Not the Inception network.** Distances on these features compare runs of the embedded experiment with each
/// other and nothing else.
#[derive(Debug, Clone)]
pub struct Classifier {
    patch_embed: PatchEmbed,
    pos_embed: Tensor, // (1, T, D)
    blocks: Vec<Block>,
    norm: (Tensor, Tensor), // (D,), (D,)
    head: Linear,
}

#[derive(Debug, Clone)]
struct Block {
    norm1: (Tensor, Tensor),
    attn: Attention,
    norm2: (Tensor, Tensor),
    mlp: Mlp,
}

impl Classifier {
    /// The network on `weights`, whose storage it shares.
    pub fn new(config: &ClassifierConfig, weights: &StateDict) -> Result<Self> {
        config.validate()?;
        let (d, p) = (config.hidden_size, config.patch_size);
        weights.check(&config.params())?;
        let root = Scope::new(weights, 0.0);
        let norm = |scope: Scope<'_>| -> Result<(Tensor, Tensor)> {
            Ok((scope.get("weight", &[d])?, scope.get("bias", &[d])?))
        };
        let block = |i: usize| -> Result<Block> {
            let at = root.at("blocks").at(i);
            Ok(Block {
                norm1: norm(at.at("norm1"))?,
                attn: Attention::load(&at.at("attn"), d, config.num_heads)?,
                norm2: norm(at.at("norm2"))?,
                mlp: Mlp::load(&at.at("mlp"), d, 4 * d)?,
            })
        };
        Ok(Self {
            patch_embed: PatchEmbed::load(&root.at("patch_embed"), config.in_channels, p, d)?,
            pos_embed: root.get("pos_embed", &[1, (config.input_size / p).pow(2), d])?,
            blocks: (0..config.depth).map(block).collect::<Result<_>>()?,
            norm: norm(root.at("norm"))?,
            head: Linear::load(&root.at("head"), d, config.num_classes)?,
        })
    }

    /// Images (B, C, H, W) in [−1, 1] → pooled features (B, D).
    pub fn features(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self
            .patch_embed
            .forward(x)?
            .broadcast_add(&self.pos_embed)?; // (B, T, D)
        for block in &self.blocks {
            let attn =
                block
                    .attn
                    .forward(&ops::layer_norm(&h, &block.norm1.0, &block.norm1.1, EPS)?)?;
            h = (h + attn)?; // (B, T, D)
            let mlp =
                block
                    .mlp
                    .forward(&ops::layer_norm(&h, &block.norm2.0, &block.norm2.1, EPS)?)?;
            h = (h + mlp)?; // (B, T, D)
        }
        Ok(ops::layer_norm(&h, &self.norm.0, &self.norm.1, EPS)?.mean(1)?) // (B, D)
    }

    /// Features (B, D) → class logits (B, K).
    pub fn logits(&self, features: &Tensor) -> Result<Tensor> {
        self.head.forward(features)
    }
}
