//! The one enum over model families: a command asks [`Architecture::of`] what it was given, and is generic below.

mod dit;
mod mar;
mod sit;

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tinyfusion::checkpoint::{DTypePolicy, Provenance, block_of, save_model_dir_with};
use tinyfusion::core::{
    BlockLayout, BlockStack, Error, LatentBatch, ParamSpec, StateDict, WidthGroups,
};
use tinyfusion::diffusion::TimestepObjective;

pub(crate) use dit::Dit;
pub(crate) use mar::MaskedAutoregressive;
pub(crate) use sit::Sit;

use crate::class_names::{self, ClassNames};
use crate::commands::export::{ForDiffusers, ForOriginal};
use crate::commands::sample::{Drawing, Settings};
use crate::compute::Compute;
use crate::model::{make_parent, section};
use crate::source::Source;

/// What the commands need to know of a model family.
pub(crate) trait Family: Sized + 'static {
    /// Its name in config.json.
    const NAME: &'static str;
    /// The key of its process there, where it has settings of its own.
    const PROCESS: Option<&'static str>;
    /// How the names of the tensors of each stage's blocks begin: `blocks` for `blocks.3.…`.
    const STAGES: &'static [&'static str];
    /// Weight of the hidden states at the first step of distillation (β).
    const BETA: f64;
    /// The file that its original code loads.
    const ORIGINAL: ForOriginal;
    /// Sizes of the network.
    type Config: Clone + Serialize + DeserializeOwned + Sync;
    /// The process that it was trained under.
    type Process: Clone + Default + PartialEq + Serialize + DeserializeOwned + Sync;
    type Net: BlockStack + Send + Sync;
    type Objective: TimestepObjective<Self::Net, Batch = LatentBatch> + Sync;

    /// Checks the sizes, the process, and that they go together.
    fn validate(config: &Self::Config, process: &Self::Process) -> tinyfusion::core::Result<()>;
    /// Every tensor of the network, of sizes that were checked.
    fn params(config: &Self::Config) -> Vec<ParamSpec>;
    /// Fresh weights.
    fn init(
        config: &Self::Config,
        seed: u64,
        device: &Device,
    ) -> tinyfusion::core::Result<StateDict>;
    /// Whether a tensor is a fixed table.
    fn is_fixed(name: &str) -> bool;
    fn layout(config: &Self::Config) -> BlockLayout;
    /// What it draws.
    fn samples(config: &Self::Config) -> Samples;
    /// Sizes of what a teacher's output is compared by, beside what it draws.
    fn outputs(config: &Self::Config) -> Vec<usize>;
    /// Widths of the hidden states, stage by stage.
    fn widths(config: &Self::Config) -> Vec<usize>;
    /// Sizes and weights with only the blocks `kept`.
    fn keep(
        config: &Self::Config,
        weights: &StateDict,
        kept: &[usize],
    ) -> tinyfusion::core::Result<(Self::Config, StateDict)>;
    /// Where it can be narrowed: heads and hidden channels of every block.
    fn width_groups(config: &Self::Config) -> Vec<WidthGroups>;
    /// Sizes and weights with only the groups `kept` of each of its width groups.
    fn narrow(
        config: &Self::Config,
        weights: &StateDict,
        kept: &[Vec<usize>],
    ) -> tinyfusion::core::Result<(Self::Config, StateDict)>;
    /// The network, whose blocks compute in `dtype`; `lora` scales low-rank tensors that stand beside the weights (0: there
    /// are none).
    fn network(
        config: &Self::Config,
        weights: &StateDict,
        lora: f64,
        recompute: bool,
        dtype: DType,
    ) -> tinyfusion::core::Result<Self::Net>;
    /// The same network as a teacher, which drops nothing when its student does.
    fn as_teacher(net: Self::Net) -> Self::Net {
        net
    }
    /// Its own training problem; held out, nothing is dropped.
    fn objective(
        config: &Self::Config,
        process: &Self::Process,
        held_out: bool,
    ) -> tinyfusion::core::Result<Self::Objective>;
    /// The same as a model of diffusers, where that has a class for it.
    fn for_diffusers(
        _config: &Self::Config,
        _process: &Self::Process,
        _weights: &StateDict,
    ) -> tinyfusion::core::Result<ForDiffusers> {
        Err(Error::usage(format!(
            "diffusers has no class for a {}; the formats original and safetensors can hold it",
            Self::NAME
        )))
    }
    /// How it draws.
    fn drawing<'a>(model: &'a Model<Self>, settings: &'a Settings)
    -> Result<Box<dyn Drawing + 'a>>;
}

/// What a model draws: (C, H, W) values of K classes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Samples {
    pub(crate) channels: usize,
    pub(crate) size: usize,
    pub(crate) classes: usize,
    /// Whether it learned a null class, which guidance needs.
    pub(crate) null_class: bool,
    /// Whether they are images, and not latents.
    pub(crate) are_pixels: bool,
}

