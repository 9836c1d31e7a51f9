//! What is refused, and in which words.
#![allow(clippy::unwrap_used)] // helpers of tests: a panic is a failure

mod common;

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor, Var};
use common::{CPU, Problem, assert_same, config, interrupted_at};
use tempfile::tempdir;
use tinyfusion_core::{Error, Result, StateDict};
use tinyfusion_train::{
    FitConfig, LrSchedule, ParamGroup, Progress, RunDir, StepLoss, Stop, TrainStep, fit,
};

/// A run of 8 steps, interrupted after 5.
fn five_of_eight(folder: &Path) {
    assert_eq!(
        interrupted_at(Problem::new(config(8), 0).stopping_at(4).fit(folder)),
        5
    );
}

fn rewrite(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &CPU).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_named_and_nothing_is_taken_from_it() {
    type Damage = fn(&Path);
    let cases: &[(&str, &str, Damage)] = &[
        ("model.safetensors", "is truncated", |p| {
            OpenOptions::new()
                .write(true)
                .open(p)
                .unwrap()
                .set_len(fs::metadata(p).unwrap().len() - 5)
                .unwrap();
        }),
        ("model.safetensors", "could not be opened", |p| {
            fs::remove_file(p).unwrap();
        }),
        (
            "ema.safetensors",
            "`out` has shape [2, 16], expected [16, 2]",
            |p| {
                rewrite(p, |t| {
                    let out = t["out"].t().unwrap().contiguous().unwrap();
                    t.insert("out".into(), out);
                });
            },
        ),
        ("ema.safetensors", "missing `hidden` [6, 16]", |p| {
            rewrite(p, |t| {
                t.remove("hidden");
            });
        }),
        ("optimizer.safetensors", "unexpected `m.other`", |p| {
            rewrite(p, |t| {
                t.insert("m.other".into(), t["m.out"].clone());
            });
        }),
        (
            "optimizer.safetensors",
            "`v.out` is F64, f32 is expected",
            |p| {
                rewrite(p, |t| {
                    t.insert("v.out".into(), t["v.out"].to_dtype(DType::F64).unwrap());
                });
            },
        ),
        ("optimizer.safetensors", "NaN", |p| {
            rewrite(p, |t| {
                t.insert("v.out".into(), (t["v.out"].clone() * f64::NAN).unwrap());
            });
        }),
        ("state.json", "could not be read", |p| {
            fs::remove_file(p).unwrap();
        }),
        ("state.json", "does not parse", |p| {
            fs::write(p, "{\"step\": 5").unwrap();
        }),
        ("state.json", "missing field `updates`", |p| {
            fs::write(p, "{\"step\": 5}").unwrap();
        }),
        (
            "state.json",
            "its folder is of step 5, it says step 4",
            |p| {
                let text = fs::read_to_string(p).unwrap();
                fs::write(p, text.replace("\"step\": 5", "\"step\": 4")).unwrap();
            },
        ),
    ];
    for (name, expected, damage) in cases {
        let folder = tempdir().unwrap();
        five_of_eight(folder.path());
        let path = folder.path().join("checkpoints/step-000005").join(name);
        damage(&path);
        let logs = fs::read(folder.path().join("history.jsonl")).unwrap();

        let problem = Problem::new(config(8), 0);
        let start: Vec<Tensor> = problem
            .groups()
            .iter()
            .flat_map(|g| g.vars().map(|v| v.copy().unwrap()).collect::<Vec<_>>())
            .collect();
        let error = problem.fit(folder.path()).unwrap_err();
        assert!(
            matches!(&error, Error::File { path: named, .. } if *named == path),
            "{error}"
        );
        let text = error.to_string();
        assert!(text.contains(expected), "{expected}: {text}");
        assert!(text.contains("cannot go on from this checkpoint"), "{text}");
        for (var, start) in problem
            .groups()
            .iter()
            .flat_map(ParamGroup::vars)
            .zip(&start)
        {
            let read = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(read(var), read(start));
        }
        assert_eq!(logs, fs::read(folder.path().join("history.jsonl")).unwrap());

        // The advice works: without that checkpoint the run begins again.
        fs::remove_dir_all(folder.path().join("checkpoints/step-000005")).unwrap();
        Problem::new(config(8), 0).fit(folder.path()).unwrap();
    }
}

#[test]
fn only_own_checkpoints_count_and_left_overs_go() {
    let (whole, folder) = (tempdir().unwrap(), tempdir().unwrap());
    Problem::new(config(8), 0).fit(whole.path()).unwrap();
    five_of_eight(folder.path());
    let checkpoints = folder.path().join("checkpoints");
    for name in [
        "step-7",
        "step-000006.partial",
        "step-+00009",
        ".tinyfusion-abc.partial",
    ] {
        fs::create_dir(checkpoints.join(name)).unwrap();
    }
    let dir = RunDir::open(folder.path(), &config(8)).unwrap();
    assert_eq!(dir.checkpoints().unwrap(), [5]);
    assert_eq!(dir.path(), folder.path());
    Problem::new(config(8), 0).fit(folder.path()).unwrap();
    assert_eq!(
        common::checkpoints(folder.path()),
        ["step-+00009", "step-000008", "step-7"]
    );
    assert_same(whole.path(), folder.path(), "left-overs");
}

