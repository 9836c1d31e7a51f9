use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::{Error, LatentQuery, Plan, StepRng, run as run_plan, stream};
use tinyfusion::data::{grid, to_uint8};
use tinyfusion::diffusion::samplers::{DdpmConfig, DpmSolverConfig, ddim, ddpm, dpm_solver_pp_2m};
use tinyfusion::diffusion::{
    Clip, DdimConfig, DiffusionConfig, GaussianDiffusion, Guidance, GuidedChannels, Respacing,
};
use tinyfusion::models::{DiT, DiTConfig};
use tinyfusion::train::{Progress, Stop};

use crate::model::DiTModel;
use crate::resources::Resources;
use crate::settings::finite;
use crate::training_data::MOST_IMAGES;

/// Draw images: samples.npz, a PNG grid and the speed.
///
/// Image i has class i mod K, and its noise depends on the seed and i alone: grids of different models
/// start from the same noise.
///
/// Example: tinyfusion sample assets/teacher runs/images --count 100 --sampler ddim --steps 50 --cfg 2.0
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Model directory
    model: PathBuf,
    /// Folder that gets samples.npz, grid.png and sample.json
    out: PathBuf,
    /// Images to draw
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// Sampler
    #[arg(long, value_enum, default_value_t = Sampler::Ddim)]
    sampler: Sampler,
    /// Sampling steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Randomness of DDIM (0 is deterministic)
    #[arg(long, default_value_t = 0.0, value_parser = finite)]
    eta: f64,
    /// Classifier-free guidance (1 is none)
    #[arg(long, default_value_t = 2.0, value_parser = finite)]
    cfg: f64,
    /// Channels that are guided: DiT on latents guides three of four
    #[arg(long, value_enum, default_value_t = Channels::All)]
    cfg_channels: Channels,
    /// Clamp estimates of the clean image to [-1, 1] (right for pixels, not for latents)
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    clip: bool,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Images drawn at a time, per core
    #[arg(long, default_value_t = 50)]
    batch_size: usize,
    /// Columns of the PNG grid, which shows at most ten rows
    #[arg(long, default_value_t = 10)]
    grid_columns: usize,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Sampler {
    Ddpm,
    Ddim,
    /// DPM-Solver++(2M)
    Dpm,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Channels {
    FirstThree,
    All,
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    if args.count == 0 || args.steps == 0 || args.batch_size == 0 || args.grid_columns == 0 {
        return Err(
            Error::usage("count, steps, batch-size and grid-columns must be at least 1").into(),
        );
    }
    if args.count as u64 > MOST_IMAGES {
        return Err(Error::usage(format!(
            "count is {}, at most {MOST_IMAGES} at a time",
            args.count
        ))
        .into());
    }
    let resources = Resources::start();
    let model = DiTModel::load(&args.model)?;
    if model.config.in_channels != 3 {
        return Err(Error::usage(format!(
            "{} draws latents of {} channels, and the decoder that turns them into images is not there yet",
            args.model.display(),
            model.config.in_channels
        ))
        .into());
    }
    if args.cfg != 1.0 && model.config.class_dropout_prob == 0.0 {
        return Err(Error::usage(
            "the model was trained without a null class: guidance needs --cfg 1",
        )
        .into());
    }
    let respacing: Respacing = match args.sampler {
        Sampler::Ddpm | Sampler::Dpm => args.steps.to_string(),
        Sampler::Ddim => format!("ddim{}", args.steps),
    }
    .parse()?;
    let process = DiffusionConfig {
        respacing,
        ..model.diffusion.clone()
    };
    let job = Job {
        args,
        net: model.network()?,
        config: &model.config,
        model_sha256: &model.sha256,
        process: GaussianDiffusion::new(process)?,
        progress: Progress::new(
            "sample",
            (args.count.div_ceil(args.batch_size) * args.steps) as u64,
        ),
        done: std::sync::atomic::AtomicU64::new(0),
        stop,
    };
    let started = Instant::now();
    let batches: Vec<usize> = (0..args.count).step_by(args.batch_size).collect();
    // Batches side by side, one a core: candle's own operations use one core each.
    let images: Vec<Tensor> = batches
        .par_iter()
        .map(|&start| job.draw(start, (start + args.batch_size).min(args.count)))
        .collect::<tinyfusion::core::Result<_>>()?;
    let seconds = started.elapsed().as_secs_f64();
    job.progress.finish();
    let images = Tensor::cat(&images, 0)?; // (N, C, H, W) u8
    write(args, &job, &images, seconds)?;
    resources.write(&args.out, None)
}

struct Job<'a> {
    args: &'a Args,
    net: DiT,
    config: &'a DiTConfig,
    model_sha256: &'a str,
    process: GaussianDiffusion,
    progress: Progress,
    done: std::sync::atomic::AtomicU64,
    stop: &'a Stop,
}

