//! The loop against a plain f64 implementation, and steps that are not finite.
#![allow(clippy::unwrap_used)] // helpers of tests: a panic is a failure

mod common;

use std::fs;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor, Var};
use common::{CPU, Problem, config, files, interrupted_at};
use serde_json::Value;
use tempfile::tempdir;
use tinyfusion_core::{Result, StepRng};
use tinyfusion_train::{
    FitConfig, LrSchedule, ParamGroup, Progress, RunDir, StepLoss, Stop, TrainStep, fit,
};

const ROWS: usize = 12;
const INPUTS: usize = 5;
const LOST: u64 = 8;

/// Linear regression, whose gradients are written down in a line. Some steps have targets so far off that
/// the clip acts, and one has no finite loss.
struct Linear {
    w: Var,
    b: Var,
}

fn data(step: u64) -> (Vec<f32>, Vec<f32>) {
    let mut rng = StepRng::new(11, step, 2);
    let x = rng
        .normal(ROWS * INPUTS, &CPU)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    let size = match step {
        LOST => f64::NAN,
        _ if step.is_multiple_of(3) => 5.0,
        _ => 0.3,
    };
    let y = (rng.normal(ROWS, &CPU).unwrap() * size)
        .unwrap()
        .to_vec1::<f32>()
        .unwrap();
    (x, y)
}

impl TrainStep for Linear {
    type Batch = (Tensor, Tensor);

    fn draw(&self, step: u64) -> Result<Self::Batch> {
        let (x, y) = data(step);
        Ok((
            Tensor::from_vec(x, (ROWS, INPUTS), &CPU)?,
            Tensor::from_vec(y, (ROWS, 1), &CPU)?,
        ))
    }

    fn loss(&self, (x, y): &Self::Batch, rows: Range<usize>) -> Result<StepLoss> {
        let x = x.narrow(0, rows.start, rows.len())?; // (R, I)
        let y = y.narrow(0, rows.start, rows.len())?; // (R, 1)
        let error = (x.matmul(&self.w)?.broadcast_add(&self.b)? - y)?; // (R, 1)
        Ok(StepLoss {
            loss: error.sqr()?.mean_all()?,
            scalars: vec![],
        })
    }
}

/// AdamW (arXiv 1711.05101, algorithm 2, in PyTorch's parametrisation), written for one number.
#[derive(Clone, Copy)]
struct Scalar {
    p: f64,
    m: f64,
    v: f64,
    average: f64,
}

impl Scalar {
    fn step(&mut self, g: f64, lr: f64, decay: f64, t: i32, config: &FitConfig) {
        let (b1, b2) = config.betas;
        self.m = b1 * self.m + (1.0 - b1) * g;
        self.v = b2 * self.v + (1.0 - b2) * g * g;
        let (m, v) = (self.m / (1.0 - b1.powi(t)), self.v / (1.0 - b2.powi(t)));
        self.p = self.p - lr * decay * self.p - lr * m / (v.sqrt() + config.eps);
        // EDM's ramp-up: a half-life of `share` times the updates so far, if that is shorter.
        let ramp = (config.ema_rampup).map(|share| 0.5f64.powf(1.0 / (share * f64::from(t - 1))));
        let keep = ramp.map_or(config.ema, |ramp| ramp.min(config.ema));
        self.average = keep * self.average + (1.0 - keep) * self.p;
    }
}

#[test]
fn twenty_steps_agree_with_a_plain_f64_implementation() {
    twenty_steps_agree(None);
}

#[test]
fn twenty_steps_with_a_ramp_up_of_the_averages_agree_too() {
    // The decay 0.8 has a half-life of ln ½ / ln 0.8 = 3.1 updates; 0.3 of the updates so far is less for ten of them.
    twenty_steps_agree(Some(0.3));
}

