use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{Device, Tensor};
use tinyfusion::checkpoint::{DTypePolicy, Provenance};
use tinyfusion::core::{Error, LatentBatch, StateDict, StepRng, stream};
use tinyfusion::data::{LatentType, LatentWriter};
use tinyfusion::fid::Inception;
use tinyfusion::models::{MarConfig, SiTConfig, VaeConfig, preset};

use super::prepare::everywhere;
use crate::class_names::ClassNames;
use crate::commands::command_line;
use crate::family::{self, Dit, Family, MaskedAutoregressive, Sit};
use crate::output::say;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder that gets model/, latents.safetensors and, with --vae, vae/, image/ and images/ (one and two); with
    /// --inception, inception.safetensors, few/ and many/ (16 and 48 images)
    out: PathBuf,
    /// Preset of the network (`tinyfusion models` lists them)
    #[arg(long)]
    model: String,
    /// Blocks, if not the preset's; half of them each in a MAR's encoder and decoder
    #[arg(long)]
    depth: Option<usize>,
    /// Also an autoencoder of this size, and images of this side for it
    #[arg(long, value_name = "PIXELS")]
    vae: Option<u32>,
    /// Also an evaluator's network and images for it
    #[arg(long)]
    inception: bool,
    /// Seed of everything
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// How many latents there are, of two classes.
const LATENTS: usize = 16;

/// Writes random weights at a published width, and data for them: what a step costs does not depend on their values.
pub(super) fn run(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.out).map_err(|e| Error::file(&args.out, e))?;
    let name = &args.model;
    let vae = match name.get(..3) {
        Some("SiT") => {
            let config = SiTConfig::preset(name)?;
            write::<Sit>(
                args,
                &config.with_depth(args.depth.unwrap_or(config.0.depth)),
            )?;
            VaeConfig::sd()
        }
        Some("MAR") => {
            let config = MarConfig::preset(name)?;
            let config = match args.depth {
                Some(depth) if depth >= 2 => config.with_depths(depth.div_ceil(2), depth / 2),
                Some(_) => return Err(Error::usage("a MAR has at least 2 blocks").into()),
                None => config,
            };
            write::<MaskedAutoregressive>(args, &config)?;
            VaeConfig::kl16()
        }
        _ => {
            let mut config = preset(name)?;
            config.depth = args.depth.unwrap_or(config.depth);
            write::<Dit>(args, &config)?;
            VaeConfig::sd()
        }
    };
    if let Some(side) = args.vae {
        autoencoder(&args.out.join("vae"), &vae, args.seed)?;
        images(&args.out.join("image"), side, 1)?;
        images(&args.out.join("images"), side, 2)?;
    }
    if args.inception {
        evaluator(&args.out.join("inception.safetensors"), args.seed)?;
        images(&args.out.join("few"), 256, 16)?;
        images(&args.out.join("many"), 256, 48)?;
    }
    Ok(say!("{}", args.out.display())?)
}

/// The evaluator's network: every value is drawn, and variances are 1.
fn evaluator(file: &Path, seed: u64) -> Result<()> {
    let mut rng = StepRng::new(seed, 2, stream::INIT);
    let tensor = |(name, shape): (String, Vec<usize>)| -> Result<(String, Tensor)> {
        let inputs: usize = shape.iter().skip(1).product();
        let drawn = (rng.normal(shape.as_slice(), &Device::Cpu)? * (2.0 / inputs as f64).sqrt())?;
        let variance = name.ends_with("running_var");
        Ok((name, if variance { drawn.ones_like()? } else { drawn }))
    };
    let tensors: std::collections::HashMap<String, Tensor> = Inception::tensors()
        .into_iter()
        .map(tensor)
        .collect::<Result<_>>()?;
    candle_core::safetensors::save(&tensors, file).map_err(|e| Error::file(file, e))?;
    Ok(())
}

fn write<F: Family>(args: &Args, config: &F::Config) -> Result<()> {
    let process = F::Process::default();
    F::validate(config, &process)?;
    let mut rng = StepRng::new(args.seed, 1, stream::INIT);
    let weights = everywhere(&F::init(config, args.seed, &Device::Cpu)?, &mut rng)?;
    let provenance = Provenance::of_command(command_line());
    let model = args.out.join("model");
    if model.exists() {
        std::fs::remove_dir_all(&model).map_err(|e| Error::file(&model, e))?;
    }
    family::save(
        &model,
        &family::description::<F>(config, &process, &ClassNames::default())?,
        &weights,
        &provenance,
        DTypePolicy::F32,
        &[],
    )?;
    let takes = F::samples(config);
    let shape = [takes.channels, takes.size, takes.size];
    let file = args.out.join("latents.safetensors");
    let mut writer = LatentWriter::create(&file, LATENTS, shape, takes.classes, LatentType::F32)?;
    let labels: Vec<i64> = (0..LATENTS as i64).map(|i| i % 2).collect();
    writer.push(&LatentBatch {
        x: rng.normal(
            (LATENTS, takes.channels, takes.size, takes.size),
            &Device::Cpu,
        )?,
        y: Tensor::new(labels, &Device::Cpu)?,
    })?;
    Ok(writer.finish()?)
}

/// A folder as diffusers writes it.
fn autoencoder(folder: &Path, config: &VaeConfig, seed: u64) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, e))?;
    let weights: StateDict = config.init(seed, &Device::Cpu)?;
    let file = folder.join("diffusion_pytorch_model.safetensors");
    let tensors: std::collections::HashMap<String, Tensor> = weights
        .iter()
        .map(|(name, t)| (name.to_string(), t.clone()))
        .collect();
    candle_core::safetensors::save(&tensors, &file).map_err(|e| Error::file(&file, e))?;
    let file = folder.join("config.json");
    std::fs::write(&file, config.to_diffusers()?).map_err(|e| Error::file(&file, e))?;
    Ok(())
}

/// So many images of noise, each a class. An autoencoder takes seconds for one.
fn images(folder: &Path, side: u32, count: usize) -> Result<()> {
    for number in 0..count {
        let class = folder.join((number % 2).to_string());
        std::fs::create_dir_all(&class).map_err(|e| Error::file(&class, e))?;
        let mut rng = StepRng::new(0, number as u64, stream::SAMPLE);
        let values = rng.uniform(3 * (side * side) as usize);
        let pixels: Vec<u8> = values.into_iter().map(|v| (v * 256.0) as u8).collect();
        let file = class.join(format!("{number}.png"));
        image::save_buffer(&file, &pixels, side, side, image::ColorType::Rgb8)
            .map_err(|e| Error::file(&file, e))?;
    }
    Ok(())
}