/// Does nothing to its variable, and writes the record that it is told to.
struct Recorder(Var, &'static str);

impl TrainStep for Recorder {
    type Batch = ();
    fn draw(&self, _step: u64) -> Result<()> {
        Ok(())
    }
    fn loss(&self, _batch: &(), _rows: Range<usize>) -> Result<StepLoss> {
        // A scalar with the name of a fixed entry must not displace it.
        Ok(StepLoss {
            loss: self.0.sqr()?.sum_all()?,
            scalars: vec![
                ("step", Tensor::new(0.5f32, &CPU)?),
                ("mse", Tensor::new(0.25f32, &CPU)?),
            ],
        })
    }
    fn record(&self, _done: u64, _averages: &dyn Fn() -> StateDict) -> Result<Option<String>> {
        Ok(Some(self.1.to_string()))
    }
}

fn var(n: usize) -> Var {
    Var::ones(n, DType::F32, &CPU).unwrap()
}

fn group(name: &str, vars: &[(&str, &Var)]) -> ParamGroup {
    let vars = vars
        .iter()
        .map(|(n, v)| ((*n).to_string(), (*v).clone()))
        .collect();
    ParamGroup::new(name, LrSchedule::constant(0.1), vars).unwrap()
}

fn train(folder: &Path, config: &FitConfig, step: &Recorder, groups: &[ParamGroup]) -> Result<()> {
    let dir = RunDir::open(folder, config)?;
    fit(
        config,
        step,
        groups,
        &dir,
        &Stop::default(),
        &Progress::hidden(),
    )
    .map(drop)
}

#[test]
fn records_that_a_resume_could_not_find_are_refused() {
    let config = FitConfig {
        steps: 1,
        batch_size: 2,
        log_every: 1,
        ..FitConfig::default()
    };
    let folder = tempdir().unwrap();
    let step = |record| Recorder(var(1), record);
    for record in ["{\"step\":2}", "{\"kept\":[0]}", "{\n\"step\":1}", "step 1"] {
        let step = step(record);
        let error = train(
            folder.path(),
            &config,
            &step,
            &[group("a", &[("p", &step.0)])],
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("history.jsonl") && text.contains("\"step\": 1") && text.contains(record),
            "{text}"
        );
    }
    let step = step("{\"step\":1}\n");
    train(
        folder.path(),
        &config,
        &step,
        &[group("a", &[("p", &step.0)])],
    )
    .unwrap();
    assert_eq!(
        fs::read_to_string(folder.path().join("history.jsonl")).unwrap(),
        "{\"step\":1}\n"
    );
    let line = fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (line["step"].as_u64(), line["mse"].as_f64()),
        (Some(1), Some(0.25))
    );
}

#[test]
fn a_log_that_cannot_be_written_is_named() {
    let folder = tempdir().unwrap();
    fs::create_dir(folder.path().join("history.jsonl")).unwrap();
    let error = Problem::new(config(4), 0)
        .fit(folder.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&folder.path().join("history.jsonl").display().to_string()),
        "{error}"
    );
}

#[test]
fn groups_that_would_overwrite_each_other_are_refused() {
    let folder = tempdir().unwrap();
    let config = FitConfig {
        steps: 1,
        batch_size: 2,
        ..FitConfig::default()
    };
    let step = Recorder(var(2), "{\"step\":1}");
    let (p, q) = (&step.0, &var(3));
    let mut rising = group("a", &[("p", p)]);
    rising.lr.peak = f64::NAN;
    let negative = group("a", &[("p", p)]).with_weight_decay(-0.5);
    let cases: Vec<(Vec<ParamGroup>, &str)> = vec![
        (vec![], "no parameter to train"),
        (vec![group("a", &[])], "no parameter to train"),
        (
            vec![group("a", &[("p", p)]), group("a", &[("q", q)])],
            "two groups are called `a`",
        ),
        (
            vec![group("a", &[("p", p)]), group("b", &[("p", q)])],
            "two parameters are called `p`",
        ),
        (
            vec![group("a", &[("p", p), ("r", p)])],
            "`p` and `r` are the same variable",
        ),
        (vec![rising], "group `a`: lr peak is NaN"),
        (vec![negative], "group `a`: weight decay is -0.5"),
    ];
    for (groups, expected) in cases {
        let error = train(folder.path(), &config, &step, &groups).unwrap_err();
        assert!(
            matches!(error, Error::Usage(_)) && error.to_string().contains(expected),
            "{error}"
        );
    }
    let half = Var::ones(2, DType::F16, &CPU).unwrap();
    let error =
        ParamGroup::new("a", LrSchedule::constant(0.1), vec![("h".into(), half)]).unwrap_err();
    assert!(error.to_string().contains("`h` is F16"), "{error}");
}
