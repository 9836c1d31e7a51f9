use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde::Serialize;
use tinyfusion::checkpoint::{Checkpoint, DTypePolicy};
use tinyfusion::core::{Error, LatentBatch, StateDict, StepRng, stream};
use tinyfusion::data::{
    LatentContent, LatentIndex, Loader, NpyLatents, ShardWriter, ShardedLatents, Source,
};

use super::turns::repeat;
use super::worker::{Batch, First};
use crate::output::say;
use crate::resources::{FilesHeld, peak_rss};
use crate::vae::Vae;

/// Classes of the latents, as of ImageNet.
const CLASSES: usize = 1000;
/// (C, H, W) of the latents of images of 256 pixels by Stable Diffusion's autoencoder.
const LATENT: [usize; 3] = [4, 32, 32];

/// Repeat on demand what a command does with large files, on those that `cargo xtask bench files` prepares.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of the files
    folder: PathBuf,
    /// What to repeat
    task: Task,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Side of the images in pixels (encode, decode)
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// Images of a batch (latents, npy)
    #[arg(long, default_value_t = 256)]
    batch: usize,
    /// Batches of a repetition (latents, npy)
    #[arg(long, default_value_t = 1)]
    batches: u64,
    /// Images of the set (write-latents)
    #[arg(long, default_value_t = 32_768)]
    images: usize,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Task {
    /// Load model.pt as tensors of f32
    LoadPt,
    /// Load model.safetensors as tensors of f32
    LoadSafetensors,
    /// Encode an image of batch.safetensors with the autoencoder of this folder
    Encode,
    /// Decode a latent of batch.safetensors with the autoencoder of this folder
    Decode,
    /// Write random moments as shards, once
    WriteLatents,
    /// Draw training batches from the shards in this folder
    Latents,
    /// Draw training batches from the public code's folder of a file for every image
    Npy,
}

/// What is said at the end.
#[derive(Default, Serialize)]
struct Last {
    peak_rss_bytes: Option<u64>,
    /// Operations of a repetition, by formula.
    #[serde(skip_serializing_if = "Option::is_none")]
    flops: Option<f64>,
    /// Files of the set.
    #[serde(skip_serializing_if = "Option::is_none")]
    shards: Option<usize>,
    /// The most files of the set that were held at once.
    #[serde(flatten)]
    held: Option<FilesHeld>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads)
        .stack_size(64 << 20)
        .build_global()?;
    let folder = &args.folder;
    let mut last = match args.task {
        Task::LoadPt => load(folder, "model.pt")?,
        Task::LoadSafetensors => load(folder, "model.safetensors")?,
        Task::Encode => encode(folder, args.size)?,
        Task::Decode => decode(folder, args.size)?,
        Task::WriteLatents => return write_latents(folder, args.images),
        Task::Latents => {
            let source = ShardedLatents::open(folder)?;
            let shards = source.index().shards.len();
            Last {
                shards: Some(shards),
                ..batches(args, Arc::new(source))?
            }
        }
        Task::Npy => batches(args, Arc::new(NpyLatents::open(folder, CLASSES)?))?,
    };
    last.peak_rss_bytes = peak_rss();
    Ok(say!("{}", serde_json::to_string(&last)?)?)
}

/// From the file to tensors that can be computed with, as every command loads them: hashed, and checked for NaN and infinity.
fn load(folder: &Path, name: &str) -> Result<Last> {
    let path = folder.join(name);
    let mut first = First::of(folder);
    // Giving the memory back is not part of loading.
    let mut held = Vec::new();
    repeat(&Device::Cpu, || {
        let file = Checkpoint::open(&path)?;
        let loaded = file.load(file.choose(None)?, DTypePolicy::F32, &Device::Cpu)?;
        let sum = touched(&loaded.tensors)?;
        held.push(loaded);
        first.keep(&Tensor::new(&[sum], &Device::Cpu)?)
    })?;
    Ok(Last::default())
}

