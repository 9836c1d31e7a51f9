use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use tinyfusion::core::{Error, LatentBatch};
use tinyfusion::data::shapes::{Shapes, ShapesConfig, Split};
use tinyfusion::data::{Augment, ImageFolder, Loader, PackedLatents, Source};
use tinyfusion::diffusion::{DenoisingObjective, GaussianDiffusion, LabelDrop};

use crate::model::DiTModel;

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

    /// Opens the data and checks that it fits the model.
    pub(crate) fn open(&self, model: &DiTModel, split: Split) -> Result<Arc<dyn Source>> {
        let c = &model.config;
        let source: Arc<dyn Source> = match self.name() {
            "shapes" => Arc::new(Shapes::new(ShapesConfig::default(), SHAPES_SEED, split)?),
            file if file.ends_with(".safetensors") => Arc::new(PackedLatents::open(file, None)?),
            folder => Arc::new(ImageFolder::open(
                Path::new(folder),
                c.input_size,
                Augment::HorizontalFlip,
            )?),
        };
        let wanted = [c.in_channels, c.input_size, c.input_size];
        if source.shape() != wanted || source.classes() > c.num_classes {
            return Err(Error::usage(format!(
                "{}: {:?} in {} classes, but the model at {} takes {wanted:?} in {} classes",
                self.name(),
                source.shape(),
                source.classes(),
                model.path.display(),
                c.num_classes
            ))
            .into());
        }
        Ok(source)
    }

    /// The clean batch of every step.
    pub(crate) fn batches(
        &self,
        model: &DiTModel,
        split: Split,
        seed: u64,
        batch_size: usize,
    ) -> Result<impl FnMut(u64) -> tinyfusion::core::Result<LatentBatch> + Send + use<>> {
        let mut loader = Loader::new(self.open(model, split)?, seed, batch_size)?;
        Ok(move |step| loader.batch(step))
    }
}

/// The model's own training problem.
pub(crate) fn objective(model: &DiTModel) -> Result<DenoisingObjective> {
    let drop = LabelDrop {
        num_classes: model.config.num_classes as u32,
        probability: model.config.class_dropout_prob,
    };
    Ok(DenoisingObjective::new(
        GaussianDiffusion::new(model.diffusion.clone())?,
        drop,
    )?)
}

/// The same without dropped labels, for held-out losses.
pub(crate) fn held_out_objective(model: &DiTModel) -> Result<DenoisingObjective> {
    let drop = LabelDrop {
        num_classes: model.config.num_classes as u32,
        probability: 0.0,
    };
    Ok(DenoisingObjective::new(
        GaussianDiffusion::new(model.diffusion.clone())?,
        drop,
    )?)
}
