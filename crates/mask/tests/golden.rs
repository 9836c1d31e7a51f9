//! Parity with masks, soft samples and decisions recorded from the reference implementation.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tinyfusion_core::{Group, StateDict};
use tinyfusion_mask::{MaskSampler, Temperature, logit_name};

struct Golden {
    tensors: HashMap<String, Tensor>,
    config: Value,
    f32_vs_f64: Value,
}

impl Golden {
    fn load(name: &str) -> Self {
        let folder = std::env::var("TINYFUSION_GOLDEN").map_or_else(
            |_| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/golden")),
            PathBuf::from,
        );
        let bytes = std::fs::read(folder.join(name)).expect("the golden file");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("its header");
        let meta = header.metadata().as_ref().expect("its metadata");
        let json = |key: &str| serde_json::from_str(&meta[key]).expect("JSON");
        Self {
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
                .expect("its tensors"),
            config: json("config"),
            f32_vs_f64: json("f32_vs_f64"),
        }
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("golden tensor `{name}`"))
    }

    fn ints(&self, name: &str) -> Vec<i64> {
        self.get(name)
            .flatten_all()
            .and_then(|t| t.to_vec1())
            .expect("i64")
    }

    /// |a − b| ≤ 1e-5·max|b| + 20·rounding noise of the reference.
    fn assert_close(&self, name: &str, found: &[f64]) {
        let expected = values(self.get(name));
        assert_eq!(found.len(), expected.len(), "{name}");
        let noise = self.f32_vs_f64[name][0].as_f64().unwrap_or(0.0);
        let tolerance = 1e-5 * expected.iter().fold(0.0, |m: f64, v| m.max(v.abs())) + 20.0 * noise;
        for (a, b) in found.iter().zip(&expected) {
            assert!(
                (a - b).abs() <= tolerance,
                "{name}: {a} against {b}, tolerance {tolerance:e}"
            );
        }
    }

    fn groups(&self) -> Vec<Group> {
        let groups = self.config["groups"].as_array().expect("groups");
        let number = |v: &Value| v.as_u64().expect("a count") as usize;
        groups
            .iter()
            .map(|g| Group {
                n: number(&g[0]),
                m: number(&g[1]),
            })
            .collect()
    }

    fn logits(&self, groups: usize) -> StateDict {
        (0..groups)
            .map(|g| {
                (
                    logit_name(g),
                    self.get(&format!("w.gumbel_gates.{g}")).clone(),
                )
            })
            .collect()
    }
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .and_then(|t| t.flatten_all()?.to_vec1())
        .expect("values")
}

const FILE: &str = "dit_mask_gates.safetensors";

#[test]
fn golden_candidates_are_in_the_references_order() {
    let golden = Golden::load(FILE);
    let sampler = MaskSampler::new(golden.groups(), &Device::Cpu).unwrap();
    for (g, options) in sampler.options().iter().enumerate() {
        let expected = golden.get(&format!("options.{g}"));
        assert_eq!(options.dims(), expected.dims());
        assert_eq!(values(options), values(expected), "options.{g}");
    }
    for (spec, g) in sampler.param_specs().iter().zip(0..) {
        assert_eq!(
            spec.shape,
            golden.get(&format!("w.gumbel_gates.{g}")).dims()
        );
    }
}

#[test]
fn golden_samples_agree_in_every_case() {
    let golden = Golden::load(FILE);
    let groups = golden.groups();
    let sampler = MaskSampler::new(groups.clone(), &Device::Cpu).unwrap();
    let logits = golden.logits(groups.len());
    let cases = golden.config["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let temperature = Temperature {
            tau: case["tau"].as_f64().unwrap(),
            scale: case["scaling"].as_f64().unwrap(),
        };
        let noise: Vec<Tensor> = (0..groups.len())
            .map(|g| golden.get(&format!("{name}.gumbel.{g}")).clone())
            .collect();
        let sampled = sampler.sample(&logits, &noise, temperature).unwrap();
        for g in 0..groups.len() {
            golden.assert_close(&format!("{name}.soft.{g}"), &values(&sampled.soft[g]));
            let index: Vec<i64> = sampled.index[g].iter().map(|&k| i64::from(k)).collect();
            assert_eq!(
                index,
                golden.ints(&format!("{name}.index.{g}")),
                "{name}.index.{g}"
            );
            let hard = values(golden.get(&format!("{name}.hard.{g}")));
            let width = hard.len() / index.len();
            for (b, k) in index.iter().enumerate() {
                assert_eq!(
                    hard[b * width + *k as usize],
                    1.0,
                    "{name}.hard.{g} row {b}"
                );
            }
        }
        let mask = golden.get(&format!("{name}.mask"));
        assert_eq!(sampled.mask.dims(), mask.dims());
        assert_eq!(values(&sampled.mask), values(mask), "{name}.mask");
    }
}

#[test]
fn golden_decision() {
    let golden = Golden::load(FILE);
    let groups = golden.groups();
    let sampler = MaskSampler::new(groups.clone(), &Device::Cpu).unwrap();
    let scale = golden.config["cases"][0]["scaling"].as_f64().unwrap();
    let selection = sampler.decide(&golden.logits(groups.len()), scale).unwrap();
    let chosen: Vec<i64> = selection
        .decisions
        .iter()
        .map(|d| d.chosen as i64)
        .collect();
    assert_eq!(chosen, golden.ints("decision.selected"));
    let kept: Vec<i64> = selection.kept.iter().map(|&k| k as i64).collect();
    assert_eq!(kept, golden.ints("decision.kept_layers"));
    let confidence: Vec<f64> = selection.decisions.iter().map(|d| d.confidence).collect();
    golden.assert_close("decision.confidence", &confidence);
    assert_eq!(
        (selection.criterion.as_str(), selection.groups),
        ("learned", groups)
    );
}
