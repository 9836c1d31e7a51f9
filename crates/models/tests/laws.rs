//! The laws of `BlockStack` on DiT and SiT.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Device, Tensor};
use tinyfusion_core::laws::{self, Subject};
use tinyfusion_core::{
    BlockStack, LatentQuery, Plan, Result, Rows, StateDict, StepRng, run, stream,
};
use tinyfusion_models::{DiT, DiTConfig, SiT, SiTConfig};
use tinyfusion_nn::layers::LoraSpec;

fn config() -> DiTConfig {
    DiTConfig {
        input_size: 8,
        patch_size: 4,
        in_channels: 3,
        hidden_size: 16,
        depth: 4,
        num_heads: 2,
        num_classes: 5,
        ..DiTConfig::default()
    }
}

/// Every tensor random, the zero-initialised ones included.
fn random_weights(config: &DiTConfig) -> Result<StateDict> {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    config
        .params()
        .iter()
        .map(|s| {
            Ok((
                s.name.clone(),
                (rng.normal(s.shape.as_slice(), &Device::Cpu)? * 0.2)?,
            ))
        })
        .collect()
}

fn query(rows: Option<&[usize]>) -> Result<LatentQuery> {
    let x = StepRng::new(6, 0, stream::DRAW).normal((3, 3, 8, 8), &Device::Cpu)?;
    let t = Tensor::new(&[3f32, 480.0, 990.0], &Device::Cpu)?;
    let y = Tensor::new(&[0u32, 4, 5], &Device::Cpu)?;
    let Some(rows) = rows else {
        return Ok(LatentQuery { x, t, y });
    };
    let index = Tensor::new(
        rows.iter().map(|&r| r as u32).collect::<Vec<_>>(),
        &Device::Cpu,
    )?;
    Ok(LatentQuery {
        x: x.select(&index)?,
        t: t.select(&index)?,
        y: y.select(&index)?,
    })
}

struct Subjects;