impl std::fmt::Display for Samples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            channels,
            size,
            classes,
            null_class,
            ..
        } = self;
        let null = if *null_class { "with" } else { "without" };
        write!(
            f,
            "{channels}×{size}×{size} of {classes} classes ({null} a null class)"
        )
    }
}

/// The families by name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Architecture {
    Dit,
    Sit,
    Mar,
}

impl Architecture {
    const ALL: [(&'static str, Self); 3] = [
        (Dit::NAME, Self::Dit),
        (Sit::NAME, Self::Sit),
        (MaskedAutoregressive::NAME, Self::Mar),
    ];

    /// What the model at an address is, a model directory or any checkpoint that is recognised.
    pub(crate) fn of(address: &Path) -> Result<Self> {
        let config = Source::open(address)?.config;
        match Self::named(&config) {
            Some(found) => Ok(found),
            None => {
                let known: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
                let found = config.get("architecture").cloned().unwrap_or_default();
                Err(Error::file(
                    address,
                    format!(
                        "config.json describes the architecture {found}; a model directory of {} is expected",
                        known.join(", ")
                    ),
                )
                .into())
            }
        }
    }

    /// The family that a `config.json` names, if it is one of these.
    pub(crate) fn named(config: &Value) -> Option<Self> {
        let name = config.get("architecture")?.as_str()?;
        let (_, found) = Self::ALL.iter().find(|(known, _)| *known == name)?;
        Some(*found)
    }
}

/// Calls `function::<F>(…)` with the family F of an [`Architecture`].
macro_rules! with_family {
    ($architecture:expr, $function:ident($($argument:expr),*)) => {
        match $architecture {
            $crate::family::Architecture::Dit => $function::<$crate::family::Dit>($($argument),*),
            $crate::family::Architecture::Sit => $function::<$crate::family::Sit>($($argument),*),
            $crate::family::Architecture::Mar => {
                $function::<$crate::family::MaskedAutoregressive>($($argument),*)
            }
        }
    };
}
pub(crate) use with_family;

/// A diffusion transformer from a model directory, with the process it was trained under.
pub(crate) struct Model<F: Family> {
    pub(crate) config: F::Config,
    pub(crate) process: F::Process,
    /// Names of the classes.
    pub(crate) classes: ClassNames,
    pub(crate) weights: StateDict,
    /// Hash of the weight file.
    pub(crate) sha256: String,
    pub(crate) path: PathBuf,
    /// Where it came from.
    pub(crate) provenance: Provenance,
    /// Where its weights are, and what its blocks compute in.
    pub(crate) compute: Compute,
}

/// What the benchmarks run.
pub(crate) type DiTModel = Model<Dit>;

impl<F: Family> Model<F> {
    /// Reads the model at an address, its weights in f32 on the CPU.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        Self::load_on(path, &Compute::on_cpu())
    }

    /// As [`load`](Self::load), onto a device.
    pub(crate) fn load_on(path: &Path, compute: &Compute) -> Result<Self> {
        let loaded = Source::open(path)?.load(&compute.device)?;
        let (config, process, classes) = described::<F>(path, &loaded.config)?;
        let provenance = loaded.provenance.clone();
        let sha256 = loaded.weights.sha256.clone();
        let weights = loaded.checked(&F::params(&config))?.weights.tensors;
        Ok(Self {
            config,
            process,
            classes,
            weights,
            sha256,
            path: path.to_path_buf(),
            provenance,
            compute: compute.clone(),
        })
    }

    /// A model that is about to be trained from nothing in the folder `path`.
    pub(crate) fn fresh(
        path: &Path,
        config: F::Config,
        process: F::Process,
        classes: ClassNames,
        weights: StateDict,
        compute: &Compute,
    ) -> Self {
        Self {
            compute: compute.clone(),
            config,
            process,
            classes,
            weights,
            sha256: String::new(),
            path: path.to_path_buf(),
            provenance: Provenance::default(),
        }
    }

    /// The network on this model's own weights; records nothing and drops nothing.
    pub(crate) fn network(&self) -> Result<F::Net> {
        let dtype = self.compute.dtype;
        let weights = in_type(&self.weights, dtype)?;
        let net = F::network(&self.config, &weights, 0.0, false, dtype)?;
        Ok(F::as_teacher(net))
    }

    /// Its own training problem.
    pub(crate) fn objective(&self) -> Result<F::Objective> {
        Ok(F::objective(&self.config, &self.process, false)?)
    }

    pub(crate) fn layout(&self) -> BlockLayout {
        F::layout(&self.config)
    }

    pub(crate) fn depth(&self) -> usize {
        self.layout().depth()
    }

