//! A run survives interruptions and bad steps, and says what is wrong with its settings.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use std::path::Path;

use candle_core::Tensor;
use common::{BATCH, DEPTH, USEFUL, batch, config, history, run_in, run_toy, weights};
use tinyfusion_core::{Error, Result};
use tinyfusion_mask::Linear;
use tinyfusion_recover::{Blend, DeltaW, LearnConfig, LoraLayers};
use tinyfusion_train::{FitConfig, Stop};

#[test]
fn an_interrupted_run_ends_as_the_unbroken_one_bit_for_bit() {
    for delta in [DeltaW::Full, DeltaW::Frozen] {
        let config = LearnConfig {
            fit: FitConfig {
                steps: 20,
                checkpoint_every: 4,
                ..config(delta.clone()).fit
            },
            ..config(delta)
        };
        let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let unbroken = run_in(whole.path(), &config, &weights(), batch, &Stop::default()).unwrap();

        for at in [6, 13] {
            let stop = Stop::default();
            let batches = |step| {
                if step == at {
                    stop.request();
                }
                batch(step)
            };
            match run_in(broken.path(), &config, &weights(), batches, &stop) {
                Err(Error::Interrupted { step }) => assert_eq!(step, at),
                other => panic!("not interrupted: {other:?}"),
            }
        }
        let resumed = run_in(broken.path(), &config, &weights(), batch, &Stop::default()).unwrap();
        assert_eq!(resumed.selection, unbroken.selection);
        let same = |file: &str| {
            let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert!(read(whole.path()) == read(broken.path()), "{file} differs");
        };
        same("history.jsonl");
        for file in ["model", "ema", "optimizer"] {
            same(&format!("checkpoints/step-000020/{file}.safetensors"));
        }
        // Complete: returns at once, drawing nothing.
        let untouched = |_| -> Result<Tensor> { panic!("a complete run drew a batch") };
        let again = run_in(
            broken.path(),
            &config,
            &weights(),
            untouched,
            &Stop::default(),
        )
        .unwrap();
        assert_eq!(again.selection, unbroken.selection);
    }
}

#[test]
fn steps_without_a_finite_loss_are_skipped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let batches = |step| {
        let x = batch(step)?;
        if step % 10 == 3 {
            Ok((x * f64::NAN)?)
        } else {
            Ok(x)
        }
    };
    let config = config(DeltaW::Full);
    let learned = run_in(
        folder.path(),
        &config,
        &weights(),
        batches,
        &Stop::default(),
    )
    .unwrap();
    assert_eq!(
        (learned.skipped, learned.selection.kept.as_slice()),
        (12, USEFUL.as_slice())
    );
    let history = history(folder.path());
    assert_eq!(history.len(), 120);
    assert!(
        history
            .iter()
            .all(|r| r.keep_probability.iter().all(|p| p.is_finite()))
    );
}

#[test]
fn history_can_be_thinned() {
    let c = config(DeltaW::Frozen);
    let config = LearnConfig {
        history_every: 4,
        fit: FitConfig {
            steps: 10,
            ..c.fit.clone()
        },
        ..c
    };
    let steps: Vec<u64> = run_toy(&config).unwrap().1.iter().map(|r| r.step).collect();
    assert_eq!(steps, [4, 8, 10]);
}

#[test]
fn wrong_settings_are_usage_errors() {
    let base = config(DeltaW::Frozen);
    let lora = |rank, alpha, layers| DeltaW::Lora {
        rank,
        alpha,
        layers,
    };
    for (change, config) in [
        (
            "`2:4` does not fit",
            LearnConfig {
                pattern: "2:4".parse().unwrap(),
                ..base.clone()
            },
        ),
        (
            "`1:2x2` does not fit",
            LearnConfig {
                pattern: "1:2x2".parse().unwrap(),
                ..base.clone()
            },
        ),
        (
            "mask-lr",
            LearnConfig {
                mask_lr: f64::NAN,
                ..base.clone()
            },
        ),
        (
            "tau",
            LearnConfig {
                tau: Linear { from: 4.0, to: 0.0 },
                ..base.clone()
            },
        ),
        (
            "rank",
            LearnConfig {
                delta: lora(0, 1.0, LoraLayers::All),
                ..base.clone()
            },
        ),
        // The toy stack has no layer with a bias.
        (
            "no linear layer",
            LearnConfig {
                delta: lora(2, 4.0, LoraLayers::All),
                ..base.clone()
            },
        ),
        (
            "history-every",
            LearnConfig {
                history_every: 0,
                ..base.clone()
            },
        ),
        (
            "micro-batches",
            LearnConfig {
                fit: FitConfig {
                    micro_batches: BATCH + 1,
                    ..base.fit.clone()
                },
                ..base.clone()
            },
        ),
    ] {
        match run_toy(&config) {
            Err(Error::Usage(message)) => assert!(message.contains(change), "{message}"),
            other => panic!("{change}: {other:?}"),
        }
    }
}

#[test]
fn settings_are_read_and_written_under_their_command_line_names() {
    let text = "pattern = '2:4x7'\nmask-lr = 5e-3\nblend = 'plain'\n[delta.lora]\nrank = 4\nalpha = 8.0\nlayers = { named = ['qkv'] }\n\
                [tau]\nfrom = 3.0\nto = 0.2\n[fit]\nbatch-size = 7\n";
    let config: LearnConfig = toml::from_str(text).unwrap();
    assert_eq!(
        (
            config.mask_lr,
            config.blend,
            config.fit.batch_size,
            config.lr
        ),
        (5e-3, Blend::Plain, 7, 1e-4)
    );
    assert_eq!(
        config.delta,
        DeltaW::Lora {
            rank: 4,
            alpha: 8.0,
            layers: LoraLayers::Named(vec!["qkv".into()])
        }
    );
    assert_eq!(
        toml::from_str::<LearnConfig>(&toml::to_string(&config).unwrap()).unwrap(),
        config
    );
    for delta in [DeltaW::Full, DeltaW::Frozen, DeltaW::default()] {
        let config = LearnConfig {
            delta,
            ..LearnConfig::default()
        };
        assert_eq!(
            toml::from_str::<LearnConfig>(&toml::to_string(&config).unwrap()).unwrap(),
            config
        );
    }
    for wrong in [
        "delta = 'some'",
        "mask_lr = 1.0",
        "[delta.lora]\nrank = 1\nalpha = 1.0\nbeta = 1.0",
        "pattern = '3:2'",
    ] {
        assert!(toml::from_str::<LearnConfig>(wrong).is_err(), "{wrong}");
    }
    assert_eq!(DEPTH, USEFUL.len() * 2);
}
