//! A small random problem, and what a run leaves on disk.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses its part

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use candle_core::{Device, Tensor, Var};
use serde_json::{Value, json};
use tinyfusion_core::{Error, Result, StateDict, StepRng};
use tinyfusion_train::{
    FitConfig, LrSchedule, Outcome, ParamGroup, Progress, RunDir, StepLoss, Stop, TrainStep, fit,
};

pub const CPU: Device = Device::Cpu;

/// A two-layer network on random data. Its options say what happens at which step (from 0).
pub struct Problem {
    pub config: FitConfig,
    hidden: Var,
    out: Var,
    ballast: Var,
    /// Requested when this step is done.
    pub stop_at: Option<u64>,
    /// Requested while this step is drawn.
    pub stop_within: Option<u64>,
    pub stop: Stop,
    /// Steps whose loss is NaN.
    pub nan: fn(u64) -> bool,
    /// How long a step takes at least.
    pub slow: Duration,
}

pub fn config(steps: u64) -> FitConfig {
    FitConfig {
        steps,
        batch_size: 8,
        checkpoint_every: 4,
        log_every: 3,
        ema: 0.9,
        ..FitConfig::default()
    }
}

impl Problem {
    /// `ballast` more parameters make the checkpoints larger.
    pub fn new(config: FitConfig, ballast: usize) -> Self {
        let mut rng = StepRng::new(1, 0, 0);
        let mut var =
            |shape: &[usize]| Var::from_tensor(&rng.normal(shape, &CPU).unwrap()).unwrap();
        Self {
            config,
            hidden: var(&[6, 16]),
            out: var(&[16, 2]),
            ballast: var(&[ballast.max(1)]),
            stop_at: None,
            stop_within: None,
            stop: Stop::default(),
            nan: |_| false,
            slow: Duration::ZERO,
        }
    }

    pub fn stopping_at(mut self, step: u64) -> Self {
        self.stop_at = Some(step);
        self
    }

    pub fn groups(&self) -> Vec<ParamGroup> {
        let cosine = LrSchedule {
            peak: 0.05,
            last: 0.01,
            warmup: 2,
        };
        let vars = |named: &[(&str, &Var)]| {
            named
                .iter()
                .map(|(n, v)| ((*n).to_string(), (*v).clone()))
                .collect::<Vec<_>>()
        };
        let net = vars(&[("hidden", &self.hidden), ("ballast", &self.ballast)]);
        vec![
            ParamGroup::new("net", cosine, net)
                .unwrap()
                .with_weight_decay(0.1),
            ParamGroup::new(
                "out",
                LrSchedule::constant(0.02),
                vars(&[("out", &self.out)]),
            )
            .unwrap(),
        ]
    }

    /// Trains in `folder`, from wherever it stands.
    pub fn fit(&self, folder: &Path) -> Result<Outcome> {
        let dir = RunDir::open(folder, &self.config)?;
        fit(
            &self.config,
            self,
            &self.groups(),
            &dir,
            &self.stop,
            &Progress::hidden(),
        )
    }
}

impl TrainStep for Problem {
    type Batch = (Tensor, f64);

    fn draw(&self, step: u64) -> Result<Self::Batch> {
        std::thread::sleep(self.slow);
        if self.stop_within == Some(step) {
            self.stop.request();
        }
        let x = StepRng::new(5, step, 2).normal((self.config.batch_size, 6), &CPU)?;
        Ok((x, if (self.nan)(step) { f64::NAN } else { 1.0 }))
    }

    fn loss(&self, (x, factor): &Self::Batch, rows: Range<usize>) -> Result<StepLoss> {
        let x = x.narrow(0, rows.start, rows.len())?; // (R, 6)
        let y = x.matmul(&self.hidden)?.tanh()?.matmul(&self.out)?; // (R, 2)
        let target = x.narrow(1, 0, 2)?.sin()?; // (R, 2)
        let mse = (y - target)?.sqr()?.mean_all()?;
        let small = self.ballast.sqr()?.mean_all()?;
        let scalar = mse.detach();
        let loss = ((mse + (small * 1e-3)?)? * *factor)?;
        Ok(StepLoss {
            loss,
            scalars: vec![("mse", scalar)],
        })
    }

    fn record(&self, done: u64, averages: &dyn Fn() -> StateDict) -> Result<Option<String>> {
        if self.stop_at == Some(done - 1) {
            self.stop.request();
        }
        let out = averages().require("out")?.to_vec2::<f32>()?[0][0];
        Ok(Some(json!({"step": done, "out": out}).to_string()))
    }
}

/// Every file of a run by its path, the seconds taken out of it: all else must be the same bytes.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, into: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, into);
                continue;
            }
            let name = path
                .strip_prefix(root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_string();
            let mut bytes = fs::read(&path).unwrap();
            if name.ends_with("metrics.jsonl") || name.ends_with("state.json") {
                let text = String::from_utf8(bytes).unwrap();
                let values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
                let without: Vec<String> = values
                    .map(|value| {
                        let mut value = value.unwrap();
                        assert!(value.as_object_mut().unwrap().remove("seconds").is_some());
                        value.to_string()
                    })
                    .collect();
                bytes = without.join("\n").into_bytes();
            }
            into.insert(name, bytes);
        }
    }
    let mut all = BTreeMap::new();
    walk(folder, folder, &mut all);
    all
}

/// Asserts that two runs left the same, naming what differs instead of printing it.
pub fn assert_same(a: &Path, b: &Path, what: &str) {
    let (a, b) = (files(a), files(b));
    assert_eq!(
        a.keys().collect::<Vec<_>>(),
        b.keys().collect::<Vec<_>>(),
        "{what}"
    );
    for (name, bytes) in &a {
        assert!(bytes == &b[name], "{what}: {name} differs");
    }
    let tensors = a.keys().filter(|n| n.ends_with(".safetensors")).count();
    assert_eq!(
        tensors, 3,
        "{what}: model, averages and moments are compared"
    );
}

pub fn steps_of(folder: &Path, log: &str) -> Vec<u64> {
    let text = fs::read_to_string(folder.join(log)).unwrap();
    text.lines()
        .map(|l| {
            serde_json::from_str::<Value>(l).unwrap()["step"]
                .as_u64()
                .unwrap()
        })
        .collect()
}

/// Names in the folder of checkpoints.
pub fn checkpoints(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("checkpoints")).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn interrupted_at(result: Result<Outcome>) -> u64 {
    match result {
        Err(Error::Interrupted { step }) => step,
        Ok(_) => panic!("the run was not interrupted"),
        Err(other) => panic!("{other}"),
    }
}
