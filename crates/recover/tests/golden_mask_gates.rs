//! Parity of one learning step with the reference (`dit_mask_gates.safetensors`): losses, every recorded
//! gradient, and the parameters after one clipped AdamW step, for both ways to blend.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use std::ops::Range;

use candle_core::{Device, Tensor, Var};
use tinyfusion_core::{Group, Plan, Result, StateDict, run};
use tinyfusion_diffusion::{
    DenoisingDraw, DenoisingObjective, DiffusionConfig, GaussianDiffusion, LabelDrop, Losses,
};
use tinyfusion_mask::{Linear, MaskSampler, logit_name};
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_recover::{
    Blend, DeltaW, Drawn, LearnConfig, LoraLayers, MaskedStack, Teacher, Variables,
};
use tinyfusion_testing::{Golden, flat};
use tinyfusion_train::{
    FitConfig, LrSchedule, ParamGroup, Progress, RunDir, StepLoss, Stop, TrainStep, fit,
};

struct Fixture {
    golden: Golden,
    model: DiTConfig,
    weights: StateDict,
    objective: DenoisingObjective,
    draw: DenoisingDraw,
}

fn fixture() -> Fixture {
    let golden = Golden::open("dit_mask_gates.safetensors");
    let model: DiTConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
    let weights: StateDict = golden
        .strip("w.")
        .into_iter()
        .filter(|(name, _)| !name.starts_with("gumbel_gates."))
        .collect();
    weights.check(&model.params()).unwrap();
    // The reference's create_diffusion(""): the defaults.
    let diffusion = GaussianDiffusion::new(DiffusionConfig::default()).unwrap();
    let labels = LabelDrop {
        num_classes: model.num_classes as u32,
        probability: 0.0,
    };
    let objective = DenoisingObjective::new(diffusion, labels).unwrap();
    let batch = tinyfusion_core::LatentBatch {
        x: golden.tensor("in.x_start"),
        y: Tensor::new(golden.ids("in.y"), &Device::Cpu).unwrap(),
    };
    let draw = objective
        .draw_at(&batch, golden.ids("in.t"), golden.tensor("in.noise"))
        .unwrap();
    golden.close("in.x_t", &draw.x_t);
    Fixture {
        golden,
        model,
        weights,
        objective,
        draw,
    }
}

fn groups(golden: &Golden) -> Vec<Group> {
    let number = |v: &serde_json::Value| v.as_u64().unwrap() as usize;
    golden.config["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| Group {
            n: number(&g[0]),
            m: number(&g[1]),
        })
        .collect()
}

/// Name of our variable in the golden file.
fn golden_name(name: &str) -> String {
    name.strip_prefix("mask.logits.")
        .map_or_else(|| name.to_string(), |g| format!("gumbel_gates.{g}"))
}

impl Fixture {
    fn config(
        &self,
        temperature: (f64, f64),
        delta: DeltaW,
        blend: Blend,
        micro_batches: usize,
    ) -> LearnConfig {
        let pattern: Vec<String> = groups(&self.golden)
            .iter()
            .map(|g| format!("{}:{}", g.n, g.m))
            .collect();
        let number = |key: &str| self.golden.number(key);
        let betas = self.golden.config["betas"].as_array().unwrap();
        LearnConfig {
            // `N:Mx1` where there is one group: alone, `N:M` would repeat.
            pattern: if let [one] = &pattern[..] {
                format!("{one}x1")
            } else {
                pattern.join(",")
            }
            .parse()
            .unwrap(),
            delta,
            lr: number("lr"),
            mask_lr: number("gate_lr"),
            tau: Linear::constant(temperature.0),
            scale: Linear::constant(temperature.1),
            blend,
            fit: FitConfig {
                steps: 1,
                batch_size: self.draw.t.len(),
                micro_batches,
                clip: Some(number("clip")),
                betas: (betas[0].as_f64().unwrap(), betas[1].as_f64().unwrap()),
                eps: number("eps"),
                log_every: 1,
                ..FitConfig::default()
            },
            ..LearnConfig::default()
        }
    }

    fn cases(&self) -> Vec<(String, (f64, f64))> {
        let cases = self.golden.config["cases"].as_array().unwrap().iter();
        cases
            .map(|c| {
                (
                    c["name"].as_str().unwrap().to_string(),
                    (c["tau"].as_f64().unwrap(), c["scaling"].as_f64().unwrap()),
                )
            })
            .collect()
    }

    fn lora(&self) -> DeltaW {
        let rank = self.golden.number("lora.rank") as usize;
        DeltaW::Lora {
            rank,
            alpha: self.golden.number("lora.alpha"),
            layers: LoraLayers::All,
        }
    }
}