fn twenty_steps_agree(ema_rampup: Option<f64>) {
    let config = FitConfig {
        steps: 20,
        batch_size: ROWS,
        micro_batches: 3,
        lanes: 2,
        clip: Some(1.5),
        ema: 0.8,
        ema_rampup,
        betas: (0.85, 0.97),
        eps: 1e-6,
        checkpoint_every: 7,
        log_every: 1,
    };
    let start: Vec<f32> = (0..INPUTS).map(|i| 0.5 - 0.3 * i as f32).collect();
    let linear = Linear {
        w: Var::from_vec(start.clone(), (INPUTS, 1), &CPU).unwrap(),
        b: Var::from_vec(vec![0.25f32], 1, &CPU).unwrap(),
    };
    let cosine = LrSchedule {
        peak: 0.1,
        last: 0.02,
        warmup: 5,
    };
    let groups = [
        ParamGroup::new("slow", cosine, vec![("w".into(), linear.w.clone())])
            .unwrap()
            .with_weight_decay(0.3),
        ParamGroup::new(
            "fast",
            LrSchedule::constant(0.5),
            vec![("b".into(), linear.b.clone())],
        )
        .unwrap(),
    ];
    let folder = tempdir().unwrap();
    let dir = RunDir::open(folder.path(), &config).unwrap();
    let outcome = fit(
        &config,
        &linear,
        &groups,
        &dir,
        &Stop::default(),
        &Progress::hidden(),
    )
    .unwrap();
    let log = fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let log: Vec<Value> = log
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!((log.len(), outcome.skipped), (20, 1));

    let number = |p: f32| Scalar {
        p: p.into(),
        m: 0.0,
        v: 0.0,
        average: p.into(),
    };
    let mut w: Vec<Scalar> = start.iter().map(|p| number(*p)).collect();
    let mut b = number(0.25);
    let mut clipped = 0;
    // AdamW counts updates: the lost step is a step of the schedule, and none of its bias correction.
    let mut t = 0;
    for step in 0..20u64 {
        if step == LOST {
            continue;
        }
        t += 1;
        let (x, y) = data(step);
        let (mut loss, mut dw, mut db) = (0.0, [0.0; INPUTS], 0.0);
        for r in 0..ROWS {
            let x: Vec<f64> = x[r * INPUTS..][..INPUTS]
                .iter()
                .map(|v| f64::from(*v))
                .collect();
            let error = x.iter().zip(&w).map(|(x, w)| x * w.p).sum::<f64>() + b.p - f64::from(y[r]);
            loss += error * error / ROWS as f64;
            (0..INPUTS).for_each(|i| dw[i] += 2.0 * error * x[i] / ROWS as f64);
            db += 2.0 * error / ROWS as f64;
        }
        let norm = (dw.iter().map(|g| g * g).sum::<f64>() + db * db).sqrt();
        let scale = if norm > 1.5 { 1.5 / (norm + 1e-6) } else { 1.0 };
        clipped += u32::from(scale < 1.0);
        let slow = if step < 5 {
            0.1 * (step + 1) as f64 / 5.0
        } else {
            0.02 + 0.08 * 0.5 * (1.0 + ((step - 5) as f64 / 14.0 * std::f64::consts::PI).cos())
        };
        w.iter_mut()
            .zip(dw)
            .for_each(|(w, g)| w.step(scale * g, slow, 0.3, t, &config));
        b.step(scale * db, 0.5, 0.0, t, &config);

        let line = &log[step as usize];
        for (key, want) in [
            ("loss", loss),
            ("grad_norm", norm),
            ("lr_slow", slow),
            ("lr_fast", 0.5),
        ] {
            let got = line[key].as_f64().unwrap();
            assert!(
                (got - want).abs() < 2e-5 * want,
                "step {step}: {key} is {got}, in f64 {want}"
            );
        }
    }
    assert!(
        (4..17).contains(&clipped),
        "{clipped} of 20 steps were clipped: both cases are wanted"
    );

    let close = |name: &str, got: Vec<f32>, want: Vec<f64>| {
        for (g, w) in got.iter().zip(&want) {
            assert!(
                (f64::from(*g) - w).abs() < 1e-5,
                "{name}: {got:?}, in f64 {want:?}"
            );
        }
    };
    let read = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    close("w", read(&linear.w), w.iter().map(|w| w.p).collect());
    close("b", read(&linear.b), vec![b.p]);
    close(
        "average of w",
        read(outcome.averages.require("w").unwrap()),
        w.iter().map(|w| w.average).collect(),
    );
    close(
        "average of b",
        read(outcome.averages.require("b").unwrap()),
        vec![b.average],
    );
    let moments = folder
        .path()
        .join("checkpoints/step-000020/optimizer.safetensors");
    let moments = candle_core::safetensors::load(moments, &CPU).unwrap();
    close(
        "m of w",
        read(&moments["m.w"]),
        w.iter().map(|w| w.m).collect(),
    );
    close("v of b", read(&moments["v.b"]), vec![b.v]);
}

