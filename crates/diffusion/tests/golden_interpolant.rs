//! Interpolants against the recorded SiT (`sit.safetensors`): path formulas, training losses, and the adaptive solver
//! against torchdiffeq.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::LatentBatch;
use tinyfusion_diffusion::samplers::{Tolerance, dormand_prince};
use tinyfusion_diffusion::{
    DiffusionForm, Interpolant, InterpolantConfig, InterpolantObjective, LabelDrop, Path,
    Prediction, Weighting,
};
use tinyfusion_testing::{Golden, flat};

const PATHS: [(&str, Path); 3] = [
    ("Linear", Path::Linear),
    ("GVP", Path::Gvp),
    ("VP", Path::Vp),
];

/// The norm of the recorded diffusion forms, which the golden README states.
const NORM: f64 = 0.8;

fn open() -> Golden {
    Golden::open("sit.safetensors")
}

/// How many entries the config's list has.
fn entries(g: &Golden, list: &str) -> std::ops::Range<usize> {
    let count = g.config[list].as_array().unwrap().len();
    assert!(count > 0);
    0..count
}

fn interpolant(path: Path, prediction: Prediction) -> Interpolant {
    Interpolant::new(InterpolantConfig {
        path,
        prediction,
        ..InterpolantConfig::default()
    })
    .unwrap()
}

#[test]
fn golden_path_tables() {
    let g = open();
    let t = flat(&g.tensor("path.in.t"));
    for (name, path) in PATHS {
        let close = |what: &str, value: &dyn Fn(f64) -> f64| {
            let got: Vec<f64> = t.iter().map(|t| value(*t)).collect();
            g.close(
                &format!("path.{name}.{what}"),
                &Tensor::new(got, &Device::Cpu).unwrap(),
            );
        };
        close("alpha", &|t| path.alpha(t));
        close("sigma", &|t| path.sigma(t));
        close("d_alpha", &|t| path.d_alpha(t));
        close("d_sigma", &|t| path.d_sigma(t));
        close("drift_var", &|t| path.score_weight(t));
        for (form, key) in [
            (DiffusionForm::Sbdm, "SBDM"),
            (DiffusionForm::Sigma, "sigma"),
            (DiffusionForm::Linear, "linear"),
            (DiffusionForm::Decreasing, "decreasing"),
            (DiffusionForm::IncreasingDecreasing, "increasing_decreasing"),
        ] {
            close(&format!("diffusion.{key}"), &|t| form.at(path, NORM, t));
        }
    }
}

#[test]
fn golden_path_conversions() {
    let g = open();
    let t = flat(&g.tensor("path.in.t"));
    let input = |name: &str| g.tensor(&format!("path.in.{name}"));
    // Where the file says `v` it is whatever the network put out.
    let (x, v, x0, x1) = (input("x"), input("v"), input("x0"), input("x1"));
    for (name, path) in PATHS {
        let close = |what: &str, got: &Tensor| g.close(&format!("path.{name}.{what}"), got);
        let (by_velocity, by_score) = (
            interpolant(path, Prediction::Velocity),
            interpolant(path, Prediction::Score),
        );
        close("xt", &by_velocity.x_t(&x1, &x0, &t).unwrap());
        close("ut", &by_velocity.velocity_target(&x1, &x0, &t).unwrap());
        close(
            "score_from_velocity",
            &by_velocity.score(&v, &x, &t).unwrap(),
        );
        close(
            "noise_from_velocity",
            &by_velocity.noise(&v, &x, &t).unwrap(),
        );
        close(
            "velocity_from_score",
            &by_score.velocity(&v, &x, &t).unwrap(),
        );
        // Without a score nothing but the drift is left, which the reference has with the other sign.
        let drift = by_score.velocity(&v.zeros_like().unwrap(), &x, &t).unwrap();
        close("drift_mean", &drift.neg().unwrap());
    }
}

/// The settings of an entry of `train_info`, which are the defaults of its path and prediction.
fn trained(g: &Golden, i: usize) -> InterpolantConfig {
    let text = |key: &str| g.text(&format!("train_info.{i}.{key}"));
    let path = PATHS.iter().find(|(name, _)| *name == text("path"));
    InterpolantConfig {
        path: path.unwrap().1,
        prediction: match text("prediction") {
            "velocity" => Prediction::Velocity,
            "noise" => Prediction::Noise,
            "score" => Prediction::Score,
            other => panic!("unknown prediction {other}"),
        },
        weighting: match g.config["train_info"][i]["loss_weight"].as_str() {
            None => Weighting::None,
            Some("velocity") => Weighting::Velocity,
            Some("likelihood") => Weighting::Likelihood,
            Some(other) => panic!("unknown weighting {other}"),
        },
        ..InterpolantConfig::default()
    }
}

