//! What a step costs by formula: floating-point operations (2 per multiply-add) and bytes.
//!
//! Counted are the matrix products, attention's included. Normalisation, activations, the optimizer
//! and the noise are left out: together they are below 1 % of the operations. B samples, T tokens,
//! D the width, H the MLP's hidden width.

use std::ops::Add;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::preset::Kind;
use crate::files;

/// Rows, inner size and columns of the product that the machine's peak is measured with: the first
/// layer of DiT-XL/2's MLP on 2048 tokens. `steps.py` and the binary have the same.
const MATMUL: (usize, usize, usize) = (2048, 1152, 4608);
/// Of LoRA, on both sides.
const RANK: f64 = 8.0;
const F32: f64 = 4.0;

/// Operations of the product behind `matmul`.
pub(crate) fn of_matmul() -> f64 {
    let (m, k, n) = MATMUL;
    2.0 * (m * k * n) as f64
}

/// Bytes read and written by one `copy` of 256 MiB.
pub(crate) fn of_copy() -> f64 {
    2.0 * (256u64 << 20) as f64
}

/// A DiT's sizes, from the `config.json` of a prepared case.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Model {
    input_size: usize,
    patch_size: usize,
    in_channels: usize,
    hidden_size: usize,
    pub(crate) depth: usize,
    mlp_ratio: f64,
    num_classes: usize,
    class_dropout_prob: f64,
    learn_sigma: bool,
}

/// Operations of one pass, apart by how their gradients cost: a linear layer has one product in each
/// gradient (input and weight), a product of two activations has both in its input's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Work {
    linear: f64,
    attention: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            linear: self.linear + other.linear,
            attention: self.attention + other.attention,
        }
    }
}

impl Work {
    fn times(self, n: f64) -> Self {
        Self {
            linear: self.linear * n,
            attention: self.attention * n,
        }
    }

    fn forward(self) -> f64 {
        self.linear + self.attention
    }

    /// Gradients of inputs and weights.
    fn backward(self) -> f64 {
        2.0 * self.forward()
    }

    /// Gradients of inputs alone: the weights are frozen.
    fn backward_frozen(self) -> f64 {
        self.linear + 2.0 * self.attention
    }
}

/// Operations of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Flops {
    /// What cannot be left out: the gradients of samples that dropped a block are not taken there.
    pub(crate) least: f64,
    /// What the plain composition does: every gradient of every sample in every block.
    pub(crate) plain: f64,
}