    /// The block that a weight belongs to, counted over all stages, if it belongs to one.
    pub(crate) fn block_of(&self, name: &str) -> Option<usize> {
        let layout = self.layout();
        F::STAGES
            .iter()
            .zip(layout.ranges())
            .find_map(|(prefix, blocks)| Some(blocks.start + block_of(name, prefix)?))
    }

    pub(crate) fn samples(&self) -> Samples {
        F::samples(&self.config)
    }

    /// Writes a model directory of this family and process.
    pub(crate) fn save(
        &self,
        path: &Path,
        weights: &StateDict,
        provenance: &Provenance,
        dtype: DTypePolicy,
        beside: &[(&str, String)],
    ) -> Result<()> {
        let about = self.description(&self.config)?;
        save(path, &about, weights, provenance, dtype, beside)
    }

    /// What `config.json` says beside provenance of a network of other sizes, else like this one.
    pub(crate) fn description(&self, config: &F::Config) -> Result<Value> {
        description::<F>(config, &self.process, &self.classes)
    }
}

/// Linear layers in the type that a network computes in: once, and not at every pass.
fn in_type(weights: &StateDict, dtype: DType) -> tinyfusion::core::Result<StateDict> {
    let is_matrix = |t: &Tensor| t.rank() == 2;
    let cast = |(name, t): (&str, &Tensor)| {
        let weight = name.strip_suffix(".bias").map(|of| format!("{of}.weight"));
        let is_bias = weight.and_then(|w| weights.get(&w)).is_some_and(is_matrix);
        // Norms compute in f32, and so does all of MAR's denoiser.
        let rounds = (is_matrix(t) || is_bias) && !name.starts_with("diffloss.");
        let dtype = if rounds { dtype } else { t.dtype() };
        Ok((name.to_string(), t.to_dtype(dtype)?))
    };
    weights.iter().map(cast).collect()
}

/// Writes a model directory that `about` describes, with other files (name, text) in it.
pub(crate) fn save(
    path: &Path,
    about: &Value,
    weights: &StateDict,
    provenance: &Provenance,
    dtype: DTypePolicy,
    beside: &[(&str, String)],
) -> Result<()> {
    make_parent(path)?;
    save_model_dir_with(path, weights, about, provenance, dtype, beside)?;
    Ok(())
}

/// What `config.json` says beside provenance.
pub(crate) fn description<F: Family>(
    config: &F::Config,
    process: &F::Process,
    classes: &ClassNames,
) -> Result<Value> {
    let mut all = Map::new();
    all.insert("architecture".into(), F::NAME.into());
    all.insert("model".into(), serde_json::to_value(config)?);
    if let Some(key) = F::PROCESS {
        all.insert(key.into(), serde_json::to_value(process)?);
    }
    if !classes.is_empty() {
        all.insert(class_names::KEY.into(), serde_json::to_value(classes)?);
    }
    Ok(Value::Object(all))
}

/// The sizes, the process and the names of the classes that a `config.json` describes, checked.
fn described<F: Family>(
    path: &Path,
    config: &Value,
) -> Result<(F::Config, F::Process, ClassNames)> {
    let sizes: F::Config = section(path, config, F::NAME, "model")?;
    // A process under a mistyped name would be taken for none, and its default for what the model was trained under.
    let known = ["architecture", "model", class_names::KEY]
        .into_iter()
        .chain(F::PROCESS);
    let known: Vec<&str> = known.collect();
    if let Some(key) = config
        .as_object()
        .and_then(|all| all.keys().find(|key| !known.contains(&key.as_str())))
    {
        return Err(Error::file(
            path,
            format!(
                "config.json: a {} has no `{key}`; its keys are {}, provenance and weights",
                F::NAME,
                known.join(", ")
            ),
        )
        .into());
    }
    let process = entry(path, config, F::PROCESS)?;
    let classes = entry(path, config, Some(class_names::KEY))?;
    F::validate(&sizes, &process).map_err(|e| Error::file(path, format!("config.json: {e}")))?;
    Ok((sizes, process, classes))
}

/// An entry that may be left out.
fn entry<T: Default + DeserializeOwned>(
    path: &Path,
    config: &Value,
    key: Option<&str>,
) -> Result<T> {
    match key.and_then(|key| Some((key, config.get(key)?))) {
        None => Ok(T::default()),
        Some((key, value)) => Ok(serde_json::from_value(value.clone())
            .map_err(|e| Error::file(path, format!("config.json: {key}: {e}")))?),
    }
}

/// The tensors of the network that a `config.json` of this family describes.
pub(crate) fn expected<F: Family>(path: &Path, config: &Value) -> Result<Vec<ParamSpec>> {
    Ok(F::params(&described::<F>(path, config)?.0))
}
