//! Settings: what is out of range, and a folder that holds a run with others.
#![allow(clippy::unwrap_used)] // helpers of tests: a panic is a failure

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::files;
use serde::Serialize;
use tempfile::tempdir;
use tinyfusion_core::Error;
use tinyfusion_train::{FitConfig, RunDir};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Settings {
    pattern: &'static str,
    fit: FitConfig,
}

#[test]
fn other_settings_are_refused_with_both_values() {
    let folder = tempdir().unwrap();
    let settings = |pattern, fit| Settings { pattern, fit };
    RunDir::open(folder.path(), &settings("1:2", FitConfig::default())).unwrap();
    let before = files(folder.path());
    RunDir::open(folder.path(), &settings("1:2", FitConfig::default())).unwrap();

    let other = FitConfig {
        steps: 7,
        clip: None,
        ..FitConfig::default()
    };
    let error = RunDir::open(folder.path(), &settings("2:4", other)).unwrap_err();
    assert!(matches!(error, Error::Usage(_)));
    let text = error.to_string();
    assert!(
        text.starts_with(&folder.path().display().to_string()),
        "{text}"
    );
    for expected in [
        "`pattern` was \"1:2\", is now \"2:4\"",
        "`fit.steps` was 1000, is now 7",
        "`fit.clip` was 1.0, is now not set",
        "another folder",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(!text.contains("ema"), "{text}");
    assert!(before == files(folder.path()), "the folder was changed");

    // The same settings in another form are the same; a file that is no TOML is not overwritten.
    let path = folder.path().join("config.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        format!("# by hand\n{}", text.replace("1000", "1_000")),
    )
    .unwrap();
    RunDir::open(folder.path(), &settings("1:2", FitConfig::default())).unwrap();
    fs::write(&path, "steps = = 4").unwrap();
    let error = RunDir::open(folder.path(), &settings("1:2", FitConfig::default()))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&path.display().to_string()) && error.contains("does not parse"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "steps = = 4");
}

#[test]
fn how_often_is_logged_and_saved_may_change_on_the_way() {
    let folder = tempdir().unwrap();
    let settings = |fit| Settings {
        pattern: "1:2",
        fit,
    };
    RunDir::open(folder.path(), &settings(FitConfig::default())).unwrap();
    let other = FitConfig {
        checkpoint_every: 7,
        log_every: 1,
        ..FitConfig::default()
    };
    RunDir::open(folder.path(), &settings(other.clone())).unwrap();
    let other = FitConfig { lanes: 7, ..other };
    let error = RunDir::open(folder.path(), &settings(other)).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("lanes") && !error.contains("every"),
        "{error}"
    );
}

#[derive(Serialize)]
struct Computed {
    fit: FitConfig,
    compute: BTreeMap<&'static str, &'static str>,
}

#[test]
fn a_run_goes_on_in_the_numbers_it_began_with() {
    let computed = |device, dtype| Computed {
        fit: FitConfig::default(),
        compute: BTreeMap::from([("device", device), ("dtype", dtype)]),
    };
    let folder = tempdir().unwrap();
    RunDir::open(folder.path(), &computed("cuda", "bf16")).unwrap();
    let before = files(folder.path());
    RunDir::open(folder.path(), &computed("cpu", "bf16")).unwrap();
    assert!(before == files(folder.path()), "the folder was changed");
    let error = RunDir::open(folder.path(), &computed("cuda", "tf32")).unwrap_err();
    assert!(matches!(error, Error::Usage(_)));
    let text = error.to_string();
    assert!(
        text.contains("`compute.dtype` was \"bf16\", is now \"tf32\"; go on with --dtype bf16, use another folder"),
        "{text}"
    );

    // A folder that says nothing of it is of f32.
    let path = folder.path().join("config.toml");
    let text = fs::read_to_string(&path).unwrap();
    let (fit, compute) = text.split_once("[compute]").unwrap();
    assert!(
        compute.contains("cuda") && compute.contains("bf16"),
        "{compute}"
    );
    fs::write(&path, fit).unwrap();
    RunDir::open(folder.path(), &computed("cuda", "f32")).unwrap();
    let error = RunDir::open(folder.path(), &computed("cuda", "bf16"));
    let text = error.unwrap_err().to_string();
    assert!(text.contains("was \"f32\", is now \"bf16\""), "{text}");
}

