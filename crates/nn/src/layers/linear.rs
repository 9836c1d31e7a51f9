use candle_core::{Device, Tensor};
use tinyfusion_core::{ParamSpec, Result, StateDict, StepRng, stream};

use crate::Scope;
use crate::ops::{self, LowRank};

/// y = x·Wᵀ + b, with a low-rank update s·B·A when its tensors are present.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor, // (O, I)
    bias: Tensor,   // (O,)
    lora: Option<LowRank>,
}

impl Linear {
    /// Takes `weight` (O, I) and `bias` (O,), and `lora_a.weight`, `lora_b.weight` if they exist.
    pub fn load(scope: &Scope<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        let lora = match scope.find("lora_a.weight") {
            None => None,
            Some(a) => {
                let rank = a.dim(0)?;
                Some(LowRank {
                    a: scope.get("lora_a.weight", &[rank, inputs])?,
                    b: scope.get("lora_b.weight", &[outputs, rank])?,
                    scale: scope.lora_scale(),
                })
            }
        };
        Ok(Self {
            weight: scope.get("weight", &[outputs, inputs])?,
            bias: scope.get("bias", &[outputs])?,
            lora,
        })
    }

    /// (…, I) → (…, O).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.lora {
            None => ops::linear(x, &self.weight, Some(&self.bias))?,
            Some(lora) => ops::linear_low_rank(x, &self.weight, &self.bias, lora)?,
        })
    }

    /// GELU-tanh of [`forward`](Self::forward), in one operation.
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.lora {
            None => ops::linear_gelu(x, &self.weight, &self.bias)?,
            Some(lora) => ops::linear_low_rank_gelu(x, &self.weight, &self.bias, lora)?,
        })
    }

    /// Exact GELU of [`forward`](Self::forward), in one operation.
    pub fn forward_gelu_erf(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.lora {
            None => ops::linear_gelu_erf(x, &self.weight, &self.bias)?,
            Some(lora) => ops::linear_low_rank_gelu_erf(x, &self.weight, &self.bias, lora)?,
        })
    }
}

/// A low-rank update of linear layers (Hu et al. 2021, arXiv 2106.09685): W + (α/r)·B·A.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraSpec {
    /// Rank r.
    pub rank: usize,
    /// α; the update is scaled by α/r.
    pub alpha: f64,
}

impl LoraSpec {
    /// α/r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// The tensors `NAME.lora_a.weight` (r, I), uniform in ±1/√I, and `NAME.lora_b.weight` (O, r), zero,
    /// for every linear layer among `specs` that `choose(NAME)` picks: a two-dimensional
    /// `NAME.weight` with a `NAME.bias`. Embedding tables have no bias and stay as they are.
    pub fn init(
        &self,
        specs: &[ParamSpec],
        choose: impl Fn(&str) -> bool,
        seed: u64,
        device: &Device,
    ) -> Result<StateDict> {
        let mut rng = StepRng::new(seed, 1, stream::INIT);
        let mut dict = StateDict::new();
        for spec in specs {
            let Some(name) = spec.name.strip_suffix(".weight") else {
                continue;
            };
            let bias = format!("{name}.bias");
            let &[outputs, inputs] = spec.shape.as_slice() else {
                continue;
            };
            if !specs.iter().any(|s| s.name == bias) || !choose(name) {
                continue;
            }
            let bound = 1.0 / (inputs as f64).sqrt();
            let a: Vec<f32> = rng
                .uniform(self.rank * inputs)
                .into_iter()
                .map(|u| ((2.0 * u - 1.0) * bound) as f32)
                .collect();
            dict.insert(
                format!("{name}.lora_a.weight"),
                Tensor::from_vec(a, (self.rank, inputs), device)?,
            );
            let b = Tensor::zeros((outputs, self.rank), candle_core::DType::F32, device)?;
            dict.insert(format!("{name}.lora_b.weight"), b);
        }
        Ok(dict)
    }

    /// `dict` without its low-rank tensors, each added into the weight beside it.
    pub fn merge(&self, dict: &StateDict) -> Result<StateDict> {
        let mut merged = StateDict::new();
        for (name, tensor) in dict.iter() {
            if name.ends_with(".lora_a.weight") || name.ends_with(".lora_b.weight") {
                continue;
            }
            let stem = name.strip_suffix(".weight").unwrap_or(name);
            let tensor = match dict.get(&format!("{stem}.lora_a.weight")) {
                Some(a) if name.ends_with(".weight") => {
                    let b = dict.require(&format!("{stem}.lora_b.weight"))?;
                    (tensor + (b.matmul(a)? * self.scale())?)? // (O, I)
                }
                _ => tensor.clone(),
            };
            merged.insert(name, tensor.detach());
        }
        Ok(merged)
    }
}
