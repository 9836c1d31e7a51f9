//! Learning which blocks of a MAR to keep: both stages have groups of their own, no group crosses the bridge, and a run
//! that was stopped ends as the unbroken one, dropout included.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_core::{Error, LatentBatch, Result, StateDict, StepRng, stream};
use tinyfusion_diffusion::{GaussianDiffusion, MarObjective, token_diffusion};
use tinyfusion_models::{Mar, MarConfig};
use tinyfusion_recover::{
    Blend, DeltaW, LearnConfig, Learned, LoraLayers, RunContext, Teacher, learn,
};
use tinyfusion_train::{FitConfig, Progress, RunDir, Stop};

fn config() -> MarConfig {
    MarConfig {
        img_size: 8,
        vae_stride: 1,
        patch_size: 2,
        encoder_embed_dim: 12,
        encoder_depth: 2,
        encoder_num_heads: 2,
        decoder_embed_dim: 16,
        decoder_depth: 4,
        decoder_num_heads: 2,
        vae_embed_dim: 3,
        class_num: 4,
        buffer_size: 2,
        diffloss_d: 1,
        diffloss_w: 8,
        diffusion_batch_mul: 2,
        ..MarConfig::default()
    }
}

fn weights() -> StateDict {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    let specs = config().params();
    specs
        .iter()
        .map(|s| {
            let t = rng.normal(s.shape.as_slice(), &Device::Cpu).unwrap();
            (s.name.clone(), (t * 0.2).unwrap())
        })
        .collect()
}

fn objective() -> MarObjective {
    let training = config().training();
    assert!(training.dropout);
    MarObjective::new(GaussianDiffusion::new(token_diffusion()).unwrap(), training).unwrap()
}

fn batch(step: u64) -> Result<LatentBatch> {
    let mut rng = StepRng::new(3, step, stream::ORDER);
    let y: Vec<u32> = rng.below(4, 6).into_iter().map(|y| y as u32).collect();
    Ok(LatentBatch {
        x: rng.normal((6, 3, 8, 8), &Device::Cpu)?,
        y: Tensor::new(y, &Device::Cpu)?,
    })
}

fn settings(delta: DeltaW, pattern: &str) -> LearnConfig {
    LearnConfig {
        pattern: pattern.parse().unwrap(),
        delta,
        fit: FitConfig {
            steps: 10,
            batch_size: 6,
            micro_batches: 2,
            checkpoint_every: 5,
            ..FitConfig::default()
        },
        ..LearnConfig::default()
    }
}

fn run_in(
    folder: &std::path::Path,
    settings: &LearnConfig,
    stop_at: Option<u64>,
) -> Result<Learned> {
    let dir = RunDir::open(folder, settings)?;
    let teacher = Teacher {
        weights: weights(),
        is_fixed: &MarConfig::is_fixed,
        build: &|w, scale| Mar::with_lora(&config(), w, scale),
    };
    let stop = Stop::default();
    let batches = |step| {
        if Some(step) == stop_at {
            stop.request();
        }
        batch(step)
    };
    let context = RunContext {
        dir: &dir,
        stop: &stop,
        progress: &Progress::hidden(),
    };
    learn(settings, teacher, &objective(), batches, context)
}

#[test]
fn a_stopped_run_ends_as_the_unbroken_one_bit_for_bit() {
    let lora = DeltaW::Lora {
        rank: 2,
        alpha: 4.0,
        layers: LoraLayers::All,
    };
    for (delta, blend) in [(lora, Blend::Exact), (DeltaW::Full, Blend::Plain)] {
        let settings = LearnConfig {
            blend,
            ..settings(delta, "1:2")
        };
        let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let unbroken = run_in(whole.path(), &settings, None).unwrap();
        match run_in(broken.path(), &settings, Some(5)) {
            Err(Error::Interrupted { step }) => assert_eq!(step, 5),
            other => panic!("not interrupted: {other:?}"),
        }
        let resumed = run_in(broken.path(), &settings, None).unwrap();
        assert_eq!(resumed.selection, unbroken.selection);
        for file in ["model", "ema", "optimizer"] {
            let name = format!("checkpoints/step-000010/{file}.safetensors");
            let read =
                |folder: &tempfile::TempDir| std::fs::read(folder.path().join(&name)).unwrap();
            assert!(read(&whole) == read(&broken), "{name} differs");
        }
        let kept = &unbroken.selection.kept;
        let [encoder, decoder] = config().split_kept(kept).unwrap();
        assert_eq!((encoder.len(), decoder.len()), (1, 2), "{kept:?}");
        assert_eq!(unbroken.skipped, 0);
    }
}

#[test]
fn no_group_crosses_the_bridge() {
    for pattern in ["2:6x1", "1:3", "1:3x2", "2:4,1:2"] {
        let folder = tempfile::tempdir().unwrap();
        match run_in(folder.path(), &settings(DeltaW::Frozen, pattern), None) {
            Err(Error::Usage(message)) => {
                assert!(
                    message.contains("never cross stages"),
                    "{pattern}: {message}"
                );
            }
            other => panic!("{pattern}: {other:?}"),
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let learned = run_in(folder.path(), &settings(DeltaW::Frozen, "1:2,2:4"), None).unwrap();
    let [encoder, decoder] = config().split_kept(&learned.selection.kept).unwrap();
    assert_eq!((encoder.len(), decoder.len()), (1, 2));
}
