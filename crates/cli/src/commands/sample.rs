use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::{Error, LatentQuery, Plan, StepRng, run as run_plan, stream};
use tinyfusion::data::{grid, to_uint8};
use tinyfusion::diffusion::samplers::{DdpmConfig, DpmSolverConfig, ddim, ddpm, dpm_solver_pp_2m};
use tinyfusion::diffusion::{
    Clip, DdimConfig, DiffusionConfig, GaussianDiffusion, Guidance, GuidedChannels, Respacing,
};
use tinyfusion::models::DiT;
use tinyfusion::nn::Lanes;
use tinyfusion::train::{Progress, Stop};

use crate::model::DiTModel;
use crate::output::{progress_bar, say};
use crate::resources::Resources;
use crate::settings::finite;
use crate::training_data::MOST_IMAGES;

/// Draw images: samples.npz, a PNG grid and the speed.
///
/// Image i has class i mod K, and its noise depends on the seed and i alone: grids of different models
/// start from the same noise. A model of latents gives its latents, (N, C, H, W) f32, and no grid.
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
    /// Sampling steps: every k-th timestep for DDIM, an even spread for the others [default: 50]
    #[arg(long)]
    steps: Option<usize>,
    /// Which timesteps are visited, in place of --steps: "250" (an even spread), "10,20,30" (so many in each of
    /// three sections), "ddim50" (every k-th) or "" (all)
    #[arg(long, value_name = "TEXT", conflicts_with = "steps")]
    respacing: Option<Respacing>,
    /// Randomness of DDIM, from 0 (deterministic, the default) to 1 (as much as DDPM's)
    #[arg(long, value_parser = finite)]
    eta: Option<f64>,
    /// Classifier-free guidance (1 is none, 0 ignores the class)
    #[arg(long, default_value_t = 2.0, value_parser = finite)]
    cfg: f64,
    /// Channels that are guided: DiT on latents guides three of four
    #[arg(long, value_enum, default_value_t = Channels::All)]
    cfg_channels: Channels,
    /// Clamp estimates of the clean image to [-1, 1] (right, and the default, for pixels but not for latents)
    #[arg(long)]
    clip: Option<bool>,
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

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
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

impl Args {
    fn check(&self) -> tinyfusion::core::Result<()> {
        let usage = |what: String| Err(Error::usage(what));
        if self.count == 0
            || self.steps == Some(0)
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
        if self.cfg < 0.0 {
            return usage(format!(
                "cfg is {}: guidance is 0 or more (1 is none)",
                self.cfg
            ));
        }
        match self.eta {
            Some(_) if self.sampler != Sampler::Ddim => {
                usage("eta is DDIM's: it does nothing with another --sampler".into())
            }
            Some(eta) if !(0.0..=1.0).contains(&eta) => {
                usage(format!("eta is {eta}, expected a number from 0 to 1"))
            }
            _ => Ok(()),
        }
    }

    /// The timesteps to visit of a chain of `trained`.
    fn respacing(&self, trained: usize) -> tinyfusion::core::Result<Respacing> {
        if let Some(respacing) = &self.respacing {
            respacing.timesteps(trained)?;
            return Ok(respacing.clone());
        }
        let steps = self.steps.unwrap_or(50);
        if steps > trained {
            return Err(Error::usage(format!(
                "steps is {steps}, but the model was trained on {trained} timesteps: pass at most that many"
            )));
        }
        if self.sampler != Sampler::Ddim {
            return Ok(Respacing::Sections(vec![steps]));
        }
        let strided = Respacing::Ddim(steps);
        if strided.timesteps(trained).is_err() {
            let possible = (1..=trained).map(|stride| trained.div_ceil(stride));
            let nearest = possible.min_by_key(|n| n.abs_diff(steps)).unwrap_or(1);
            return Err(Error::usage(format!(
                "DDIM visits every k-th of {trained} timesteps, and no k gives {steps} of them: pass --respacing {steps} \
                 for an even spread, or --steps {nearest}"
            )));
        }
        Ok(strided)
    }
}