#[test]
fn a_folder_that_is_no_run_is_left_alone() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), "precious").unwrap();
    let error = RunDir::open(folder.path(), &FitConfig::default()).unwrap_err();
    assert!(matches!(error, Error::Usage(_)));
    assert!(error.to_string().contains("model.safetensors"), "{error}");
    assert_eq!(files(folder.path()).len(), 1);
    assert!(!folder.path().join("checkpoints").exists());

    // What a killed start leaves is no obstacle.
    let folder = tempdir().unwrap();
    fs::create_dir(folder.path().join("checkpoints")).unwrap();
    fs::write(folder.path().join(".tinyfusion-x.partial"), "ste").unwrap();
    RunDir::open(folder.path(), &FitConfig::default()).unwrap();
}

#[test]
fn settings_come_back_from_their_file() {
    let folder = tempdir().unwrap();
    let fit = FitConfig {
        steps: 77,
        clip: None,
        ..FitConfig::default()
    };
    RunDir::open(folder.path(), &fit).unwrap();
    let text = fs::read_to_string(folder.path().join("config.toml")).unwrap();
    // `clip = None` is left out, and what is left out gets its default: a file cannot say "no clip".
    let back: FitConfig = toml::from_str(&text).unwrap();
    assert_eq!(
        back,
        FitConfig {
            clip: Some(1.0),
            ..fit
        }
    );
    let error = toml::from_str::<FitConfig>("step = 4")
        .unwrap_err()
        .to_string();
    assert!(error.contains("unknown field `step`"), "{error}");
}

#[test]
fn settings_out_of_range_are_refused() {
    let good = FitConfig::default();
    good.validate().unwrap();
    let cases = [
        (
            FitConfig {
                steps: 0,
                ..good.clone()
            },
            "at least 1",
        ),
        (
            FitConfig {
                micro_batches: 0,
                ..good.clone()
            },
            "at least 1",
        ),
        (
            FitConfig {
                batch_size: 2,
                micro_batches: 3,
                ..good.clone()
            },
            "3 micro-batches of a batch of 2",
        ),
        (
            FitConfig {
                ema: 1.0,
                ..good.clone()
            },
            "ema: 1 is not in [0, 1)",
        ),
        (
            FitConfig {
                ema: f64::NAN,
                ..good.clone()
            },
            "ema: NaN",
        ),
        (
            FitConfig {
                betas: (0.9, 1.0),
                ..good.clone()
            },
            "betas: 1 is not in [0, 1)",
        ),
        (
            FitConfig {
                betas: (-0.1, 0.9),
                ..good.clone()
            },
            "betas: -0.1",
        ),
        (
            FitConfig {
                eps: 0.0,
                ..good.clone()
            },
            "eps is 0",
        ),
        (
            FitConfig {
                clip: Some(0.0),
                ..good.clone()
            },
            "clip is 0",
        ),
        (
            FitConfig {
                clip: Some(f64::NAN),
                ..good.clone()
            },
            "clip is NaN",
        ),
        (
            FitConfig {
                ema_rampup: Some(0.0),
                ..good.clone()
            },
            "ema-rampup is 0",
        ),
        (
            FitConfig {
                ema_rampup: Some(f64::NAN),
                ..good.clone()
            },
            "ema-rampup is NaN",
        ),
        (
            FitConfig {
                checkpoint_every: 0,
                ..good.clone()
            },
            "checkpoint-every",
        ),
        (
            FitConfig {
                log_every: 0,
                ..good
            },
            "log-every",
        ),
    ];
    for (config, expected) in cases {
        let error = config.validate().unwrap_err();
        assert!(
            matches!(error, Error::Usage(_)) && error.to_string().contains(expected),
            "{error}"
        );
    }
}

#[test]
fn a_long_memory_over_few_steps_keeps_the_start() {
    let settings = |ema, steps| FitConfig {
        ema,
        steps,
        ..FitConfig::default()
    };
    // Averages of decay 0.9999, the reference's: hardly anything after its 100,000 steps, nearly all after 600.
    assert!(settings(0.9999, 100_000).start_left() < 1e-4);
    let left = settings(0.9999, 600).start_left();
    assert!((left - 0.941_762).abs() < 1e-6, "{left}"); // 0.9999^600
    let ramped = FitConfig {
        ema_rampup: Some(0.05),
        ..settings(0.9999, 600)
    };
    assert_eq!(ramped.start_left(), 0.0);
    assert_eq!(
        (ramped.ema_at(0), ramped.ema_at(100)),
        (0.0, 0.5f64.powf(0.2))
    );
}
