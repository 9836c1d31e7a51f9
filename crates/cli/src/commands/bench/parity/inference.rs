//! Networks that are only run: the autoencoder, and a few steps of every family's sampler, drawn as `sample` draws.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device};
use clap::Parser;
use tinyfusion::core::{StepRng, stream};
use tinyfusion::models::SiTConfig;
use tinyfusion::models::vae::{AutoencoderKl, DownBlock, UpBlock, VaeConfig};

use super::super::prepare::everywhere;
use super::{Answers, BOTH, Check, moved, on_cpu, small_dit, small_mar};
use crate::class_names::ClassNames;
use crate::commands::sample::{Images, Settings};
use crate::compute::Compute;
use crate::family::{Dit, Family, MaskedAutoregressive, Model, Sit};

pub(super) fn checks(large: bool) -> Vec<Check> {
    let dit = small_dit(2);
    let guided = [
        "--steps",
        "4",
        "--cfg",
        "4",
        "--cfg-channels",
        "first-three",
    ];
    let dit_by = |sampler| {
        drawn::<Dit>(
            dit.clone(),
            &[&["--sampler", sampler], &guided[..]].concat(),
        )
    };
    let sit = SiTConfig(dit.clone());
    let sit_by = |sampler| {
        drawn::<Sit>(
            sit.clone(),
            &[&["--sampler", sampler], &guided[..]].concat(),
        )
    };
    let mut list = vec![
        autoencoder("autoencoder of two stages", small_vae(), 16),
        dit_by("ddpm"),
        dit_by("ddim"),
        sit_by("heun"),
        sit_by("sde-euler"),
        drawn::<MaskedAutoregressive>(
            small_mar(2),
            &["--iterations", "4", "--steps", "4", "--cfg", "4"],
        ),
    ];
    if large {
        list.push(autoencoder(
            "autoencoder f8 of 256 pixels",
            VaeConfig::sd(),
            256,
        ));
    }
    list
}

fn small_vae() -> VaeConfig {
    VaeConfig {
        down_block_types: vec![DownBlock::Plain, DownBlock::Attention],
        up_block_types: vec![UpBlock::Plain; 2],
        block_out_channels: vec![32, 64],
        ..VaeConfig::default()
    }
}

/// It computes in f32 whatever the network of latents computes in.
fn autoencoder(name: &str, config: VaeConfig, side: usize) -> Check {
    Check {
        name: name.into(),
        dtypes: &[DType::F32],
        run: Box::new(move |compute| coded(&config, side, &compute.device)),
    }
}

/// The moments of an image, and the image of a latent.
fn coded(config: &VaeConfig, side: usize, device: &Device) -> Result<Answers> {
    let weights = config.init(0, &Device::Cpu)?;
    let net = AutoencoderKl::new(config, &moved(&weights, device)?)?;
    let mut rng = StepRng::new(1, 0, stream::SAMPLE);
    let small = side / config.factor();
    let image = rng.normal((1, config.in_channels, side, side), &Device::Cpu)?;
    let latent = rng.normal((1, config.latent_channels, small, small), &Device::Cpu)?;
    let moments = net.encode(&image.to_device(device)?)?.moments().clone(); // (1, 2·L, h, w)
    let decoded = net.decode(&latent.to_device(device)?)?; // (1, 3, H, W)
    Ok(vec![on_cpu([moments])?, on_cpu([decoded])?])
}

/// The flags of `sample` that say how is drawn.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

fn drawn<F: Family>(config: F::Config, flags: &[&str]) -> Check {
    let flags: Vec<String> = flags.iter().map(|flag| (*flag).into()).collect();
    Check {
        name: format!("{} of two blocks, sample {}", F::NAME, flags.join(" ")),
        dtypes: BOTH,
        run: Box::new(move |compute| images::<F>(&config, &flags, compute)),
    }
}

/// Two images of fresh weights.
fn images<F: Family>(config: &F::Config, flags: &[String], compute: &Compute) -> Result<Answers> {
    let settings = Flags::try_parse_from(flags)?.settings;
    let mut rng = StepRng::new(0, 1, stream::INIT);
    let weights = everywhere(&F::init(config, 0, &Device::Cpu)?, &mut rng)?;
    let model = Model::<F>::fresh(
        Path::new(""),
        config.clone(),
        F::Process::default(),
        ClassNames::default(),
        moved(&weights, &compute.device)?,
        compute,
    );
    let images = Images {
        seed: 0,
        numbers: 0..2,
        classes: vec![1, 7],
    };
    let drawn = F::drawing(&model, &settings)?.draw(&images, &|| Ok(()))?; // (B, C, H, W)
    Ok(vec![on_cpu([drawn])?])
}
