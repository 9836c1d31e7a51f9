//! `tinyfusion sample`: what is the same for every family is here, how a family draws in a file of its own.

mod classes;
mod finished;
mod flow;
mod gaussian;
mod guided;
mod npz;
mod parts;
mod share;
mod tokens;
mod write;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use tinyfusion::checkpoint::require_space;
use tinyfusion::core::Error;
use tinyfusion::data::to_uint8;
use tinyfusion::diffusion::Respacing;
use tinyfusion::nn::Lanes;
use tinyfusion::train::{Progress, Stop};

pub(crate) use flow::FlowDrawing;
pub(crate) use gaussian::GaussianDrawing;
pub(crate) use guided::Images;
pub(crate) use tokens::TokenDrawing;

use self::classes::Classes;
use self::guided::{Guided, Noise};
use self::parts::Parts;
use self::share::Share;
use crate::claim::Claim;
use crate::compute::ComputeOptions;
use crate::family::{Architecture, Family, Model, Samples, with_family};
use crate::hub::Inputs;
use crate::output::progress_bar;
use crate::resources::Resources;
use crate::settings::finite;
use crate::training_data::MOST_IMAGES;
use crate::vae::Vae;

/// Draw images: samples.npz, a PNG grid and the speed.
///
/// Image i has class i mod K (or the classes of --classes in turn), and its noise depends on the seed and i alone: grids of
/// different models start from the same noise, and neither the batch size nor the share changes an image, but for the last
/// bits of f32 (matrix products of another size add in another order): here and there a value of 8 bits is one level higher
/// or lower. A model of latents gives images with --vae; without it its latents, (N, C, H, W) f32, and no pictures.
///
/// What is drawn is kept in OUT/parts until all is there: the same command goes on after an interruption, and does nothing
/// where all is done, except that it writes pictures that are asked for only now. Other settings need another OUT.
///
/// Examples:
///   tinyfusion sample assets/teacher runs/images --count 100 --sampler ddim --steps 50 --cfg 2.0
///   tinyfusion sample SIT runs/images --sampler sde-euler --steps 250 --form sigma --last-step mean
///   tinyfusion sample MAR runs/images --iterations 64 --steps 100 --cfg 3 --temperature 0.95
///   tinyfusion sample assets/teacher runs/stars --count 20 --classes star,ring --pngs
///   tinyfusion sample MODEL runs/images --vae sd-vae-ft-ema --cfg 1.5 --cfg-channels first-three --classes 207,360
///   tinyfusion sample MODEL runs/part-0 --vae sd-vae-ft-ema --count 50000 --share 0/8   # and 1/8 to 7/8 elsewhere
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    /// Folder that gets samples.npz, grid.png and sample.json
    out: PathBuf,
    /// Images to draw
    #[arg(long, visible_alias = "num", default_value_t = 100)]
    count: usize,
    /// Draw one of N shares of these images, I from 0: their folders are evaluated together
    #[arg(long, visible_alias = "shard", value_name = "I/N")]
    share: Option<Share>,
    /// Classes that take turns, by number or by name [default: all]; names are those in the model's config, or in
    /// labels.json or model_index.json (id2label) beside it
    #[arg(long, value_name = "CLASS,…", value_delimiter = ',')]
    classes: Vec<String>,
    /// Autoencoder that turns a model's latents into images: a diffusers folder, or a file in the names of diffusers,
    /// Stable Diffusion or MAR (.safetensors, .pt; kl16.ckpt)
    #[arg(long, value_name = "VAE")]
    vae: Option<PathBuf>,
    /// Decode images larger than the autoencoder was trained on in overlapping tiles: less memory, other images
    #[arg(long, requires = "vae")]
    vae_tiles: bool,
    /// Also write every image as OUT/images/NUMBER.png
    #[arg(long)]
    pngs: bool,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    compute: ComputeOptions,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Images drawn at a time, per core (with --sampler dopri5, which chooses its steps by the images, always one)
    #[arg(long, default_value_t = 50)]
    batch_size: usize,
    /// Columns of the PNG grid, which shows at most ten rows
    #[arg(long, default_value_t = 10)]
    grid_columns: usize,
}