/// Reads a value of every page of memory, and the last one: a tensor that is a promise only is read from the file by this.
/// The sum of their magnitudes tells whether two programs have read the same.
fn touched(tensors: &StateDict) -> Result<f64> {
    const STRIDE: usize = 4096 / size_of::<f32>();
    let mut sum = 0.0;
    for (name, tensor) in tensors.iter() {
        let (storage, layout) = tensor.storage_and_layout();
        let (candle_core::Storage::Cpu(values), Some((from, to))) =
            (&*storage, layout.contiguous_offsets())
        else {
            return Err(Error::run(format!("`{name}` is not one piece on the CPU")).into());
        };
        let values = &values.as_slice::<f32>()?[from..to];
        let some = values.iter().step_by(STRIDE).chain(values.last());
        sum += some.map(|v| f64::from(v.abs())).sum::<f64>();
    }
    Ok(sum)
}

fn encode(folder: &Path, size: usize) -> Result<Last> {
    let vae = Vae::load(&folder.join("vae"), &Device::Cpu)?;
    let batch = Batch::read(folder)?;
    let images = batch.get(&format!("image-{size}"))?; // (1, 3, H, W)
    let mut first = First::of(folder);
    repeat(&Device::Cpu, || {
        first.keep(vae.net.encode(images)?.moments())
    })?; // (1, 8, H/8, W/8)
    Ok(Last {
        flops: Some(vae.net.config().encoder_flops(size)),
        ..Last::default()
    })
}

fn decode(folder: &Path, size: usize) -> Result<Last> {
    let vae = Vae::load(&folder.join("vae"), &Device::Cpu)?;
    let batch = Batch::read(folder)?;
    let latents = batch.get(&format!("latent-{size}"))?; // (1, 4, H/8, W/8)
    let mut first = First::of(folder);
    repeat(&Device::Cpu, || first.keep(&vae.net.decode(latents)?))?; // (1, 3, H, W)
    Ok(Last {
        flops: Some(vae.net.config().decoder_flops(size)),
        ..Last::default()
    })
}

/// As `encode` writes them by default: moments in f16, of the image and of the mirrored one.
fn write_latents(folder: &Path, images: usize) -> Result<()> {
    const BATCH: usize = 256;
    let index = LatentIndex {
        flips: true,
        scale: 0.18215,
        ..LatentIndex::new(LatentContent::Moments, LATENT, CLASSES, images as u64)
    };
    let mut writer = ShardWriter::open(folder, &index)?;
    let [c, h, w] = index.row_shape();
    // The same values over and over: the time of a batch does not depend on them.
    let x = StepRng::new(0, 0, stream::ENCODE).normal((BATCH, c, h, w), &Device::Cpu)?;
    for from in (0..images).step_by(BATCH) {
        let count = BATCH.min(images - from);
        let y: Vec<u32> = (from..from + count).map(|i| (i % CLASSES) as u32).collect();
        writer.push(&LatentBatch {
            x: x.narrow(0, 0, count)?,
            y: Tensor::new(y, &Device::Cpu)?,
        })?;
    }
    Ok(writer.finish()?)
}

/// Batches as a training run asks for them: shuffled, with what augmentation the set has.
fn batches(args: &Args, source: Arc<dyn Source>) -> Result<Last> {
    // As the kernel says it of what is open.
    let folder = args
        .folder
        .canonicalize()
        .map_err(|e| Error::file(&args.folder, e))?;
    let mut loader = Loader::new(source, 0, args.batch)?;
    let (mut step, mut held) = (0, FilesHeld::of(&folder));
    repeat(&Device::Cpu, || {
        for _ in 0..args.batches {
            loader.batch(step)?;
            step += 1;
        }
        held = held.zip(FilesHeld::of(&folder)).map(|(a, b)| a.most(b));
        Ok(())
    })?;
    Ok(Last {
        held,
        ..Last::default()
    })
}
