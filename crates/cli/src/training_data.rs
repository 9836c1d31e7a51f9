use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Device;
use tinyfusion::core::{Error, LatentBatch};
use tinyfusion::data::shapes::{self, Shapes, ShapesConfig, Split};
use tinyfusion::data::{
    Augment, INDEX_FILE, ImageFolder, Loader, NpyLatents, PackedLatents, ShardedLatents, Source,
};
use tinyfusion::train::{Progress, Stop};

use crate::class_names::ClassNames;
use crate::family::{Family, Model};
use crate::output::progress_bar;

/// Seed of the image set `shapes`: one set, whatever the seed of a run.
pub(crate) const SHAPES_SEED: u64 = 0;

/// Most images that one command draws or judges: above it, a slip of the keyboard is likelier than a wish.
pub(crate) const MOST_IMAGES: u64 = 10_000_000;

/// The flag that says what a model is trained or judged on.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct DataOptions {
    /// `shapes` (the embedded set, the default), latents (a folder that `encode` wrote, a packed .safetensors file, or a folder
    /// of .npy files as fast-DiT writes it), or a folder of images by class. Only `shapes` has a held-out part of its own;
    /// files and folders are taken as they are
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
}

impl DataOptions {
    /// The flag's value, where it was given.
    pub(crate) fn origin(&mut self) -> &mut Option<String> {
        &mut self.data
    }

    pub(crate) fn name(&self) -> &str {
        self.data.as_deref().unwrap_or("shapes")
    }

    /// Whether the flag was given.
    pub(crate) fn is_given(&self) -> bool {
        self.data.is_some()
    }

    /// Names of its classes, where it has some.
    pub(crate) fn class_names(&self) -> Result<ClassNames> {
        Ok(match self.name() {
            "shapes" => ClassNames::listed(shapes::CLASSES),
            place => ClassNames::of_folder(Path::new(place))?,
        })
    }

    /// Opens the data and checks that it fits the model.
    pub(crate) fn open<F: Family>(
        &self,
        model: &Model<F>,
        split: Split,
    ) -> Result<Arc<dyn Source>> {
        let takes = model.samples();
        let source: Arc<dyn Source> = match self.name() {
            "shapes" => Arc::new(Shapes::new(ShapesConfig::default(), SHAPES_SEED, split)?),
            file if file.ends_with(".safetensors") => Arc::new(PackedLatents::open(file, None)?),
            folder if Path::new(folder).join(INDEX_FILE).exists() => {
                Arc::new(ShardedLatents::open(folder)?)
            }
            folder if NpyLatents::is_one(folder) => {
                Arc::new(NpyLatents::open(folder, takes.classes)?)
            }
            folder => Arc::new(ImageFolder::open(
                Path::new(folder),
                takes.size,
                Augment::HorizontalFlip,
            )?),
        };
        let wanted = [takes.channels, takes.size, takes.size];
        if source.shape() != wanted || source.classes() > takes.classes {
            return Err(Error::usage(format!(
                "{}: {:?} in {} classes, but the model at {} takes {wanted:?} in {} classes",
                self.name(),
                source.shape(),
                source.classes(),
                model.path.display(),
                takes.classes
            ))
            .into());
        }
        Ok(source)
    }

    /// The first `images` of the held-out part, under a progress bar called `what`; fewer where there are fewer.
    pub(crate) fn held_out<'a, F: Family>(
        &self,
        model: &Model<F>,
        images: u64,
        what: &str,
        stop: &'a Stop,
    ) -> Result<HeldOut<'a>> {
        if !(2..=MOST_IMAGES).contains(&images) {
            return Err(Error::usage(format!("images must be from 2 to {MOST_IMAGES}")).into());
        }
        let source = self.open(model, Split::HeldOut)?;
        let count = source.len().map_or(images, |n| n.min(images));
        if count < images {
            tracing::warn!(
                "{} has {count} images, fewer than the {images} asked for",
                self.name()
            );
        }
        Ok(HeldOut {
            source,
            count,
            progress: progress_bar(what, count),
            device: model.compute.device.clone(),
            stop,
        })
    }

    /// The clean batch of every step.
    pub(crate) fn batches<F: Family>(
        &self,
        model: &Model<F>,
        split: Split,
        seed: u64,
        batch_size: usize,
    ) -> Result<impl FnMut(u64) -> tinyfusion::core::Result<LatentBatch> + Send + use<F>> {
        let mut loader = Loader::new(self.open(model, split)?, seed, batch_size)?;
        let device = model.compute.device.clone();
        Ok(move |step| loader.batch(step)?.to_device(&device))
    }
}

/// Held-out images, read in order.
pub(crate) struct HeldOut<'a> {
    source: Arc<dyn Source>,
    /// How many there are.
    pub(crate) count: u64,
    progress: Progress,
    device: Device,
    stop: &'a Stop,
}

impl HeldOut<'_> {
    const BATCH: u64 = 128;

    /// The batches; a request to stop ends them with an error.
    pub(crate) fn batches(
        &self,
    ) -> impl Iterator<Item = tinyfusion::core::Result<LatentBatch>> + '_ {
        (0..self.count).step_by(Self::BATCH as usize).map(|start| {
            if self.stop.requested() {
                return Err(Error::Stopped);
            }
            self.progress.set(start, String::new());
            let end = (start + Self::BATCH).min(self.count);
            let batch = self.source.batch(&(start..end).collect::<Vec<_>>())?;
            batch.to_device(&self.device)
        })
    }

    /// All were read.
    pub(crate) fn finish(&self) {
        self.progress.finish();
    }
}