fn tensors(folder: &Path, step: u64) -> Vec<Vec<u8>> {
    let names = ["model", "ema", "optimizer"];
    let all = files(folder);
    names
        .map(|n| all[&format!("checkpoints/step-{step:06}/{n}.safetensors")].clone())
        .into()
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_but_the_count() {
    let (two, three) = (tempdir().unwrap(), tempdir().unwrap());
    let settings = || FitConfig {
        log_every: 1,
        ..config(4)
    };
    assert_eq!(
        interrupted_at(Problem::new(settings(), 0).stopping_at(1).fit(two.path())),
        2
    );
    let mut problem = Problem::new(settings(), 0).stopping_at(2);
    problem.nan = |step| step == 2;
    assert_eq!(interrupted_at(problem.fit(three.path())), 3);
    assert!(
        tensors(two.path(), 2) == tensors(three.path(), 3),
        "weights, averages or moments moved"
    );

    let log = fs::read_to_string(three.path().join("metrics.jsonl")).unwrap();
    let log: Vec<Value> = log
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(
        log.iter()
            .map(|l| l["skipped"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [0, 0, 1]
    );
    assert!(
        log[2]["loss"].is_null() && log[2]["grad_norm"].is_null() && log[1]["loss"].is_number()
    );
    let state =
        fs::read_to_string(three.path().join("checkpoints/step-000003/state.json")).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    assert_eq!(
        (state["updates"].as_u64(), state["skipped"].as_u64()),
        (Some(2), Some(1))
    );
}

/// The loss is finite, its gradient is not: d√u/du at 0.
struct Cusp(Var);

impl TrainStep for Cusp {
    type Batch = ();

    fn draw(&self, _step: u64) -> Result<()> {
        Ok(())
    }

    fn loss(&self, _batch: &(), _rows: Range<usize>) -> Result<StepLoss> {
        let zero = (self.0.as_tensor() - self.0.as_detached_tensor())?;
        Ok(StepLoss {
            loss: zero.sqrt()?.sum_all()?,
            scalars: vec![],
        })
    }
}

#[test]
fn a_gradient_that_is_not_finite_is_skipped_too() {
    let cusp = Cusp(Var::ones(3, DType::F32, &CPU).unwrap());
    let group = ParamGroup::new(
        "all",
        LrSchedule::constant(0.1),
        vec![("p".into(), cusp.0.clone())],
    );
    let settings = FitConfig {
        steps: 3,
        batch_size: 2,
        ..FitConfig::default()
    };
    let folder = tempdir().unwrap();
    let dir = RunDir::open(folder.path(), &settings).unwrap();
    let error = fit(
        &settings,
        &cusp,
        &[group.unwrap()],
        &dir,
        &Stop::default(),
        &Progress::hidden(),
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("3 of 3 steps were skipped"), "{error}");
    assert_eq!(cusp.0.to_vec1::<f32>().unwrap(), [1.0; 3]);
}

#[test]
fn fifty_lost_steps_in_a_row_end_the_run() {
    let problem = |nan| {
        let mut problem = Problem::new(
            FitConfig {
                checkpoint_every: 1000,
                ..config(120)
            },
            0,
        );
        problem.nan = nan;
        problem
    };
    // Steps 5 to 54 are fifty, 5 to 53 and 55 to 103 are forty-nine twice.
    let fifty: fn(u64) -> bool = |step| (5..55).contains(&step);
    let broken: fn(u64) -> bool = |step| step != 54 && (5..104).contains(&step);

    let folder = tempdir().unwrap();
    let error = problem(fifty).fit(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("50 steps in a row") && error.contains("at step 54"),
        "{error}"
    );
    assert!(
        error.contains("learning rate") && error.contains("NaN"),
        "{error}"
    );

    // It is not hopeless on the way, but it has failed in the end, also when it is asked again.
    let folder = tempdir().unwrap();
    for _ in 0..2 {
        let error = problem(broken).fit(folder.path()).unwrap_err().to_string();
        assert!(error.contains("98 of 120 steps were skipped"), "{error}");
    }

    // An interruption does not start the count again.
    let folder = tempdir().unwrap();
    assert_eq!(
        interrupted_at(problem(fifty).stopping_at(30).fit(folder.path())),
        31
    );
    let error = problem(fifty).fit(folder.path()).unwrap_err().to_string();
    assert!(error.contains("at step 54"), "{error}");
}
