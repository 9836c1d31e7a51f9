//! SiT against its recorded reference (`sit.safetensors`): the forward pass, guided too, and whole sampling runs of
//! both equations with the recorded noise.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tinyfusion_core::{BlockStack, LatentQuery, Plan, Result, StateDict, run};
use tinyfusion_diffusion::samplers::{
    LastStep, OdeConfig, OdeMethod, SdeConfig, SdeMethod, TimeStep, Tolerance, dormand_prince, ode,
    sde,
};
use tinyfusion_diffusion::{
    DiffusionForm, Guidance, GuidedChannels, Interpolant, InterpolantConfig, Path, Prediction,
};
use tinyfusion_models::{SiT, SiTConfig};
use tinyfusion_nn::Scope;
use tinyfusion_nn::layers::TimestepEmbedder;
use tinyfusion_testing::{Golden, flat, max_diff};

/// The golden README's tolerance for what the adaptive solver leaves.
const ADAPTIVE: f64 = 5e-3;

struct Fixture {
    golden: Golden,
    config: SiTConfig,
    weights: StateDict,
    net: SiT,
}

impl Fixture {
    fn open() -> Self {
        let golden = Golden::open("sit.safetensors");
        let config: SiTConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
        let weights: StateDict = golden.strip("w.").into_iter().collect();
        weights
            .check(&config.params())
            .expect("the official keys are ours");
        let net = SiT::new(&config, &weights).unwrap();
        Self {
            golden,
            config,
            weights,
            net,
        }
    }

    fn ids(&self, key: &str) -> Tensor {
        Tensor::new(self.golden.ids(key), &Device::Cpu).unwrap()
    }

    fn depth(&self) -> usize {
        self.net.layout().depth()
    }

    /// The entries of `ode_info` or `sde_info`.
    fn entries(&self, list: &str) -> Vec<Value> {
        let entries = self.golden.config[list].as_array().unwrap().clone();
        assert!(!entries.is_empty());
        entries
    }

    /// Where an entry's run starts: the doubled batch if it is guided.
    fn start(&self, entry: &Value) -> Tensor {
        self.golden.tensor(if guided(entry) {
            "sample.z_cfg"
        } else {
            "sample.z"
        })
    }

    /// The network as an entry asks it, counting its calls.
    fn predict(&self, entry: &Value, x: &Tensor, t: &Tensor, calls: &mut usize) -> Result<Tensor> {
        *calls += 1;
        let ask = |y: Tensor| {
            move |x: &Tensor, t: &Tensor| {
                let query = LatentQuery {
                    x: x.clone(),
                    t: t.clone(),
                    y,
                };
                Ok(run(&self.net, &query, &Plan::full(self.depth()))?.output)
            }
        };
        if !guided(entry) {
            return ask(self.ids("sample.y"))(x, t);
        }
        let guidance = Guidance {
            scale: self.golden.number("cfg_scale"),
            channels: GuidedChannels::FirstThree,
        };
        guidance.guide_doubled(x, t, ask(self.ids("sample.y_cfg")))
    }
}

fn guided(entry: &Value) -> bool {
    entry["cfg"].as_bool().unwrap()
}

fn text<'a>(entry: &'a Value, key: &str) -> &'a str {
    entry[key].as_str().unwrap()
}

fn number(entry: &Value, key: &str) -> f64 {
    entry[key].as_f64().unwrap()
}

fn size(entry: &Value, key: &str) -> usize {
    entry[key].as_u64().unwrap() as usize
}

fn interpolant(entry: &Value) -> Interpolant {
    Interpolant::new(InterpolantConfig {
        path: match text(entry, "path") {
            "Linear" => Path::Linear,
            "GVP" => Path::Gvp,
            "VP" => Path::Vp,
            other => panic!("unknown path {other}"),
        },
        prediction: match text(entry, "prediction") {
            "velocity" => Prediction::Velocity,
            "noise" => Prediction::Noise,
            "score" => Prediction::Score,
            other => panic!("unknown prediction {other}"),
        },
        ..InterpolantConfig::default()
    })
    .unwrap()
}

