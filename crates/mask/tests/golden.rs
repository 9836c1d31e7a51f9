//! Parity with masks, soft samples and decisions recorded from the reference implementation.

use candle_core::{Device, Tensor};
use serde_json::Value;
use tinyfusion_core::{Group, StateDict};
use tinyfusion_mask::{MaskSampler, Temperature, logit_name};
use tinyfusion_testing::{Golden, flat};

fn groups(golden: &Golden) -> Vec<Group> {
    let groups = golden.config["groups"].as_array().expect("groups");
    let number = |v: &Value| v.as_u64().expect("a count") as usize;
    groups
        .iter()
        .map(|g| Group {
            n: number(&g[0]),
            m: number(&g[1]),
        })
        .collect()
}

fn logits(golden: &Golden, groups: usize) -> StateDict {
    (0..groups)
        .map(|g| (logit_name(g), golden.tensor(&format!("w.gumbel_gates.{g}"))))
        .collect()
}

const FILE: &str = "dit_mask_gates.safetensors";

#[test]
fn golden_candidates_are_in_the_references_order() {
    let golden = Golden::open(FILE);
    let sampler = MaskSampler::new(groups(&golden), &Device::Cpu).unwrap();
    for (g, options) in sampler.options().iter().enumerate() {
        let expected = golden.tensor(&format!("options.{g}"));
        assert_eq!(options.dims(), expected.dims());
        assert_eq!(flat(options), flat(&expected), "options.{g}");
    }
    for (spec, g) in sampler.param_specs().iter().zip(0..) {
        assert_eq!(
            spec.shape,
            golden.tensor(&format!("w.gumbel_gates.{g}")).dims()
        );
    }
}

#[test]
fn golden_samples_agree_in_every_case() {
    let golden = Golden::open(FILE);
    let groups = groups(&golden);
    let sampler = MaskSampler::new(groups.clone(), &Device::Cpu).unwrap();
    let logits = logits(&golden, groups.len());
    let cases = golden.config["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let temperature = Temperature {
            tau: case["tau"].as_f64().unwrap(),
            scale: case["scaling"].as_f64().unwrap(),
        };
        let noise: Vec<Tensor> = (0..groups.len())
            .map(|g| golden.tensor(&format!("{name}.gumbel.{g}")))
            .collect();
        let sampled = sampler.sample(&logits, &noise, temperature).unwrap();
        for g in 0..groups.len() {
            golden.close(&format!("{name}.soft.{g}"), &sampled.soft[g]);
            let index = &sampled.index[g];
            assert_eq!(
                index,
                &golden.ids(&format!("{name}.index.{g}")),
                "{name}.index.{g}"
            );
            let hard = flat(&golden.tensor(&format!("{name}.hard.{g}")));
            let width = hard.len() / index.len();
            for (b, k) in index.iter().enumerate() {
                assert_eq!(
                    hard[b * width + *k as usize],
                    1.0,
                    "{name}.hard.{g} row {b}"
                );
            }
        }
        let mask = golden.tensor(&format!("{name}.mask"));
        assert_eq!(sampled.mask.dims(), mask.dims());
        assert_eq!(flat(&sampled.mask), flat(&mask), "{name}.mask");
    }
}

#[test]
fn golden_decision() {
    let golden = Golden::open(FILE);
    let groups = groups(&golden);
    let sampler = MaskSampler::new(groups.clone(), &Device::Cpu).unwrap();
    let scale = golden.config["cases"][0]["scaling"].as_f64().unwrap();
    let selection = sampler
        .decide(&logits(&golden, groups.len()), scale)
        .unwrap();
    let chosen: Vec<u32> = selection
        .decisions
        .iter()
        .map(|d| d.chosen as u32)
        .collect();
    assert_eq!(chosen, golden.ids("decision.selected"));
    let kept: Vec<u32> = selection.kept.iter().map(|&k| k as u32).collect();
    assert_eq!(kept, golden.ids("decision.kept_layers"));
    let confidence: Vec<f64> = selection.decisions.iter().map(|d| d.confidence).collect();
    let confidence = Tensor::new(confidence, &Device::Cpu).unwrap();
    golden.close("decision.confidence", &confidence);
    assert_eq!(
        (selection.criterion.as_str(), selection.groups),
        ("learned", groups)
    );
}