/// The recorded draw instead of a random one.
struct Injected<'a> {
    fixture: &'a Fixture,
    masked: &'a MaskedStack<DiT>,
    case: &'a str,
    config: &'a LearnConfig,
}

impl TrainStep for Injected<'_> {
    type Batch = Drawn<DenoisingDraw>;

    fn draw(&self, step: u64) -> Result<Self::Batch> {
        let golden = &self.fixture.golden;
        Ok(Drawn {
            draw: self.fixture.draw.clone(),
            noise: (0..groups(golden).len())
                .map(|g| golden.tensor(&format!("{}.gumbel.{g}", self.case)))
                .collect(),
            temperature: self.config.temperature(step),
        })
    }

    fn loss(&self, drawn: &Self::Batch, rows: Range<usize>) -> Result<StepLoss> {
        let candidates = self.masked.candidates(drawn)?;
        let loss = self
            .masked
            .losses(&self.fixture.objective, drawn, &candidates, rows)?
            .mean_all()?;
        Ok(StepLoss {
            loss,
            scalars: vec![],
        })
    }
}

/// Checks everything recorded under `CASE.PART.`.
fn check(f: &Fixture, case: &str, part: &str, config: &LearnConfig) {
    let golden = &f.golden;
    let key = |what: &str| format!("{case}.{part}.{what}");
    let build = |weights: &StateDict, scale: f64| DiT::with_lora(&f.model, weights, scale);
    let teacher = Teacher {
        weights: f.weights.clone(),
        is_fixed: &DiTConfig::is_fixed,
        build: &build,
    };
    let (masked, Variables { weights, logits }) = MaskedStack::new(config, teacher).unwrap();
    // What the reference started from.
    for (g, (_, var)) in logits.iter().enumerate() {
        var.set(&golden.tensor(&format!("w.gumbel_gates.{g}")))
            .unwrap();
    }
    if part == "lora" {
        assert_eq!(
            weights.len(),
            golden.names("lora.").len(),
            "every linear layer has a low-rank update"
        );
        weights
            .iter()
            .for_each(|(name, var)| var.set(&golden.tensor(&format!("lora.{name}"))).unwrap());
    }

    // Forward.
    let step = Injected {
        fixture: f,
        masked: &masked,
        case,
        config,
    };
    let drawn = step.draw(0).unwrap();
    let output = masked
        .output(
            &f.objective.query(&f.draw).unwrap(),
            &drawn.noise,
            drawn.temperature,
        )
        .unwrap();
    golden.close(&key("output"), &output);
    let Losses { loss, mse, vb } = f.objective.losses(&output, &f.draw).unwrap();
    golden.close(&key("mse"), &mse.unwrap());
    golden.close(&key("vb"), &vb.unwrap());
    golden.close(&key("loss"), &loss);
    let all = 0..f.draw.t.len();
    let candidates = masked.candidates(&drawn).unwrap();
    let loss = masked
        .losses(&f.objective, &drawn, &candidates, all.clone())
        .unwrap();
    golden.close(&key("loss"), &loss);
    golden.close(&key("loss_mean"), &loss.mean_all().unwrap());

    // Gradients. One that the exact blend did not need is zero.
    let grads = step.loss(&drawn, all).unwrap().loss.backward().unwrap();
    let variables: Vec<(String, Var)> = weights.iter().chain(&logits).cloned().collect();
    let gradient = |var: &Var| {
        grads
            .get(var)
            .map_or_else(|| var.zeros_like().unwrap(), Tensor::clone)
    };
    let found: Vec<(String, Tensor)> = variables
        .iter()
        .map(|(n, v)| (golden_name(n), gradient(v)))
        .collect();
    for name in golden.names(&key("grad.")) {
        let ours = found
            .iter()
            .find(|(n, _)| key("grad.") + n == name)
            .unwrap_or_else(|| panic!("{name} is not trained"));
        golden.close(&name, &ours.1);
    }
    let square: f64 = found.iter().flat_map(|(_, g)| flat(g)).map(|v| v * v).sum();
    let norm = Tensor::new(square.sqrt(), &Device::Cpu).unwrap();
    golden.close(&key("grad_norm"), &norm);

    // One step of the loop itself.
    let folder = tempfile::tempdir().unwrap();
    let dir = RunDir::open(folder.path(), config).unwrap();
    let group =
        |name: &str, lr, vars| ParamGroup::new(name, LrSchedule::constant(lr), vars).unwrap();
    let trained = [
        group("mask", config.mask_lr, logits),
        group("delta", config.lr, weights),
    ];
    fit(
        &config.fit,
        &step,
        &trained,
        &dir,
        &Stop::default(),
        &Progress::hidden(),
    )
    .unwrap();
    let metrics = std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let metrics: serde_json::Value = serde_json::from_str(metrics.trim()).unwrap();
    golden.close(
        &key("grad_norm"),
        &Tensor::new(metrics["grad_norm"].as_f64().unwrap(), &Device::Cpu).unwrap(),
    );
    let after = golden.names(&key("after."));
    assert!(!after.is_empty());
    let mut compared = 0;
    for name in after {
        let at = found
            .iter()
            .position(|(n, _)| key("after.") + n == name)
            .unwrap();
        let grad = golden
            .get(&name.replace(".after.", ".grad."))
            .unwrap_or_else(|| found[at].1.clone());
        let (ours, grad, want) = (
            flat(variables[at].1.as_tensor()),
            flat(&grad),
            flat(&golden.tensor(&name)),
        );
        let tolerance = golden.tolerance(&name);
        // AdamW's first step is lr·g/(|g| + ε): rounding noise where the gradient is noise. Where it is exactly 0
        // (a block that no sample keeps), nothing moves.
        for i in (0..want.len()).filter(|&i| grad[i].abs() > 1e-6 || grad[i] == 0.0) {
            let off = (ours[i] - want[i]).abs();
            assert!(
                off <= tolerance,
                "{name}[{i}]: {} instead of {} (off by {off:.2e}, allowed {tolerance:.2e}; gradient {:e})",
                ours[i],
                want[i],
                grad[i]
            );
            compared += usize::from(grad[i] != 0.0);
        }
    }
    assert!(compared > 0, "{case}.{part}: nothing to compare");
}