pub(crate) fn run(args: &Args, stop: &Stop) -> Result<()> {
    args.check()?;
    let resources = Resources::start();
    let model = DiTModel::load(&args.model)?;
    if args.cfg != 1.0 && model.config.class_dropout_prob == 0.0 {
        return Err(Error::usage(
            "the model was trained without a null class: guidance needs --cfg 1",
        )
        .into());
    }
    let process = GaussianDiffusion::new(DiffusionConfig {
        respacing: args.respacing(model.diffusion.steps)?,
        ..model.diffusion.clone()
    })?;
    let pixels = model.config.in_channels == 3;
    let job = Job {
        args,
        net: model.network()?,
        model: &model,
        progress: progress_bar(
            "sample",
            (args.count.div_ceil(args.batch_size) * process.num_timesteps()) as u64,
        ),
        process,
        pixels,
        clip: args.clip.unwrap_or(pixels),
        done: std::sync::atomic::AtomicU64::new(0),
        stop,
    };
    let started = Instant::now();
    let batches: Vec<usize> = (0..args.count).step_by(args.batch_size).collect();
    // Batches side by side, one a core: candle's own operations use one core each.
    let samples = Lanes::new(batches.len())?.run(batches, |start| {
        job.draw(start, (start + args.batch_size).min(args.count))
    })?;
    let seconds = started.elapsed().as_secs_f64();
    job.progress.finish();
    write(&job, &Tensor::cat(&samples, 0)?, seconds)?; // (N, C, H, W)
    resources.write(&args.out, None)
}

struct Job<'a> {
    args: &'a Args,
    net: DiT,
    model: &'a DiTModel,
    process: GaussianDiffusion,
    /// Whether the model draws images, and not latents.
    pixels: bool,
    clip: bool,
    progress: Progress,
    done: std::sync::atomic::AtomicU64,
    stop: &'a Stop,
}

impl Job<'_> {
    fn class(&self, image: usize) -> u32 {
        (image % self.model.config.num_classes) as u32
    }

    /// The samples start..end as (B, C, H, W): images in u8, latents in f32.
    fn draw(&self, start: usize, end: usize) -> tinyfusion::core::Result<Tensor> {
        let (c, dev, args) = (&self.model.config, &Device::Cpu, self.args);
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
        let clip = if self.clip { Clip::Unit } else { Clip::Off };
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
                    eta: args.eta.unwrap_or(0.0),
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
        if self.pixels { to_uint8(&x) } else { Ok(x) }
    }
}

fn write(job: &Job<'_>, samples: &Tensor, seconds: f64) -> Result<()> {
    let args = job.args;
    let out = &args.out;
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, e))?;
    let labels: Vec<i64> = (0..args.count).map(|i| i64::from(job.class(i))).collect();
    let labels = Tensor::from_vec(labels, args.count, &Device::Cpu)?;
    let array = if job.pixels {
        samples.permute((0, 2, 3, 1))?.contiguous()? // (N, H, W, C)
    } else {
        samples.clone() // (N, C, H, W)
    };
    write_npz(
        &out.join("samples.npz"),
        &[("arr_0", &array), ("arr_1", &labels)],
    )?;
    if job.pixels {
        let shown = samples.narrow(0, 0, args.count.min(args.grid_columns.saturating_mul(10)))?;
        let picture = grid(&shown, args.grid_columns, 1)?;
        write_atomic(out.join("grid.png"), |f| {
            let mut bytes = std::io::Cursor::new(Vec::new());
            picture
                .write_to(&mut bytes, image::ImageFormat::Png)
                .map_err(std::io::Error::other)?;
            f.write_all(bytes.get_ref())
        })?;
    }
    let report = json!({
        "count": args.count,
        "seconds": seconds,
        "images_per_second": args.count as f64 / seconds,
        "steps": job.process.num_timesteps(),
        "respacing": job.process.config().respacing,
        "sampler": format!("{:?}", args.sampler).to_lowercase(),
        "eta": args.eta.unwrap_or(0.0),
        "cfg": args.cfg,
        "cfg_channels": args.cfg_channels.to_possible_value().map(|v| v.get_name().to_owned()),
        "clip": job.clip,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "grid_columns": args.grid_columns,
        "model": args.model,
        "model_sha256": job.model.sha256,
    });
    write_atomic(out.join("sample.json"), |f| {
        f.write_all(format!("{report:#}\n").as_bytes())
    })?;
    let what = if job.pixels {
        "images".to_string()
    } else {
        // Nothing in this program turns latents into pictures.
        format!("latents of {} channels (no grid)", samples.dim(1)?)
    };
    Ok(say!(
        "{}: {} {what}, {:.1} a second",
        out.display(),
        args.count,
        args.count as f64 / seconds
    )?)
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
