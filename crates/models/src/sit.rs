use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{BlockLayout, BlockStack, LatentQuery, ParamSpec, Parts, Result, StateDict};

use crate::presets::{SIZES, find};
use crate::{DiT, DiTCond, DiTConfig, Preset};

/// The sizes of a SiT: a DiT's, under the same names, for the official constructors are the same.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SiTConfig(pub DiTConfig);

impl SiTConfig {
    /// Every preset, largest patch last within a size.
    pub fn presets() -> Vec<Preset<Self>> {
        SIZES
            .iter()
            .flat_map(|size| size.presets("SiT"))
            .map(|Preset { name, config }| Preset {
                name,
                config: Self(config),
            })
            .collect()
    }

    /// The preset called `name` (case does not matter).
    pub fn preset(name: &str) -> Result<Self> {
        find(Self::presets(), name)
    }

    /// Checks that every size is in bounds and that they fit together.
    pub fn validate(&self) -> Result<()> {
        self.0.validate_as("SiT config")
    }

    /// Channels of the output: the input's, for SiT drops those that `learn_sigma` adds.
    pub fn out_channels(&self) -> usize {
        self.0.in_channels
    }

    /// The same network with `depth` blocks.
    #[must_use]
    pub fn with_depth(&self, depth: usize) -> Self {
        Self(self.0.with_depth(depth))
    }

    /// Every tensor of the checkpoint, by name and shape, of a config that passes
    /// [`validate`](Self::validate).
    ///
    /// # Panics
    /// When `patch_size` or `num_heads` is 0.
    pub fn params(&self) -> Vec<ParamSpec> {
        self.0.params()
    }

    /// Whether `name` is a fixed table rather than a trained weight.
    pub fn is_fixed(name: &str) -> bool {
        DiTConfig::is_fixed(name)
    }

    /// Number of values in the network, as [`DiTConfig::parameters`] counts.
    ///
    /// # Panics
    /// When `patch_size` or `num_heads` is 0.
    pub fn parameters(&self) -> usize {
        self.0.parameters()
    }

    /// Initial weights as the reference draws them, as [`DiTConfig::init`].
    pub fn init(&self, seed: u64, device: &Device) -> Result<StateDict> {
        self.validate()?;
        self.0.init(seed, device)
    }
}

/// A scalable interpolant transformer (Ma et al. 2024, arXiv 2401.08740): a [`DiT`] that is told the time in
/// [0, 1] as it is, and whose second half of output channels, where `learn_sigma` gives it one, is dropped.
#[derive(Debug, Clone)]
pub struct SiT {
    config: SiTConfig,
    dit: DiT,
}

impl SiT {
    /// The network on `weights`, whose storage it shares: variables are trained, the rest is frozen.
    pub fn new(config: &SiTConfig, weights: &StateDict) -> Result<Self> {
        Self::with_lora(config, weights, 0.0)
    }

    /// As [`new`](Self::new), where linear layers with low-rank tensors beside them add `scale`·B·A.
    pub fn with_lora(config: &SiTConfig, weights: &StateDict, scale: f64) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
            dit: DiT::with_lora(&config.0, weights, scale)?,
        })
    }

    /// As [`DiT::recomputing`]: less memory for the time of one more forward.
    #[must_use]
    pub fn recomputing(self, recomputing: bool) -> Self {
        Self {
            dit: self.dit.recomputing(recomputing),
            ..self
        }
    }

    /// As [`DiT::computing_in`].
    #[must_use]
    pub fn computing_in(self, dtype: DType) -> Self {
        Self {
            dit: self.dit.computing_in(dtype),
            ..self
        }
    }

    /// The sizes.
    pub fn config(&self) -> &SiTConfig {
        &self.config
    }
}

impl BlockStack for SiT {
    type Input = LatentQuery;
    type Cond = DiTCond;

    fn layout(&self) -> &BlockLayout {
        self.dit.layout()
    }

    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, DiTCond)> {
        self.dit.embed(q) // (B, T, D) and the projections
    }

    fn block(&self, i: usize, h: &Tensor, cond: &DiTCond) -> Result<Tensor> {
        self.dit.block(i, h, cond) // (B, T, D)
    }

    fn pick(&self, h: &Tensor, index: &Tensor) -> Result<Tensor> {
        self.dit.pick(h, index)
    }

    fn join(&self, parts: &Parts<'_>) -> Result<Tensor> {
        self.dit.join(parts)
    }

    fn head(&self, h: &Tensor, cond: &DiTCond) -> Result<Tensor> {
        let output = self.dit.head(h, cond)?; // (B, C or 2C, H, W)
        Ok(output.narrow(1, 0, self.config.out_channels())?) // (B, C, H, W)
    }
}