fn check_both_blends(part: &str, delta: impl Fn(&Fixture) -> DeltaW) {
    let f = fixture();
    let mut checked = 0;
    for (case, temperature) in f.cases() {
        if f.golden.get(&format!("{case}.{part}.loss")).is_none() {
            continue;
        }
        for (blend, micro_batches) in [
            (Blend::Exact, 1),
            (Blend::Exact, f.draw.t.len()),
            (Blend::Plain, 1),
        ] {
            check(
                &f,
                &case,
                part,
                &f.config(temperature, delta(&f), blend, micro_batches),
            );
            checked += 1;
        }
    }
    assert!(checked > 0, "the file records no case of {part}");
}

#[test]
fn golden_full_update() {
    check_both_blends("full", |_| DeltaW::Full);
}

#[test]
fn golden_low_rank_update() {
    check_both_blends("lora", Fixture::lora);
}

#[test]
fn golden_gates_alone() {
    check_both_blends("gatesonly", |_| DeltaW::Frozen);
}

#[test]
fn golden_pruned_output_of_the_decision() {
    let f = fixture();
    let groups = groups(&f.golden);
    let sampler = MaskSampler::new(groups.clone(), &Device::Cpu).unwrap();
    let logits = (0..groups.len())
        .map(|g| {
            (
                logit_name(g),
                f.golden.tensor(&format!("w.gumbel_gates.{g}")),
            )
        })
        .collect();
    let kept = sampler.decide(&logits, f.cases()[0].1.1).unwrap().kept;
    assert_eq!(
        kept,
        f.golden
            .ids("decision.kept_layers")
            .into_iter()
            .map(|k| k as usize)
            .collect::<Vec<_>>()
    );

    // Skipped, and rebuilt by renaming.
    let query = f.objective.query(&f.draw).unwrap();
    let net = DiT::new(&f.model, &f.weights).unwrap();
    let skipped = run(&net, &query, &Plan::keep(f.model.depth, &kept))
        .unwrap()
        .output;
    f.golden.close("decision.pruned_output", &skipped);
    let block = |name: &str| {
        name.strip_prefix("blocks.")?
            .split_once('.')
            .map(|(i, rest)| (i.parse::<usize>().unwrap(), rest.to_string()))
    };
    let cut: StateDict = f
        .weights
        .iter()
        .filter_map(|(name, t)| match block(name) {
            None => Some((name.to_string(), t.clone())),
            Some((i, rest)) => kept
                .iter()
                .position(|&k| k == i)
                .map(|at| (format!("blocks.{at}.{rest}"), t.clone())),
        })
        .collect();
    let cut = DiT::new(&f.model.with_depth(kept.len()), &cut).unwrap();
    f.golden.close(
        "decision.pruned_output",
        &run(&cut, &query, &Plan::full(kept.len())).unwrap().output,
    );
}