/// The times that a run visited are the recorded grid.
fn same_grid(golden: &Golden, key: &str, visited: &[f64]) {
    golden.close_within(key, &Tensor::new(visited, &Device::Cpu).unwrap(), 1e-6);
}

#[test]
fn golden_forward() {
    let f = Fixture::open();
    let t = f.golden.tensor("in.t");
    let embedder = TimestepEmbedder::load(
        &Scope::new(&f.weights, 0.0).at("t_embedder"),
        f.config.0.hidden_size,
    )
    .unwrap();
    f.golden
        .close("out.t_emb", &embedder.forward(&t, DType::F32).unwrap());
    let query = LatentQuery {
        x: f.golden.tensor("in.x"),
        t,
        y: f.ids("in.y"),
    };
    let plan = Plan::full(f.depth()).with_taps((0..f.depth()).collect::<Vec<_>>());
    let trace = run(&f.net, &query, &plan).unwrap();
    for (i, tap) in trace.taps.iter().enumerate() {
        f.golden.close(&format!("block.{i}"), tap);
    }
    assert_eq!(trace.output.dim(1).unwrap(), f.config.out_channels());
    f.golden.close("out.final", &trace.output);
}

#[test]
fn golden_ode() {
    let f = Fixture::open();
    for (i, entry) in f.entries("ode_info").iter().enumerate() {
        let key = |name: &str| format!("ode.{i}.{name}");
        let process = interpolant(entry);
        let reverse = entry["reverse"].as_bool().unwrap_or(false);
        let (t0, t1) = process.config().ode_interval();
        let ends = if reverse { (t1, t0) } else { (t0, t1) };
        assert_eq!(ends, (number(entry, "t0"), number(entry, "t1")));
        let config = OdeConfig {
            method: match text(entry, "method") {
                "euler" => OdeMethod::Euler,
                "heun2" => OdeMethod::Heun,
                "dopri5" => OdeMethod::Dopri5,
                other => panic!("unknown method {other}"),
            },
            num_steps: size(entry, "num_steps"),
            reverse,
            ..OdeConfig::default()
        };
        if config.method == OdeMethod::Dopri5 {
            adaptive(&f, i, entry, &process, config);
            continue;
        }
        let start = f.start(entry);
        let (mut calls, mut times, mut samples) = (0, vec![ends.0], vec![start.clone()]);
        let last = ode(
            &process,
            config,
            &start,
            |x, t| f.predict(entry, x, t, &mut calls),
            |step: &TimeStep<'_>| {
                assert_eq!(
                    (step.done, step.total),
                    (times.len(), Some(config.num_steps - 1))
                );
                times.push(step.to);
                samples.push(step.sample.clone());
                Ok(())
            },
        )
        .unwrap();
        same_grid(&f.golden, &key("t_grid"), &times);
        f.golden
            .close(&key("traj"), &Tensor::stack(&samples, 0).unwrap());
        f.golden.close(&key("final"), &last);
        assert_eq!(calls, size(entry, "nfe"), "ode.{i}");
    }
}