/// How is drawn. What a family or a sampler does not know is refused by it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Settings {
    /// Sampler [default: ddim of a DiT, heun of a SiT]
    #[arg(long, value_enum)]
    sampler: Option<Sampler>,
    /// Sampling steps: every k-th timestep for DDIM, an even spread for the others [default: 50 of a DiT, 25 of a SiT,
    /// whose Heun asks the network twice a step; of a MAR those of each token, as its config says]
    #[arg(long)]
    steps: Option<usize>,
    /// DiT and MAR: which timesteps are visited, in place of --steps: "250" (an even spread), "10,20,30" (so many in each of
    /// three sections), "ddim50" (every k-th) or "" (all)
    #[arg(long, value_name = "TEXT", conflicts_with = "steps")]
    respacing: Option<Respacing>,
    /// Randomness of DDIM, from 0 (deterministic, the default) to 1 (as much as DDPM's)
    #[arg(long, value_parser = finite)]
    eta: Option<f64>,
    /// Classifier-free guidance (1 is none, 0 ignores the class)
    #[arg(long, default_value_t = 2.0, value_parser = finite)]
    cfg: f64,
    /// Channels that are guided: published DiTs and SiTs guide three of four [default: all]
    #[arg(long, value_enum)]
    cfg_channels: Option<Channels>,
    /// DiT: clamp estimates of the clean image to [-1, 1] (right, and the default, for pixels but not for latents)
    #[arg(long)]
    clip: Option<bool>,
    #[command(flatten)]
    flow: flow::FlowFlags,
    #[command(flatten)]
    tokens: tokens::TokenFlags,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Sampler {
    /// DiT: ancestral sampling
    Ddpm,
    /// DiT: every k-th timestep, deterministic without --eta
    Ddim,
    /// DiT: DPM-Solver++(2M)
    Dpm,
    /// SiT: the flow's equation, first order
    Euler,
    /// SiT: the flow's equation, second order
    Heun,
    /// SiT: the flow's equation by Dormand-Prince 5(4), whose steps --atol and --rtol decide for a whole batch
    Dopri5,
    /// SiT: the stochastic equation, Euler-Maruyama
    SdeEuler,
    /// SiT: the stochastic equation, Heun
    SdeHeun,
}

impl Sampler {
    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |v| v.get_name().to_owned())
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Channels {
    FirstThree,
    All,
}

/// How the images of one run are drawn; one for each kind of process.
pub(crate) trait Drawing: Sync {
    /// Calls of `on_step` for a batch; none where the solver chooses its steps.
    fn steps(&self) -> Option<usize>;
    /// What sample.json says of it.
    fn report(&self) -> Map<String, Value>;
    /// The images as (B, C, H, W) f32.
    fn draw(
        &self,
        images: &Images,
        on_step: &dyn Fn() -> tinyfusion::core::Result<()>,
    ) -> tinyfusion::core::Result<Tensor>;
}

impl Settings {
    /// The number of steps where `default` of them are taken without a flag.
    fn steps_or(&self, default: usize) -> usize {
        self.steps.unwrap_or(default)
    }

    fn guided(&self) -> Channels {
        self.cfg_channels.unwrap_or(Channels::All)
    }

    /// An error where one of `flags` was given, which mean nothing to `whom`.
    fn refuse(whom: &str, flags: &[(&str, bool)]) -> tinyfusion::core::Result<()> {
        match flags.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Error::usage(format!("{flag} does nothing with {whom}"))),
            None => Ok(()),
        }
    }

    /// The guidance's entries in sample.json.
    fn report(&self, sampler: Sampler) -> Map<String, Value> {
        let mut all = Map::new();
        all.insert("sampler".into(), sampler.name().into());
        all.insert("cfg".into(), self.cfg.into());
        let channels = self.guided().to_possible_value();
        all.insert(
            "cfg_channels".into(),
            json!(channels.map(|v| v.get_name().to_owned())),
        );
        all
    }
}

