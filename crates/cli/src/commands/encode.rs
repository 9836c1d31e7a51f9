use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Tensor;
use tinyfusion::checkpoint::require_space;
use tinyfusion::core::{Error, LatentBatch, StepRng, stream};
use tinyfusion::data::{
    Augment, INDEX_FILE, ImageFolder, LatentContent, LatentIndex, LatentType, ShardWriter, Source,
};
use tinyfusion::train::{Progress, Stop};

use crate::claim::Claim;
use crate::class_names::{ClassNames, LABELS_FILE};
use crate::compute::DeviceOption;
use crate::hub::Inputs;
use crate::output::{progress_bar, say, warn};
use crate::resources::Resources;
use crate::vae::Vae;

/// Encode a folder of images by class into packed latents, once, for training.
///
/// Every sub-folder of IMAGES is a class. Images are cropped and resized as ADM and DiT do it, encoded by the autoencoder,
/// and packed into shards with an index (latents.json): not a file per image. By default the posterior's moments of the
/// image and of the mirrored image are stored, so that every epoch draws a fresh latent; --content samples --flips applied
/// stores one latent for each image, as the public code does.
///
/// The same command goes on after an interruption, behind the last whole shard, and writes a damaged shard again. IMAGES may
/// have moved meanwhile; other names of classes or images are refused.
///
/// Examples:
///   tinyfusion encode imagenet/train -o runs/latents --vae sd-vae-ft-ema
///   tinyfusion encode imagenet/train runs/latents --vae sd-vae-ft-ema --content samples --flips applied
///   tinyfusion distill runs/d14 runs/student --data runs/latents --teacher MODEL --steps 100000
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Folder of images, a sub-folder for each class
    images: PathBuf,
    /// Folder that gets latents.json and the shards
    #[arg(required_unless_present = "output")]
    out: Option<PathBuf>,
    /// The same, as a flag
    #[arg(short, long, value_name = "OUT", conflicts_with = "out")]
    output: Option<PathBuf>,
    /// Autoencoder: a diffusers folder, or a file in the names of diffusers, Stable Diffusion or MAR (.safetensors, .pt; kl16.ckpt)
    #[arg(long, value_name = "VAE")]
    vae: PathBuf,
    /// Encode images larger than the autoencoder was trained on in overlapping tiles: less memory, other latents
    #[arg(long)]
    vae_tiles: bool,
    /// Side of the images in pixels
    #[arg(long, default_value_t = 256)]
    size: usize,
    /// What is stored of an image
    #[arg(long, value_enum, default_value_t = Content::Moments)]
    content: Content,
    /// Whether images are mirrored
    #[arg(long, value_enum, default_value_t = Flips::Stored)]
    flips: Flips,
    /// Type of the stored values
    #[arg(long, value_enum, default_value_t = Stored::F16)]
    dtype: Stored,
    /// Images encoded at a time
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Images of a shard: what an interruption may cost
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    shard_images: u64,
    /// Seed of the mirroring (--flips applied) and of the noise (--content samples) [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    place: DeviceOption,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Content {
    /// Mean and log-variance of the posterior
    Moments,
    /// One latent, drawn and scaled
    Samples,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Flips {
    /// Both the image and the mirrored image
    Stored,
    /// One of the two, drawn for every image
    Applied,
    /// The image alone
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Stored {
    F16,
    F32,
}

impl Args {
    fn out(&self) -> Result<&Path> {
        let out = self.out.as_deref().or(self.output.as_deref());
        Ok(out.ok_or_else(|| Error::usage("OUT, the folder to write, is missing"))?)
    }

    fn check(&self) -> Result<()> {
        let fail = |what: &str| Err(Error::usage(what).into());
        if self.batch_size == 0 || self.size == 0 {
            return fail("batch-size and size must be at least 1");
        }
        let draws = self.flips == Flips::Applied || self.content == Content::Samples;
        if self.seed.is_some() && !draws {
            return fail(
                "nothing is drawn, so that --seed does nothing: it needs --flips applied or --content samples",
            );
        }
        Ok(())
    }

    fn index(&self, vae: &Vae, images: &ImageFolder) -> Result<LatentIndex> {
        let (channels, side) = vae.latents(self.size)?;
        let count = images.len().unwrap_or(0);
        let content = match self.content {
            Content::Moments => LatentContent::Moments,
            Content::Samples => LatentContent::Samples,
        };
        let mut origin = BTreeMap::new();
        origin.insert("vae_sha256".into(), vae.sha256.clone());
        origin.insert(LISTING.into(), images.listing_sha256());
        origin.insert("size".into(), self.size.to_string());
        if self.vae_tiles {
            origin.insert("vae_tiles".into(), "true".into());
        }
        if self.flips == Flips::Applied {
            origin.insert("flips".into(), "applied".into());
        }
        if self.flips == Flips::Applied || self.content == Content::Samples {
            origin.insert("seed".into(), self.seed.unwrap_or(0).to_string());
        }
        Ok(LatentIndex {
            flips: self.flips == Flips::Stored,
            scale: vae.net.config().scaling_factor,
            dtype: match self.dtype {
                Stored::F16 => LatentType::F16,
                Stored::F32 => LatentType::F32,
            },
            shard_images: self.shard_images,
            origin,
            ..LatentIndex::new(content, [channels, side, side], images.classes(), count)
        })
    }
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default().and([&mut self.images, &mut self.vae])
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    let resources = Resources::start();
    args.check()?;
    let images = ImageFolder::open(&args.images, args.size, Augment::Never)?;
    let vae = Vae::load(&args.vae, &args.place.open()?)?.in_tiles(args.vae_tiles);
    let index = args.index(&vae, &images)?;
    let out = args.out()?;
    let _claim = Claim::take(out)?;
    same_images(out, &index)?;
    let labels = ClassNames::of_folder(out)?;
    let mut writer = ShardWriter::open(out, &index)?;
    let damaged = writer.damaged();
    let again: u64 = damaged.iter().map(|d| d.images.end - d.images.start).sum();
    let todo = index.images - writer.written() + again;
    require_space(
        out,
        todo * index.row_bytes() as u64,
        "for the latents: take another disk, --flips applied or --content samples",
    )?;
    let mut work = Work {
        args,
        vae: &vae,
        images: &images,
        progress: progress_bar("encode", todo),
        done: 0,
        stop,
    };
    for damage in damaged {
        warn(format_args!(
            "{}; its images are encoded again",
            damage.error
        ));
        let mut shard = writer.again(&damage)?;
        work.encode(damage.images, |batch| shard.push(batch))?;
        shard.finish()?;
    }
    work.encode(writer.written()..index.images, |batch| writer.push(batch))?;
    writer.finish()?;
    work.progress.finish();
    write_labels(out, &labels, images.class_names())?;
    resources.write(out, None)?;
    Ok(say!(
        "{}: {} images of {} classes as latents {:?}",
        out.display(),
        index.images,
        index.classes,
        index.shape
    )?)
}

/// The entry of an index's origin that tells which image is which.
const LISTING: &str = "listing_sha256";

/// An error where the folder has latents of another list of images: their numbers, and so the labels, would be others.
fn same_images(out: &Path, index: &LatentIndex) -> Result<()> {
    let path = out.join(INDEX_FILE);
    if !path.exists() {
        return Ok(());
    }
    let there = LatentIndex::read(out)?;
    if there.origin.get(LISTING) == index.origin.get(LISTING) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{}: the latents there are of another list of images ({} in {} classes; now {} in {}): images or classes were \
         added, removed or renamed since, or IMAGES is another folder; undo that, or use another OUT",
        path.display(),
        there.images,
        there.classes,
        index.images,
        index.classes
    ))
    .into())
}

