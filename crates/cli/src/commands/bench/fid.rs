use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Device;
use serde_json::{Value, json};
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::Error;
use tinyfusion::fid::{
    self, FeatureMatrix, Gaussian, ImageSet, Inception, Npz, PrecisionRecallConfig, Provenance,
    StoredStatistics, Weights,
};

use super::turns::repeat;
use crate::output::say;
use crate::resources::peak_rss;

/// Repeat a part of `evaluate` on demand, on files that `xtask/python/fid_peer.py` prepares.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of the files
    folder: PathBuf,
    /// What to repeat
    task: Task,
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Task {
    /// Inception's features of images.npz
    Network,
    /// The distance between the statistics a.npz and b.npz
    Frechet,
    /// Precision and recall of samples.npz among reference.npz
    PrecisionRecall,
}

pub(super) fn run(args: &Args) -> Result<()> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads)
        .build_global()?;
    let folder = &args.folder;
    match args.task {
        Task::Network => network(folder)?,
        Task::Frechet => frechet(folder)?,
        Task::PrecisionRecall => precision_recall(folder)?,
    }
    Ok(say!("{}", json!({ "peak_rss_bytes": peak_rss() }))?)
}

fn network(folder: &Path) -> Result<()> {
    let net = {
        let weights = Weights::read(folder.join("weights.pth"))?;
        Inception::new(&weights)?
    };
    let images = ImageSet::open(folder.join("images.npz"))?;
    let provenance = Provenance::of(&images, "")?;
    let mut first = First::of(folder, "network");
    repeat(&Device::Cpu, || {
        let set = fid::extract(&net, &images, provenance.clone(), &|_| (), &|| false)?;
        let set = set.ok_or(Error::Stopped)?;
        first.keep(|| Ok(json!(set.pool()?.values())))
    })
}

fn frechet(folder: &Path) -> Result<()> {
    let read = |name: &str| {
        let path = folder.join(name);
        let stored = StoredStatistics::read(&mut Npz::open(&path)?)?;
        stored.ok_or_else(|| anyhow::Error::from(Error::file(&path, "has no mu and sigma")))
    };
    let (a, b) = (read("a.npz")?, read("b.npz")?);
    let mut first = First::of(folder, "frechet");
    repeat(&Device::Cpu, || {
        let [a, b] = [&a, &b].map(|s| Gaussian::from_statistics(&s.pool));
        let found = fid::frechet_distance(&a?, &b?)?;
        first.keep(|| Ok(json!([found.distance])))
    })
}

fn precision_recall(folder: &Path) -> Result<()> {
    let read = |name: &str| {
        let (shape, values) = Npz::open(folder.join(name))?.floats("arr_0")?;
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        Ok::<_, anyhow::Error>((shape, values))
    };
    let (reference, samples) = (read("reference.npz")?, read("samples.npz")?);
    let [a, b] = [&reference, &samples].map(|(shape, values)| match shape[..] {
        [rows, columns] => Ok(FeatureMatrix::new(values, rows, columns)?),
        _ => Err(anyhow::Error::from(Error::run(format!(
            "rows of {shape:?}"
        )))),
    });
    let (a, b) = (a?, b?);
    let mut first = First::of(folder, "precision-recall");
    repeat(&Device::Cpu, || {
        let found = fid::precision_recall(a, b, &PrecisionRecallConfig::default())?;
        first.keep(|| Ok(json!([found.precision, found.recall])))
    })
}

/// Writes the first result beside the files, for the other side to compare its own with.
struct First(Option<PathBuf>);

impl First {
    fn of(folder: &Path, task: &str) -> Self {
        Self(Some(folder.join(format!("ours-{task}.json"))))
    }

    fn keep(&mut self, result: impl FnOnce() -> Result<Value>) -> Result<()> {
        if let Some(path) = self.0.take() {
            let text = result()?.to_string();
            write_atomic(&path, |f| f.write_all(text.as_bytes()))?;
        }
        Ok(())
    }
}
