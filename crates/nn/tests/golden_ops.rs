//! Parity of every operation and its gradients with PyTorch (`ops.safetensors`).
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Tensor, Var};
use tinyfusion_core::StateDict;
use tinyfusion_nn::{Scope, layers, ops};
use tinyfusion_testing::Golden;

const EPS: f64 = 1e-6;

struct Case {
    golden: Golden,
    op: &'static str,
    vars: Vec<(String, Var)>,
    dict: StateDict,
}

impl Case {
    fn new(op: &'static str) -> Self {
        let golden = Golden::open("ops.safetensors");
        let mut dict: StateDict = golden
            .strip(&format!("{op}."))
            .into_iter()
            .filter(|(k, _)| !k.starts_with("grad.") && k != "out" && k != "dout")
            .collect();
        let vars = dict.make_trainable(|_| true).unwrap();
        Self {
            golden,
            op,
            vars,
            dict,
        }
    }

    fn get(&self, name: &str) -> Tensor {
        self.dict.require(name).unwrap().clone()
    }

    /// Checks the output and the gradient of sum(out·dout) for every input.
    fn check(&self, out: &Tensor) {
        let key = |name: &str| format!("{}.{name}", self.op);
        self.golden.close(&key("out"), out);
        let grads = (out * self.golden.tensor(&key("dout")))
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        for (name, var) in &self.vars {
            let grad = grads
                .get(var)
                .unwrap_or_else(|| panic!("{name} has no gradient"));
            self.golden.close(&key(&format!("grad.{name}")), grad);
        }
    }
}

fn packed(parts: &[Tensor]) -> Tensor {
    Tensor::cat(parts, 1).unwrap()
}

#[test]
fn golden_layer_norm_modulate() {
    let c = Case::new("a");
    let modulation = packed(&[c.get("shift"), c.get("scale")]);
    c.check(&ops::layer_norm_modulate(&c.get("x"), &modulation, 0, 1, EPS).unwrap());
}

#[test]
fn golden_mlp() {
    let c = Case::new("b");
    let (width, hidden) = (c.golden.size("D"), c.golden.size("hidden"));
    c.check(
        &layers::Mlp::load(&Scope::new(&c.dict, 1.0), width, hidden)
            .unwrap()
            .forward(&c.get("x"))
            .unwrap(),
    );
}

#[test]
fn golden_attention() {
    let c = Case::new("c");
    let (width, heads) = (c.golden.size("D"), c.golden.size("heads"));
    let attention = layers::Attention::load(&Scope::new(&c.dict, 1.0), width, heads).unwrap();
    c.check(&attention.forward(&c.get("x")).unwrap());
}

#[test]
fn golden_gated_residual() {
    let c = Case::new("d");
    c.check(&ops::gated_residual(&c.get("x"), &c.get("y"), &packed(&[c.get("gate")]), 0).unwrap());
}

#[test]
fn golden_adaln_projection() {
    let c = Case::new("e");
    let (w, b) = (c.get("weight"), c.get("bias"));
    c.check(&ops::linear(&ops::silu(&c.get("c")).unwrap(), &w, Some(&b)).unwrap());
}

#[test]
fn golden_gelu_erf() {
    let c = Case::new("f");
    c.check(&ops::gelu_erf(&c.get("x")).unwrap());
}

#[test]
fn golden_gelu_tanh() {
    let c = Case::new("g");
    c.check(&ops::gelu_tanh(&c.get("x")).unwrap());
}

#[test]
fn golden_lora_linear() {
    let c = Case::new("h");
    let spec = layers::LoraSpec {
        rank: c.golden.size("lora_rank"),
        alpha: c.golden.number("lora_alpha"),
    };
    let (o, i) = c.get("weight").dims2().unwrap();
    let linear = layers::Linear::load(&Scope::new(&c.dict, spec.scale()), i, o).unwrap();
    c.check(&linear.forward(&c.get("x")).unwrap());
    // Merged, the same function.
    let named: StateDict = c
        .dict
        .iter()
        .map(|(n, t)| (format!("layer.{n}"), t.clone()))
        .collect();
    let merged = spec.merge(&named).unwrap();
    assert!(merged.names().all(|n| !n.contains("lora")));
    let merged = layers::Linear::load(&Scope::new(&merged, 0.0).at("layer"), i, o).unwrap();
    c.golden
        .close("h.out", &merged.forward(&c.get("x")).unwrap());
}

#[test]
fn golden_layer_norm_affine() {
    let c = Case::new("i");
    c.check(&ops::layer_norm(&c.get("x"), &c.get("weight"), &c.get("bias"), EPS).unwrap());
}