impl Job<'_> {
    fn class(&self, image: usize) -> u32 {
        (image % self.config.num_classes) as u32
    }

    /// The images start..end as (B, C, H, W) u8.
    fn draw(&self, start: usize, end: usize) -> tinyfusion::core::Result<Tensor> {
        let (c, dev, args) = (self.config, &Device::Cpu, self.args);
        let shape = (1, c.in_channels, c.input_size, c.input_size);
        let mut rngs: Vec<StepRng> = (start..end)
            .map(|i| StepRng::new(args.seed, i as u64, stream::SAMPLE))
            .collect();
        let mut noise = |_: usize| -> tinyfusion::core::Result<Tensor> {
            let each = rngs
                .iter_mut()
                .map(|r| r.normal(shape, dev))
                .collect::<tinyfusion::core::Result<Vec<_>>>()?;
            Ok(Tensor::cat(&each, 0)?) // (B, C, H, W)
        };
        let classes: Vec<u32> = (start..end).map(|i| self.class(i)).collect();
        let plan = Plan::full(c.depth);
        let ask = |x: &Tensor, t: &Tensor, y: &[u32]| -> tinyfusion::core::Result<Tensor> {
            let query = LatentQuery {
                x: x.clone(),
                t: t.clone(),
                y: Tensor::new(y, dev)?,
            };
            Ok(run_plan(&self.net, &query, &plan)?.output)
        };
        let guidance = Guidance {
            scale: args.cfg,
            channels: match args.cfg_channels {
                Channels::FirstThree => GuidedChannels::FirstThree,
                Channels::All => GuidedChannels::All,
            },
        };
        let mut doubled = classes.clone();
        doubled.resize(2 * classes.len(), c.num_classes as u32);
        let denoise = |x: &Tensor, t: &Tensor| {
            if args.cfg == 1.0 {
                ask(x, t, &classes)
            } else {
                guidance.guide(x, t, |x, t| ask(x, t, &doubled))
            }
        };
        let on_step = |_: &tinyfusion::diffusion::samplers::Step<'_>| {
            let done = self.done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            self.progress.set(done, String::new());
            if self.stop.requested() {
                Err(Error::Stopped)
            } else {
                Ok(())
            }
        };
        let clip = if args.clip { Clip::Unit } else { Clip::Off };
        let z = noise(0)?;
        let x = match args.sampler {
            Sampler::Ddpm => ddpm(
                &self.process,
                DdpmConfig { clip },
                &z,
                denoise,
                noise,
                on_step,
            )?,
            Sampler::Ddim => ddim(
                &self.process,
                DdimConfig {
                    eta: args.eta,
                    clip,
                },
                &z,
                denoise,
                noise,
                on_step,
            )?,
            Sampler::Dpm => dpm_solver_pp_2m(
                &self.process,
                DpmSolverConfig { clip },
                &z,
                denoise,
                on_step,
            )?,
        };
        to_uint8(&x)
    }
}

fn write(args: &Args, job: &Job<'_>, images: &Tensor, seconds: f64) -> Result<()> {
    let out = &args.out;
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, e))?;
    let labels: Vec<i64> = (0..args.count).map(|i| i64::from(job.class(i))).collect();
    let labels = Tensor::from_vec(labels, args.count, &Device::Cpu)?;
    let nhwc = images.permute((0, 2, 3, 1))?.contiguous()?; // (N, H, W, C)
    write_npz(
        &out.join("samples.npz"),
        &[("arr_0", &nhwc), ("arr_1", &labels)],
    )?;
    let shown = images.narrow(0, 0, args.count.min(args.grid_columns.saturating_mul(10)))?;
    let picture = grid(&shown, args.grid_columns, 1)?;
    write_atomic(out.join("grid.png"), |f| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, image::ImageFormat::Png)
            .map_err(std::io::Error::other)?;
        f.write_all(bytes.get_ref())
    })?;
    let report = json!({
        "count": args.count,
        "seconds": seconds,
        "images_per_second": args.count as f64 / seconds,
        "steps": args.steps,
        "sampler": format!("{:?}", args.sampler).to_lowercase(),
        "eta": args.eta,
        "cfg": args.cfg,
        "cfg_channels": format!("{:?}", args.cfg_channels),
        "clip": args.clip,
        "seed": args.seed,
        "model_sha256": job.model_sha256,
    });
    write_atomic(out.join("sample.json"), |f| {
        f.write_all(format!("{report:#}\n").as_bytes())
    })?;
    println!(
        "{}: {} images, {:.1} a second",
        out.display(),
        args.count,
        args.count as f64 / seconds
    );
    Ok(())
}

/// An .npz under its final name only when it is whole.
fn write_npz(path: &Path, arrays: &[(&str, &Tensor)]) -> Result<()> {
    // candle writes to a path of its own; the bytes then go the way of every other file.
    let folder = path.parent().unwrap_or(Path::new("."));
    let scratch = tempfile::Builder::new()
        .prefix(".samples-")
        .suffix(".partial")
        .tempfile_in(folder)
        .map_err(|e| Error::file(folder, e))?;
    Tensor::write_npz(arrays, scratch.path()).map_err(|e| Error::file(path, e))?;
    scratch
        .as_file()
        .sync_all()
        .map_err(|e| Error::file(path, e))?;
    scratch
        .persist(path)
        .map_err(|e| Error::file(path, e.error))?;
    Ok(())
}