impl Subject for Subjects {
    type Net = DiT;
    fn depth(&self) -> usize {
        config().depth
    }
    fn weights(&self) -> Result<StateDict> {
        random_weights(&config())
    }
    fn build(&self, weights: &StateDict) -> Result<DiT> {
        DiT::new(&config(), weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<DiT> {
        let cut = tinyfusion_checkpoint::keep_blocks(weights, "blocks", kept)?;
        DiT::new(&config().with_depth(kept.len()), &cut)
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<LatentQuery> {
        query(rows)
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![vec![0, 3], vec![1], vec![0, 1, 2]]
    }
    fn is_fixed(&self, name: &str) -> bool {
        DiTConfig::is_fixed(name)
    }
}

/// SiT at the same sizes; as its `learn_sigma` is on, half of the final layer's rows are dropped, but no tensor.
struct Interpolating;

impl Subject for Interpolating {
    type Net = SiT;
    fn depth(&self) -> usize {
        config().depth
    }
    fn weights(&self) -> Result<StateDict> {
        random_weights(&config())
    }
    fn build(&self, weights: &StateDict) -> Result<SiT> {
        SiT::new(&SiTConfig(config()), weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<SiT> {
        let cut = tinyfusion_checkpoint::keep_blocks(weights, "blocks", kept)?;
        SiT::new(&SiTConfig(config()).with_depth(kept.len()), &cut)
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<LatentQuery> {
        let query = query(rows)?;
        Ok(LatentQuery {
            t: (query.t / 1000.0)?, // in [0, 1]
            ..query
        })
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        Subjects.selections()
    }
    fn is_fixed(&self, name: &str) -> bool {
        SiTConfig::is_fixed(name)
    }
}

#[test]
fn dit_keeps_the_laws() {
    laws::check(&Subjects).unwrap();
}

#[test]
fn sit_keeps_the_laws() {
    laws::check(&Interpolating).unwrap();
}

#[test]
fn initial_weights_are_the_identity_on_tokens() {
    // adaLN-Zero: every gate starts at 0 and the final layer at 0.
    let config = config();
    let net = DiT::new(&config, &config.init(0, &Device::Cpu).unwrap()).unwrap();
    let trace = run(
        &net,
        &query(None).unwrap(),
        &Plan::full(4).with_taps([0, 3]),
    )
    .unwrap();
    assert_eq!(
        tinyfusion_testing::max_diff(&trace.taps[0], &trace.taps[1]),
        0.0
    );
    assert_eq!(
        trace
            .output
            .abs()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
        0.0
    );
}

#[test]
fn lora_merged_is_lora_beside() {
    merged_is_beside(|weights, scale| DiT::with_lora(&config(), weights, scale));
    merged_is_beside(|weights, scale| SiT::with_lora(&SiTConfig(config()), weights, scale));
}

fn merged_is_beside<S: BlockStack<Input = LatentQuery>>(
    build: impl Fn(&StateDict, f64) -> Result<S>,
) {
    let (config, spec) = (
        config(),
        LoraSpec {
            rank: 3,
            alpha: 6.0,
        },
    );
    let mut weights = random_weights(&config).unwrap();
    let low = spec
        .init(&config.params(), |_| true, 1, &Device::Cpu)
        .unwrap();
    // Every linear layer: 4 in each block and its adaLN, 2 in the timestep MLP, 2 in the final layer.
    assert_eq!(low.len(), 2 * (5 * config.depth + 4));
    let mut rng = StepRng::new(8, 0, stream::INIT);
    for (name, t) in low.iter() {
        let noise = rng.normal(t.shape().clone(), &Device::Cpu).unwrap();
        weights.insert(name, (noise * 0.1).unwrap());
    }
    let beside = build(&weights, spec.scale()).unwrap();
    let merged = build(&spec.merge(&weights).unwrap(), 0.0).unwrap();
    let plain = build(&random_weights(&config).unwrap(), 0.0).unwrap();
    let out = |net: &S| {
        run(net, &query(None).unwrap(), &Plan::full(4))
            .unwrap()
            .output
    };
    let scale = tinyfusion_testing::flat(&out(&merged))
        .iter()
        .fold(0f64, |m, v| m.max(v.abs()));
    assert!(tinyfusion_testing::max_diff(&out(&beside), &out(&merged)) < 1e-5 * scale);
    assert!(
        tinyfusion_testing::max_diff(&out(&plain), &out(&merged)) > 1e-2 * scale,
        "the update does something"
    );
}

#[test]
fn sit_is_the_first_half_of_dit() {
    let weights = random_weights(&config()).unwrap();
    let query = Interpolating.input(None).unwrap();
    let dit = DiT::new(&config(), &weights).unwrap();
    let whole = run(&dit, &query, &Plan::full(4)).unwrap().output;
    assert_eq!(whole.dims(), [3, 6, 8, 8]);
    for recomputing in [false, true] {
        let sit = SiT::new(&SiTConfig(config()), &weights)
            .unwrap()
            .recomputing(recomputing);
        assert_eq!(sit.config().out_channels(), 3);
        let kept = run(&sit, &query, &Plan::full(4)).unwrap().output;
        let first = whole.narrow(1, 0, 3).unwrap();
        assert_eq!(tinyfusion_testing::max_diff(&kept, &first), 0.0);
    }
}

#[test]
fn a_sit_config_is_written_as_a_dit_config_and_names_itself_in_errors() {
    let sit = SiTConfig(config());
    let text = serde_json::to_value(&sit).unwrap();
    assert_eq!(text, serde_json::to_value(config()).unwrap());
    assert_eq!(serde_json::from_value::<SiTConfig>(text).unwrap(), sit);
    let unknown = serde_json::json!({ "depth": 2, "learn_velocity": true });
    assert!(serde_json::from_value::<SiTConfig>(unknown).is_err());
    let bad = sit.with_depth(0);
    for error in [
        bad.validate().unwrap_err(),
        bad.init(0, &Device::Cpu).unwrap_err(),
        SiT::new(&bad, &StateDict::new()).unwrap_err(),
    ] {
        assert!(
            matches!(&error, tinyfusion_core::Error::Usage(m) if m.starts_with("SiT config: depth is 0")),
            "{error}"
        );
    }
}

#[test]
fn an_interpolant_is_read_from_a_config_file() {
    use tinyfusion_diffusion::samplers::{OdeConfig, SdeConfig};
    use tinyfusion_diffusion::{InterpolantConfig, Path, Prediction, Weighting};
    let read = serde_json::from_value::<InterpolantConfig>;
    assert_eq!(
        read(serde_json::json!({})).unwrap(),
        InterpolantConfig::default()
    );
    let full = serde_json::json!({
        "path": "gvp", "prediction": "score", "weighting": "likelihood", "sample_eps": 0.01
    });
    let config = read(full.clone()).unwrap();
    assert_eq!(
        (config.path, config.prediction, config.weighting),
        (Path::Gvp, Prediction::Score, Weighting::Likelihood)
    );
    assert_eq!((config.train_eps, config.sample_eps), (None, Some(0.01)));
    assert_eq!(serde_json::to_value(config).unwrap(), full);
    for bad in [
        serde_json::json!({ "path": "spline" }),
        serde_json::json!({ "prediction": "x" }),
        serde_json::json!({ "eps": 0.1 }),
        serde_json::json!({ "steps": 1000 }), // a DiT's diffusion
    ] {
        assert!(read(bad.clone()).is_err(), "{bad}");
    }
    let form = serde_json::json!({ "form": "sideways" });
    let error = serde_json::from_value::<SdeConfig>(form).unwrap_err();
    assert!(
        error.to_string().contains("increasing_decreasing"),
        "{error}"
    );
    assert!(serde_json::from_value::<OdeConfig>(serde_json::json!({ "method": "rk4" })).is_err());
}

#[test]
fn misfits_are_usage_errors_that_name_the_field() {
    for (config, field) in [
        (
            DiTConfig {
                patch_size: 3,
                ..config()
            },
            "patch_size",
        ),
        (
            DiTConfig {
                num_heads: 3,
                ..config()
            },
            "heads",
        ),
        (
            DiTConfig {
                depth: 0,
                ..config()
            },
            "depth",
        ),
        (
            DiTConfig {
                class_dropout_prob: 1.5,
                ..config()
            },
            "class_dropout_prob",
        ),
    ] {
        let error = config.validate().unwrap_err();
        assert!(
            matches!(&error, tinyfusion_core::Error::Usage(m) if m.contains(field)),
            "{error}"
        );
    }
}

#[test]
fn sizes_out_of_bounds_are_usage_errors_that_name_the_field() {
    type Change = fn(&mut DiTConfig, usize);
    let fields: [(&str, Change); 7] = [
        ("input_size", |c, n| c.input_size = n),
        ("patch_size", |c, n| c.patch_size = n),
        ("in_channels", |c, n| c.in_channels = n),
        ("hidden_size", |c, n| c.hidden_size = n),
        ("depth", |c, n| c.depth = n),
        ("num_heads", |c, n| c.num_heads = n),
        ("num_classes", |c, n| c.num_classes = n),
    ];
    for (field, change) in fields {
        for value in [0, (1 << 20) + 1, 1 << 32, usize::MAX / 3, usize::MAX] {
            let mut hostile = config();
            change(&mut hostile, value);
            for error in [
                hostile.validate().unwrap_err(),
                hostile.init(0, &Device::Cpu).unwrap_err(),
                DiT::new(&hostile, &StateDict::new()).unwrap_err(),
            ] {
                assert!(
                    matches!(&error, tinyfusion_core::Error::Usage(m)
                        if m.contains(field) && m.contains(&value.to_string())),
                    "{field} = {value}: {error}"
                );
            }
        }
    }
    for mlp_ratio in [
        0.0,
        0.01,
        -4.0,
        1e9,
        1e300,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ] {
        let error = DiTConfig {
            mlp_ratio,
            ..config()
        }
        .validate()
        .unwrap_err();
        assert!(
            matches!(&error, tinyfusion_core::Error::Usage(m) if m.contains("mlp_ratio")),
            "{mlp_ratio}: {error}"
        );
    }
    assert!(config().with_depth(4096).validate().is_ok());
    assert!(config().with_depth(4097).validate().is_err());
}

#[test]
fn sizes_whose_product_overflows_are_refused() {
    let big = 1 << 20;
    for hostile in [
        DiTConfig {
            input_size: big,
            patch_size: 1,
            ..config()
        },
        DiTConfig {
            input_size: big,
            patch_size: big,
            in_channels: big,
            hidden_size: big,
            mlp_ratio: 1.0,
            depth: 4096,
            ..config()
        },
    ] {
        let error = hostile.validate().unwrap_err();
        assert!(
            matches!(&error, tinyfusion_core::Error::Usage(m) if m.contains("values")),
            "{error}"
        );
    }
}