/// What encodes images.
struct Work<'a> {
    args: &'a Args,
    vae: &'a Vae,
    images: &'a ImageFolder,
    progress: Progress,
    done: u64,
    stop: &'a Stop,
}

impl Work<'_> {
    /// Hands the images `numbers` to `push`, batch after batch.
    fn encode(
        &mut self,
        numbers: Range<u64>,
        mut push: impl FnMut(&LatentBatch) -> tinyfusion::core::Result<()>,
    ) -> Result<()> {
        let mut next = numbers.start;
        while next < numbers.end {
            if self.stop.requested() {
                return Err(Error::Stopped.into());
            }
            let end = (next + self.args.batch_size as u64).min(numbers.end);
            let batch: Vec<u64> = (next..end).collect();
            let images = self.images.batch(&batch)?;
            push(&LatentBatch {
                x: rows(self.args, self.vae, &images.x, &batch)?,
                y: images.y,
            })?;
            self.done += end - next;
            self.progress.set(self.done, String::new());
            next = end;
        }
        Ok(())
    }
}

/// What is stored of the images x (B, 3, H, W), whose numbers are `numbers`: (B, V·P·C, h, w).
fn rows(args: &Args, vae: &Vae, x: &Tensor, numbers: &[u64]) -> Result<Tensor> {
    let seed = args.seed.unwrap_or(0);
    // Every image has a generator of its own: what it becomes depends on no neighbour and on no batch size.
    let mut rngs: Vec<StepRng> = numbers
        .iter()
        .map(|i| StepRng::new(seed, *i, stream::ENCODE))
        .collect();
    let views = match args.flips {
        Flips::Never => vec![x.clone()],
        Flips::Stored => vec![x.clone(), mirrored(x)?],
        Flips::Applied => {
            let flipped = mirrored(x)?;
            let choose = |(i, rng): (usize, &mut StepRng)| {
                let from = if rng.below(2, 1)[0] == 1 { &flipped } else { x };
                Ok(from.narrow(0, i, 1)?)
            };
            let chosen = rngs.iter_mut().enumerate().map(choose);
            let chosen = chosen.collect::<tinyfusion::core::Result<Vec<Tensor>>>()?;
            vec![Tensor::cat(&chosen, 0)?]
        }
    };
    let mut stored = Vec::with_capacity(views.len());
    for view in views {
        let posterior = vae.encode(&view)?;
        if args.content == Content::Moments {
            stored.push(posterior.moments().clone()); // (B, 2·C, h, w)
            continue;
        }
        let (_, channels, h, w) = posterior.moments().dims4()?;
        let noise = rngs
            .iter_mut()
            .map(|rng| rng.normal((1, channels / 2, h, w), x.device()))
            .collect::<tinyfusion::core::Result<Vec<_>>>()?;
        let latents = posterior.sample(&Tensor::cat(&noise, 0)?)?;
        stored.push(vae.net.scaled(&latents)?); // (B, C, h, w)
    }
    Ok(Tensor::cat(&stored, 1)?.contiguous()?)
}

/// (B, C, H, W) with left and right exchanged.
fn mirrored(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(3)? as u32;
    let columns: Vec<u32> = (0..width).rev().collect();
    Ok(x.index_select(&Tensor::new(columns, x.device())?, 3)?
        .contiguous()?)
}

/// The names of the classes: a model that is trained on these latents takes them over. Names that are `there` already stay:
/// somebody wrote better ones than those of the folders.
fn write_labels(out: &Path, there: &ClassNames, names: &[String]) -> Result<()> {
    let (path, names) = (out.join(LABELS_FILE), ClassNames::listed(names));
    if !there.is_empty() {
        if *there != names {
            warn(format_args!(
                "{}: other names than those of the folders stand there, and are kept",
                path.display()
            ));
        }
        return Ok(());
    }
    let text = serde_json::to_string_pretty(&names)?;
    Ok(tinyfusion::checkpoint::write_atomic(path, |f| {
        f.write_all(format!("{text}\n").as_bytes())
    })?)
}