/// Steps depend on rounding, so their count may be off by one, as the golden README says.
fn adaptive(f: &Fixture, i: usize, entry: &Value, process: &Interpolant, config: OdeConfig) {
    let key = |name: &str| format!("ode.{i}.{name}");
    let config = OdeConfig {
        atol: number(entry, "atol"),
        rtol: number(entry, "rtol"),
        ..config
    };
    let start = f.start(entry);
    let (mut calls, mut steps) = (0, Vec::new());
    let last = ode(
        process,
        config,
        &start,
        |x, t| f.predict(entry, x, t, &mut calls),
        |step: &TimeStep<'_>| {
            steps.push((step.from, step.to, step.accepted));
            Ok(())
        },
    )
    .unwrap();
    f.golden.close_within(&key("final"), &last, ADAPTIVE);
    f.golden
        .close_within(&key("final_accurate"), &last, ADAPTIVE);
    let accepted = steps.iter().filter(|s| s.2).count();
    assert!(accepted.abs_diff(size(entry, "accepted")) <= 1, "{steps:?}");
    let rejected = steps.len() - accepted;
    assert!(rejected.abs_diff(size(entry, "rejected")) <= 1, "{steps:?}");
    assert_eq!(
        calls,
        2 + 6 * steps.len(),
        "two for the first step's length"
    );
    let (recorded, got) = (f.golden.table(&key("step_t0_dt_accepted")), steps.len());
    if recorded.len() == 3 * got {
        // The first step's length is decided before any rounding has grown.
        let first = steps[0].1 - steps[0].0;
        assert!((first - recorded[1]).abs() < 1e-3 * recorded[1], "{first}");
    }
    // The recorded trajectory is what the solver interpolates at the grid's times.
    let grid = flat(&f.golden.tensor(&key("t_grid")));
    let tolerance = Tolerance {
        atol: config.atol,
        rtol: config.rtol,
    };
    let field = |t: f64, x: &Tensor| {
        let b = x.dim(0)?;
        let told = Tensor::full(t as f32, b, x.device())?; // (B,)
        let prediction = f.predict(entry, x, &told, &mut calls)?;
        process.velocity(&prediction, x, &vec![t; b])
    };
    let states = dormand_prince(field, &start, &grid, tolerance, |_| Ok(())).unwrap();
    let states = Tensor::stack(&states, 0).unwrap();
    f.golden.close_within(&key("traj"), &states, ADAPTIVE);
    let end = states.get(grid.len() - 1).unwrap();
    assert!(
        max_diff(&end, &last) < 1e-6,
        "asking between changes no step"
    );
}

#[test]
fn golden_sde() {
    let f = Fixture::open();
    for (i, entry) in f.entries("sde_info").iter().enumerate() {
        let key = |name: &str| format!("sde.{i}.{name}");
        let process = interpolant(entry);
        let config = SdeConfig {
            method: match text(entry, "method") {
                "Euler" => SdeMethod::Euler,
                "Heun" => SdeMethod::Heun,
                other => panic!("unknown method {other}"),
            },
            form: match text(entry, "form") {
                "SBDM" => DiffusionForm::Sbdm,
                "sigma" => DiffusionForm::Sigma,
                "linear" => DiffusionForm::Linear,
                "decreasing" => DiffusionForm::Decreasing,
                other => panic!("unknown form {other}"),
            },
            norm: number(entry, "norm"),
            last_step: match entry["last_step"].as_str() {
                None => LastStep::None,
                Some("Mean") => LastStep::Mean,
                Some("Tweedie") => LastStep::Tweedie,
                Some("Euler") => LastStep::Euler,
                Some(other) => panic!("unknown last step {other}"),
            },
            last_step_size: number(entry, "last_step_size"),
            num_steps: size(entry, "num_steps"),
        };
        let noise = f.golden.tensor(&key("noise"));
        let (mut calls, mut times, mut samples) = (0, vec![number(entry, "t0")], Vec::new());
        let last = sde(
            &process,
            config,
            &f.start(entry),
            |x, t| f.predict(entry, x, t, &mut calls),
            |k| Ok(noise.get(k)?),
            |step: &TimeStep<'_>| {
                times.push(step.to);
                samples.push(step.sample.clone());
                Ok(())
            },
        )
        .unwrap();
        if config.last_step == LastStep::None {
            samples.push(last.clone()); // the reference counts it all the same
        } else {
            times.pop();
        }
        same_grid(&f.golden, &key("t_grid"), &times);
        assert!((times[times.len() - 1] - number(entry, "t1")).abs() < 1e-12);
        f.golden
            .close(&key("traj"), &Tensor::stack(&samples, 0).unwrap());
        f.golden.close(&key("final"), &last);
        // The reference asks the network once for the drift and once more for the score.
        let doubled = match config.last_step {
            LastStep::None => 2 * calls,
            LastStep::Mean => 2 * calls,
            LastStep::Tweedie | LastStep::Euler => 2 * calls - 1,
        };
        assert_eq!(doubled, size(entry, "nfe"), "sde.{i}");
    }
}