impl Args {
    fn check(&self) -> tinyfusion::core::Result<()> {
        let usage = |what: String| Err(Error::usage(what));
        if self.count == 0
            || self.settings.steps == Some(0)
            || self.batch_size == 0
            || self.grid_columns == 0
        {
            return usage("count, steps, batch-size and grid-columns must be at least 1".into());
        }
        if self.count as u64 > MOST_IMAGES {
            return usage(format!(
                "count is {}, at most {MOST_IMAGES} at a time",
                self.count
            ));
        }
        let cfg = self.settings.cfg;
        if cfg < 0.0 {
            return usage(format!("cfg is {cfg}: guidance is 0 or more (1 is none)"));
        }
        Ok(())
    }
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default().and([&mut self.model]).and(&mut self.vae)
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    args.check()?;
    with_family!(Architecture::of(&args.model)?, draw(args, stop))
}

fn draw<F: Family>(args: &Args, stop: &Stop) -> Result<()> {
    let resources = Resources::start();
    let compute = args.compute.open()?;
    let model = Model::<F>::load_on(&args.model, &compute)?;
    let samples = model.samples();
    if args.settings.cfg != 1.0 && !samples.null_class {
        return Err(Error::usage(
            "the model was trained without a null class: guidance needs --cfg 1",
        )
        .into());
    }
    let vae = match &args.vae {
        Some(_) if samples.are_pixels => {
            return Err(
                Error::usage("the model draws images, not latents: leave out --vae").into(),
            );
        }
        Some(path) => Some(decoder(path, &samples, &compute.device)?.in_tiles(args.vae_tiles)),
        None => None,
    };
    let pixels = samples.are_pixels || vae.is_some();
    if args.pngs && !pixels {
        return Err(Error::usage("the model draws latents: --pngs needs --vae").into());
    }
    let classes = Classes::choose(&args.classes, &model.classes, samples.classes)?;
    let numbers = match &args.share {
        None => 0..args.count,
        Some(share) => share.of(args.count)?,
    };
    let drawing = F::drawing(&model, &args.settings)?;
    let mut settings = args.record(&classes, &numbers, &model.sha256, &*drawing);
    settings.insert(parts::DTYPE.into(), compute.numbers().into());
    if let Some(vae) = &vae {
        settings.insert("vae_sha256".into(), vae.sha256.clone().into());
        if args.vae_tiles {
            settings.insert("vae_tiles".into(), true.into());
        }
    }
    let _claim = Claim::take(&args.out)?;
    let done = finished::look(&args.out, &settings)?;
    let parts = Parts::open(&args.out, numbers.clone(), &settings)?;
    let files = write::Files {
        out: &args.out,
        parts: &parts,
        classes: &classes,
        numbers: numbers.clone(),
        grid_columns: pixels.then_some(args.grid_columns),
        pngs: args.pngs,
    };
    if let Some(record) = done {
        files.complete(record)?;
        return Ok(Parts::remove_from(&args.out)?);
    }
    // A solver that chooses its steps by an error over the whole batch would give each image those of its neighbours.
    let batch_size = drawing.steps().map_or(1, |_| args.batch_size);
    let batches = parts.missing(batch_size);
    let missing: usize = batches.iter().map(Range::len).sum();
    require_space(
        &args.out,
        (missing + numbers.len()) as u64 * bytes_of(&samples, vae.as_ref()),
        "for the parts and samples.npz: draw fewer, or a --share on each of several disks",
    )?;
    let units = batches.len() * drawing.steps().unwrap_or(1);
    let job = Job {
        seed: args.seed,
        classes: &classes,
        drawing: &*drawing,
        samples,
        vae: vae.as_ref(),
        progress: progress_bar("sample", units as u64),
        done: AtomicU64::new(0),
        stop,
    };
    let started = Instant::now();
    // Batches side by side, one a core: candle's own operations use one core each.
    Lanes::new(compute.lanes(batches.len()))?
        .on(&compute.device)
        .run(batches, |numbers| {
            let batch = job.batch(numbers.clone())?;
            parts.save(numbers, &batch)
        })?;
    let seconds = started.elapsed().as_secs_f64();
    job.progress.finish();
    files.write(settings, missing, seconds)?;
    resources.write(&args.out, None)?;
    Ok(parts.remove()?)
}

