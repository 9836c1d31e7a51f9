use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use tinyfusion::core::{Error, LatentBatch};
use tinyfusion::data::shapes::{Shapes, ShapesConfig, Split};
use tinyfusion::data::{Augment, ImageFolder, Loader, PackedLatents, Source};

use crate::family::{Family, Model};

/// Seed of the image set `shapes`: one set, whatever the seed of a run.
pub(crate) const SHAPES_SEED: u64 = 0;

/// Most images that one command draws or judges: above it, a slip of the keyboard is likelier than a wish.
pub(crate) const MOST_IMAGES: u64 = 10_000_000;

/// The flag that says what a model is trained or judged on.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct DataOptions {
    /// `shapes` (the embedded set, the default), a packed .safetensors file, or a folder of images by class.
    /// Only `shapes` has a held-out part of its own; files and folders are taken as they are
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
}

impl DataOptions {
    pub(crate) fn name(&self) -> &str {
        self.data.as_deref().unwrap_or("shapes")
    }

    /// Whether the flag was given.
    pub(crate) fn is_given(&self) -> bool {
        self.data.is_some()
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

    /// The clean batch of every step.
    pub(crate) fn batches<F: Family>(
        &self,
        model: &Model<F>,
        split: Split,
        seed: u64,
        batch_size: usize,
    ) -> Result<impl FnMut(u64) -> tinyfusion::core::Result<LatentBatch> + Send + use<F>> {
        let mut loader = Loader::new(self.open(model, split)?, seed, batch_size)?;
        Ok(move |step| loader.batch(step))
    }
}
