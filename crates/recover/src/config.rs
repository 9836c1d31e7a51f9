use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};
use tinyfusion_mask::{Linear, Pattern, Temperature};
use tinyfusion_train::FitConfig;

/// How to learn a mask. The default is the setting of the paper (arXiv 2412.01199) and its public code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct LearnConfig {
    /// How many blocks of which groups are kept.
    pub pattern: Pattern,
    /// The weight update that stands for the recovery to come.
    pub delta: DeltaW,
    /// Learning rate of the weight update.
    pub lr: f64,
    /// Learning rate of the mask's logits.
    pub mask_lr: f64,
    /// τ of the Gumbel-softmax over the steps.
    pub tau: Linear,
    /// What multiplies the logits over the steps; its last value also gives the confidences.
    pub scale: Linear,
    /// How masked blocks are computed.
    pub blend: Blend,
    /// Steps between lines of `history.jsonl`.
    pub history_every: u64,
    /// Seed of the low-rank factors, of every step's draw and of the masks.
    pub seed: u64,
    /// The training loop. Its `ema` averages the logits from which the decision falls.
    pub fit: FitConfig,
}

impl Default for LearnConfig {
    fn default() -> Self {
        Self {
            pattern: Pattern::default(),
            delta: DeltaW::default(),
            lr: 1e-4,
            mask_lr: 1e-3,
            tau: Linear { from: 4.0, to: 0.1 },
            scale: Linear::constant(100.0),
            blend: Blend::Exact,
            history_every: 1,
            seed: 0,
            fit: FitConfig {
                steps: 10_000,
                batch_size: 128,
                clip: Some(1.0),
                ema: 0.999,
                ..FitConfig::default()
            },
        }
    }
}

/// The weight update ΔΦ that is trained together with the mask, so that a mask is judged by the loss
/// that it can be trained to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DeltaW {
    /// W + (α/r)·B·A on the chosen linear layers.
    Lora {
        /// Rank r.
        rank: usize,
        /// α.
        alpha: f64,
        /// Which linear layers.
        #[serde(default)]
        layers: LoraLayers,
    },
    /// Every weight that is not a fixed table.
    Full,
    /// None: the mask is judged by the loss right after the cut.
    Frozen,
}

impl Default for DeltaW {
    fn default() -> Self {
        Self::Lora {
            rank: 8,
            alpha: 16.0,
            layers: LoraLayers::All,
        }
    }
}

/// Which linear layers get a low-rank update.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum LoraLayers {
    /// All of them, embedders and head included (the reference).
    #[default]
    All,
    /// The blocks' attention: names with `.attn.`.
    Attention,
    /// The blocks' feed-forward layers: names with `.mlp.fc` (the time embedder's `mlp.0` is none of them).
    Mlp,
    /// Layers whose name contains one of these.
    Named(Vec<String>),
}

impl LoraLayers {
    /// Whether the linear layer `name` (without `.weight`) is chosen.
    pub fn chooses(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Attention => name.contains(".attn."),
            Self::Mlp => name.contains(".mlp.fc"),
            Self::Named(fragments) => fragments.iter().any(|f| name.contains(f.as_str())),
        }
    }
}

impl FromStr for LoraLayers {
    type Err = Error;

    /// `all`, `attention`, `mlp`, or parts of names between commas.
    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "all" => Self::All,
            "attention" => Self::Attention,
            "mlp" => Self::Mlp,
            names if names.split(',').any(|n| n.trim().is_empty()) => {
                return Err(Error::usage(format!(
                    "`{names}` is not a list of layers: expected all, attention, mlp, or parts of names such as attn.qkv,mlp.fc1"
                )));
            }
            names => Self::Named(names.split(',').map(|n| n.trim().to_string()).collect()),
        })
    }
}

/// How masked blocks are computed. Both give the same losses and gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blend {
    /// Dropped samples run without recording a graph: they save no activations and have no backward. In
    /// return, samples are gathered and put back around every block; for a 96-wide DiT of 64 tokens on a CPU
    /// that costs as much as it saves.
    #[default]
    Exact,
    /// Every sample runs through every block, as the reference does: the oracle for `exact`.
    Plain,
}

impl LearnConfig {
    /// Checks the ranges.
    pub fn validate(&self) -> Result<()> {
        self.fit.validate()?;
        let fail = |what: String| Err(Error::usage(format!("learn: {what}")));
        let positive = |v: f64| v.is_finite() && v > 0.0;
        for (name, value) in [("lr", self.lr), ("mask-lr", self.mask_lr)] {
            if !positive(value) {
                return fail(format!("{name} = {value}, expected a number above 0"));
            }
        }
        for (name, Linear { from, to }) in [("tau", self.tau), ("scale", self.scale)] {
            if !positive(from) || !positive(to) {
                return fail(format!(
                    "{name} goes from {from} to {to}, both ends must be above 0"
                ));
            }
        }
        // Far above any rank that is low, and far below one that no machine holds.
        const HIGHEST_RANK: usize = 4096;
        if let DeltaW::Lora { rank, alpha, .. } = self.delta
            && (!(1..=HIGHEST_RANK).contains(&rank) || !positive(alpha))
        {
            return fail(format!(
                "LoRA of rank {rank} with α = {alpha}: a rank from 1 to {HIGHEST_RANK} and an α above 0 are expected"
            ));
        }
        if self.history_every == 0 {
            return fail("history-every must be at least 1".into());
        }
        Ok(())
    }

    /// τ and scale of step `step` (from 0); the last step has exactly the final ones.
    pub fn temperature(&self, step: u64) -> Temperature {
        let total = self.fit.steps;
        Temperature {
            tau: self.tau.at(step, total),
            scale: self.scale.at(step, total),
        }
    }
}