impl Model {
    /// Of a model directory.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Config {
            model: Model,
        }
        Ok(files::read_json::<Config>(&folder.join("config.json"))?.model)
    }

    pub(crate) fn tokens(&self) -> usize {
        (self.input_size / self.patch_size).pow(2)
    }

    fn sizes(&self) -> (f64, f64, f64) {
        let d = self.hidden_size as f64;
        // As the network rounds it.
        let hidden = (d * self.mlp_ratio).floor();
        (self.tokens() as f64, d, hidden)
    }

    /// Values of an input patch and of an output patch.
    fn patch(&self) -> (f64, f64) {
        let values = (self.in_channels * self.patch_size.pow(2)) as f64;
        (values, if self.learn_sigma { 2.0 } else { 1.0 } * values)
    }

    /// One block on one sample.
    fn block(&self) -> Work {
        let (t, d, h) = self.sizes();
        Work {
            // qkv 3D², projection D², MLP 2DH for every token; adaLN 6D² for the sample.
            linear: 2.0 * t * (4.0 * d * d + 2.0 * d * h) + 2.0 * 6.0 * d * d,
            // Scores and their product with v, over all heads.
            attention: 2.0 * 2.0 * t * t * d,
        }
    }

    /// Embeddings and final layer on one sample.
    fn ends(&self) -> Work {
        let (t, d, _) = self.sizes();
        let (input, output) = self.patch();
        // Timestep MLP 256·D + D², final adaLN 2D².
        let linear = 2.0 * t * d * (input + output) + 2.0 * (256.0 * d + d * d + 2.0 * d * d);
        Work {
            linear,
            attention: 0.0,
        }
    }

    fn blocks(&self) -> Work {
        self.block().times(self.depth as f64)
    }

    fn whole(&self) -> Work {
        self.blocks() + self.ends()
    }

    /// The two products beside every linear layer of one sample, forward.
    fn low_rank(&self) -> f64 {
        let (t, d, h) = self.sizes();
        let (_, output) = self.patch();
        // Inputs plus outputs of qkv, projection, fc1, fc2; of adaLN.
        let block = t * (4.0 * d + 2.0 * d + 2.0 * (d + h)) + 7.0 * d;
        let ends = t * (d + output) + (256.0 + d) + 2.0 * d + 3.0 * d;
        2.0 * RANK * (block * self.depth as f64 + ends)
    }

    /// Number of values, the fixed positions not counted.
    pub(crate) fn parameters(&self) -> f64 {
        let (_, d, h) = self.sizes();
        let (input, output) = self.patch();
        let rows = self.num_classes as f64 + f64::from(u8::from(self.class_dropout_prob > 0.0));
        let block = 10.0 * d * d + 2.0 * d * h + (3.0 + 1.0 + 1.0 + 6.0) * d + h;
        let ends = (input + 1.0) * d // patches
            + 257.0 * d + (d + 1.0) * d // timestep
            + rows * d
            + 2.0 * d * (d + 1.0) + (d + 1.0) * output; // final layer
        block * self.depth as f64 + ends
    }

    /// Bytes that one step has to move at least, if nothing of a block's weights stays in the cache
    /// and everything that a block hands on inside does.
    ///
    /// Forward: every weight once, the hidden state in and out of both halves of a block.
    /// Training: the weights twice and their gradients once; AdamW and EMA read weight, gradient, two
    /// moments and average and write all but the gradient; and what the backward needs of the forward
    /// (per token the two normalised inputs, q, k, v, attention's output, both branches, and the
    /// MLP's hidden state before and after its activation) is written once and read once.
    pub(crate) fn bytes(&self, kind: Kind, batch: usize) -> f64 {
        let (t, d, h) = self.sizes();
        let tokens = t * batch as f64 * self.depth as f64;
        let hidden = tokens * d * 4.0;
        F32 * match kind {
            Kind::FineTune => {
                let kept = tokens * (8.0 * d + 2.0 * h);
                self.parameters() * 12.0 + 3.0 * hidden + 2.0 * kept
            }
            _ => self.parameters() + hidden,
        }
    }
}