#[test]
fn golden_training() {
    let g = open();
    for i in entries(&g, "train_info") {
        let config = trained(&g, i);
        let number = |key: &str| g.number(&format!("train_info.{i}.{key}"));
        let (t0, t1) = config.train_interval();
        for (got, key) in [(t0, "t0"), (t1, "t1")] {
            assert!((got - number(key)).abs() < 1e-12, "{i}: {key} {got}");
        }
        // What the defaults stand for, given by name, is the same.
        let given = InterpolantConfig {
            train_eps: Some(number("train_eps")),
            sample_eps: Some(number("sample_eps")),
            ..config
        };
        assert_eq!(given.train_interval(), config.train_interval());
        assert_eq!(given.ode_interval(), config.ode_interval());
        let key = |name: &str| format!("train.{i}.{name}");
        let t: Vec<f32> = flat(&g.tensor(&key("u")))
            .into_iter()
            .map(|u| (u * (t1 - t0) + t0) as f32)
            .collect();
        g.close(&key("t"), &Tensor::new(t.as_slice(), &Device::Cpu).unwrap());
        let labels = LabelDrop {
            num_classes: g.size("model.num_classes") as u32,
            probability: 0.0,
        };
        let interpolant = Interpolant::new(config).unwrap();
        let objective = InterpolantObjective::new(interpolant, labels).unwrap();
        let y: Vec<u32> = g.config["y"]
            .as_array()
            .unwrap()
            .iter()
            .map(|y| y.as_u64().unwrap() as u32)
            .collect();
        let batch = LatentBatch {
            x: g.tensor("train.x1"),
            y: Tensor::new(y, &Device::Cpu).unwrap(),
        };
        // The recorded times themselves, so that their rounding does not enter twice.
        let told: Vec<f32> = g.tensor(&key("t")).to_vec1().unwrap();
        let draw = objective
            .draw_at(&batch, told, g.tensor(&key("x0")))
            .unwrap();
        g.close(&key("xt"), &draw.x_t);
        let times = flat(&g.tensor(&key("t")));
        let target = interpolant
            .velocity_target(&draw.x_start, &draw.noise, &times)
            .unwrap();
        g.close(&key("ut"), &target);
        let loss = objective.losses(&g.tensor(&key("pred")), &draw).unwrap();
        assert_eq!(loss.dtype(), DType::F32);
        g.close(&key("loss"), &loss);
    }
}

#[test]
fn golden_van_der_pol() {
    let g = open();
    for i in entries(&g, "vdp_info") {
        let number = |key: &str| g.number(&format!("vdp_info.{i}.{key}"));
        let key = |name: &str| format!("vdp.{i}.{name}");
        let mu = number("mu");
        // y0' = y1, y1' = μ(1 − y0²)y1 − y0
        let field = |_t: f64, y: &Tensor| {
            let (y0, y1) = (y.narrow(1, 0, 1)?, y.narrow(1, 1, 1)?); // (B, 1)
            let slope = (((y0.sqr()?.affine(-mu, mu)?) * &y1)? - &y0)?;
            Ok(Tensor::cat(&[&y1, &slope], 1)?) // (B, 2)
        };
        let tolerance = Tolerance {
            atol: number("atol"),
            rtol: number("rtol"),
        };
        let mut steps = Vec::new();
        let solution = dormand_prince(
            field,
            &g.tensor(&key("y0")),
            &flat(&g.tensor(&key("t"))),
            tolerance,
            |step| {
                steps.push([
                    step.from,
                    step.to - step.from,
                    f64::from(u8::from(step.accepted)),
                ]);
                Ok(())
            },
        )
        .unwrap();
        // Sensitive to rounding: the README's tolerances are 5e-3 and one step.
        g.close_within(&key("sol"), &Tensor::stack(&solution, 0).unwrap(), 5e-3);
        let accepted = steps.iter().filter(|s| s[2] == 1.0).count() as f64;
        assert!((accepted - number("accepted")).abs() <= 1.0, "{accepted}");
        let rejected = steps.len() as f64 - accepted;
        assert!((rejected - number("rejected")).abs() <= 1.0, "{rejected}");
        let recorded = g.table(&key("step_t0_dt_accepted"));
        if recorded.len() == 3 * steps.len() {
            let span = number("T");
            for (step, recorded) in steps.iter().zip(recorded.chunks(3)) {
                assert!((step[0] - recorded[0]).abs() < 0.01 * span, "{step:?}");
            }
        }
    }
}