impl Args {
    /// What decides the images: sample.json has it, and parts of other settings are not mixed with these.
    fn record(
        &self,
        classes: &Classes,
        numbers: &Range<usize>,
        sha256: &str,
        drawing: &dyn Drawing,
    ) -> Map<String, Value> {
        let mut all = Map::new();
        all.insert("count".into(), numbers.len().into());
        all.insert("numbers".into(), json!([numbers.start, numbers.end]));
        all.insert("classes".into(), json!(classes.listed()));
        all.insert("seed".into(), self.seed.into());
        all.insert("model_sha256".into(), sha256.into());
        all.insert("grid_columns".into(), self.grid_columns.into());
        all.insert("pngs".into(), self.pngs.into());
        all.extend(drawing.report());
        // Of the way, not of the images: another one goes on with the same parts.
        all.insert("model".into(), json!(self.model));
        all.insert("batch_size".into(), self.batch_size.into());
        all
    }
}

struct Job<'a> {
    seed: u64,
    classes: &'a Classes,
    drawing: &'a dyn Drawing,
    samples: Samples,
    vae: Option<&'a Vae>,
    progress: Progress,
    done: AtomicU64,
    stop: &'a Stop,
}

impl Job<'_> {
    /// Some of the samples as (B, C, H, W): images in u8, latents in f32.
    fn batch(&self, numbers: Range<usize>) -> tinyfusion::core::Result<Tensor> {
        let images = Images {
            seed: self.seed,
            classes: numbers.clone().map(|i| self.classes.of(i)).collect(),
            numbers,
        };
        let advance = || {
            let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
            self.progress.set(done, String::new());
        };
        let counts_steps = self.drawing.steps().is_some();
        let on_step = || {
            if counts_steps {
                advance();
            }
            if self.stop.requested() {
                Err(Error::Stopped)
            } else {
                Ok(())
            }
        };
        let x = self.drawing.draw(&images, &on_step)?;
        if !counts_steps {
            advance();
        }
        let on_cpu = |x: Tensor| x.to_device(&Device::Cpu);
        match self.vae {
            Some(vae) => vae.images(&x),
            None if self.samples.are_pixels => to_uint8(&on_cpu(x)?),
            None => Ok(on_cpu(x)?),
        }
    }
}

/// Bytes that a sample takes on disk.
fn bytes_of(samples: &Samples, vae: Option<&Vae>) -> u64 {
    let (channels, size) = (samples.channels, samples.size);
    let bytes = match vae {
        Some(vae) => 3 * (size * vae.net.config().factor()).pow(2),
        None if samples.are_pixels => channels * size * size,
        None => 4 * channels * size * size,
    };
    bytes as u64
}

/// The autoencoder at `path`, if its latents are of the model's kind.
fn decoder(path: &Path, samples: &Samples, device: &Device) -> Result<Vae> {
    let vae = Vae::load(path, device)?;
    let channels = vae.net.config().latent_channels;
    if channels != samples.channels {
        return Err(Error::file(
            path,
            format!(
                "decodes latents of {channels} channels, the model draws {}",
                samples.channels
            ),
        )
        .into());
    }
    Ok(vae)
}