/// Operations of one step of `kind` on `batch` samples; `student` is the model that masked KD trains.
pub(crate) fn flops(kind: Kind, model: &Model, student: Option<&Model>, batch: usize) -> Flops {
    let b = batch as f64;
    let whole = model.whole().times(b);
    let both = |n: f64| Flops { least: n, plain: n };
    match kind {
        Kind::Matmul => both(of_matmul()),
        Kind::Copy => both(0.0),
        Kind::Forward => both(whole.forward()),
        // Conditional and unconditional.
        Kind::Sampling => both(2.0 * whole.forward()),
        Kind::FineTune => both(whole.forward() + whole.backward()),
        Kind::MaskedKd => {
            let taught = student.unwrap_or(model).whole().times(b);
            both(whole.forward() + taught.forward() + taught.backward())
        }
        Kind::LearnFull | Kind::LearnLora => {
            // Every block runs for every sample, as the mask's gradient asks for; but only a block's
            // kept samples, half of them at 1:2, send a gradient through it.
            let kept = (model.blocks().times(0.5) + model.ends()).times(b);
            if kind == Kind::LearnFull {
                return Flops {
                    least: whole.forward() + kept.backward(),
                    plain: whole.forward() + whole.backward(),
                };
            }
            Flops {
                // W + B·A can be formed once per step, which costs next to nothing.
                least: whole.forward() + kept.backward_frozen(),
                // A and B are trained, so their products have all three passes.
                plain: whole.forward() + whole.backward_frozen() + 3.0 * b * model.low_rank(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dit(hidden_size: usize, depth: usize) -> Model {
        Model {
            input_size: 32,
            patch_size: 2,
            in_channels: 4,
            hidden_size,
            depth,
            mlp_ratio: 4.0,
            num_classes: 1000,
            class_dropout_prob: 0.1,
            learn_sigma: true,
        }
    }

    fn near(found: f64, expected: f64, relative: f64) {
        assert!(
            (found / expected - 1.0).abs() < relative,
            "{found:e} is not near {expected:e}"
        );
    }

    #[test]
    fn a_forward_costs_what_the_paper_says() {
        // Peebles & Xie 2023, table 4: Gflops counted as multiply-adds.
        for (width, depth, multiply_adds) in [
            (384, 12, 6.06),
            (768, 12, 23.01),
            (1024, 24, 80.71),
            (1152, 28, 118.64),
        ] {
            let cost = flops(Kind::Forward, &dit(width, depth), None, 1);
            near(cost.least, 2e9 * multiply_adds, 5e-3);
            assert_eq!(cost.least, cost.plain);
        }
        near(
            flops(Kind::Forward, &dit(384, 12), None, 8).least,
            97e9,
            1e-2,
        );
    }

    #[test]
    fn the_parameters_are_those_of_the_published_models() {
        near(dit(384, 12).parameters(), 32.96e6 - 98_304.0, 5e-3);
        near(dit(1152, 28).parameters(), 675.1e6, 1e-3);
    }

    #[test]
    fn training_costs_follow_from_the_forward() {
        let (teacher, student) = (dit(384, 12), dit(384, 6));
        let of = |kind| flops(kind, &teacher, Some(&student), 8);
        let forward = of(Kind::Forward).least;
        near(of(Kind::Sampling).least, 2.0 * forward, 1e-12);
        near(of(Kind::FineTune).least, 3.0 * forward, 1e-12);
        // Half the depth, three passes, after the teacher's one.
        near(of(Kind::MaskedKd).least, 2.5 * forward, 5e-3);
        let full = of(Kind::LearnFull);
        near(full.plain, 3.0 * forward, 1e-12);
        near(full.least, 2.0 * forward, 5e-3);
        // Attention's share has both gradients, the rest one.
        let lora = of(Kind::LearnLora);
        let share = 2.0 * 256.0 / (2.0 * 256.0 + 12.0 * 384.0);
        near(lora.least, forward * (1.0 + 0.5 * (1.0 + share)), 5e-3);
        near(lora.plain, forward * (2.0 + share + 3.0 * 0.027), 1e-2);
    }

    #[test]
    fn bytes_grow_with_weights_and_with_tokens() {
        let model = dit(384, 12);
        let weights = 4.0 * model.parameters();
        let of = |kind, batch| model.bytes(kind, batch);
        near(of(Kind::Forward, 0), weights, 1e-12);
        near(of(Kind::FineTune, 0), 12.0 * weights, 1e-12);
        let hidden = 4.0 * 4.0 * (256.0 * 384.0) * 12.0;
        near(
            of(Kind::Forward, 8) - of(Kind::Forward, 0),
            8.0 * hidden,
            1e-9,
        );
    }

    #[test]
    fn a_config_is_read_as_the_binary_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"architecture": "DiT", "diffusion": {}, "model": {"input_size": 16, "patch_size": 4,
            "in_channels": 4, "hidden_size": 64, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0, "num_classes": 10,
            "class_dropout_prob": 0.0, "learn_sigma": false}}"#;
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let model = Model::read(dir.path()).unwrap();
        assert_eq!((model.depth, model.tokens()), (3, 16));
    }
}
