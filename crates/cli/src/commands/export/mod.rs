mod card;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Device;
use clap::ValueEnum;
use serde_json::{Value, json};
use tinyfusion::checkpoint::{
    Checkpoint, DTypePolicy, Metadata, Provenance, Root, save, save_torch, write_atomic,
    write_folder,
};
use tinyfusion::core::{Error, StateDict};

use crate::class_names::ClassNames;
use crate::family::{Architecture, Family, Model, with_family};
use crate::hub::Inputs;
use crate::output::say;
use crate::source::DESCRIPTION;
use crate::vae::{self, CLASS, vae_folder};

use card::Card;

/// Write a model for other programs: a new folder with its weights and a model card.
///
/// diffusers    model_index.json, transformer/, scheduler/ (and vae/ with --vae): DiTPipeline.from_pretrained loads it.
///              Dense DiTs only
/// original     model.pt, a dictionary with the official names that torch.load reads; of a MAR checkpoint-last.pth,
///              which its code resumes from
/// safetensors  model.safetensors in the official names, which says in its header what it is
///
/// Each of them is a MODEL of this program again. The weights are those of the network, bit for bit, unless --dtype rounds
/// them.
///
/// Examples:
///   tinyfusion export runs/student/model out --format diffusers --vae sd-vae-ft-ema --license cc-by-nc-4.0
///   tinyfusion export training.pt#ema,family=dit out --format safetensors --dtype f16
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A model: PATH[#WORD[,WORD…]], see `tinyfusion inspect --help`
    model: PathBuf,
    /// Folder to write, which must not exist
    out: PathBuf,
    /// For whom
    #[arg(long, value_enum)]
    format: Format,
    /// Type of the stored weights
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// Folder of diffusers' AutoencoderKL, copied to vae/ (with --format diffusers); other files than one plain
    /// diffusion_pytorch_model.safetensors become that, in f32
    #[arg(long, value_name = "FOLDER")]
    vae: Option<PathBuf>,
    /// JSON of `tinyfusion evaluate --json`, shown in the card
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Licence in the card's header; a pruned model stays under that of its parent
    #[arg(long, value_name = "ID", default_value = "unknown", value_parser = hub_name)]
    license: String,
    /// Model on the hub that this one was made from, for the card's header
    #[arg(long, value_name = "OWNER/REPO", value_parser = hub_name)]
    base_model: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Diffusers,
    Original,
    Safetensors,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    fn policy(self) -> DTypePolicy {
        match self {
            Self::F32 => DTypePolicy::F32,
            Self::F16 => DTypePolicy::F16,
            Self::Bf16 => DTypePolicy::Bf16,
        }
    }
}

/// What can stand in the header of a card without quotes.
fn hub_name(text: &str) -> std::result::Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        Ok(text.into())
    } else {
        Err("letters, digits and ._/- are expected".into())
    }
}

/// A model of diffusers.
pub(crate) struct ForDiffusers {
    /// transformer/config.json
    pub(crate) config: Value,
    /// scheduler/scheduler_config.json
    pub(crate) scheduler: Value,
    pub(crate) weights: StateDict,
}

/// The file of the original code: its name, and the roots that its dictionary lies under.
pub(crate) struct ForOriginal {
    pub(crate) file: &'static str,
    pub(crate) roots: &'static [Root],
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.model])
            .and(&mut self.vae)
            .and(&mut self.metrics)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, export(args))
}

fn export<F: Family>(args: &Args) -> Result<()> {
    if args.out.exists() {
        return Err(Error::usage(format!(
            "{} exists; export writes a new folder",
            args.out.display()
        ))
        .into());
    }
    if args.vae.is_some() && args.format != Format::Diffusers {
        return Err(Error::usage("--vae goes with --format diffusers").into());
    }
    let vae = args.vae.as_deref().map(Autoencoder::open).transpose()?;
    let metrics = args.metrics.as_deref().map(json_of).transpose()?;
    let model = Model::<F>::load(&args.model)?;
    let sizes = serde_json::to_value(&model.config)?;
    let provenance = Provenance::of_command(super::command_line())
        .with_parent(&model.sha256, &model.provenance)
        .with_cut_of(&model.provenance);
    let card = Card {
        family: F::NAME,
        layout: model.layout(),
        parameters: model.weights.elem_count(),
        sizes: &sizes,
        samples: model.samples(),
        provenance: &provenance,
        metrics: metrics.as_ref(),
        license: &args.license,
        base_model: args.base_model.as_deref(),
    };
    let dtype = args.dtype.policy();
    let text = |value: &Value| format!("{value:#}\n");
    let write = |path: &Path, text: &str| write_atomic(path, |w| w.write_all(text.as_bytes()));
    match args.format {
        Format::Diffusers => {
            let theirs = F::for_diffusers(&model.config, &model.process, &model.weights)?;
            let readme = card.for_diffusers(vae.is_some());
            write_folder(&args.out, |folder| {
                let (transformer, scheduler) =
                    (folder.join("transformer"), folder.join("scheduler"));
                for inner in [&transformer, &scheduler] {
                    fs::create_dir(inner).map_err(|e| Error::file(inner, e))?;
                }
                // What diffusers and its relatives look for.
                let about = Metadata::from([("format".into(), "pt".into())]);
                let weights = transformer.join(THEIR_WEIGHTS);
                save(weights, &theirs.weights, &about, dtype)?;
                write(&transformer.join("config.json"), &text(&theirs.config))?;
                write(
                    &scheduler.join("scheduler_config.json"),
                    &text(&theirs.scheduler),
                )?;
                if let Some(vae) = &vae {
                    vae.write(&folder.join("vae"))?;
                }
                write(
                    &folder.join("model_index.json"),
                    &text(&pipeline(vae.is_some(), &model.classes)),
                )?;
                write(&folder.join("README.md"), &readme)
            })?;
        }
        Format::Original => {
            if sizes.get("widths").is_some() {
                return Err(Error::usage(format!(
                    "the original code of {} cannot hold a network cut in width; the format safetensors can",
                    F::NAME
                ))
                .into());
            }
            let ForOriginal { file, roots } = F::ORIGINAL;
            let readme = card.for_original(file, roots);
            write_folder(&args.out, |folder| {
                save_torch(folder.join(file), &model.weights, roots, dtype)?;
                write(&folder.join("README.md"), &readme)
            })?;
        }
        Format::Safetensors => {
            let mut about = model.description(&model.config)?;
            about["provenance"] = json!(provenance);
            let about = Metadata::from([(DESCRIPTION.into(), about.to_string())]);
            let readme = card.for_safetensors();
            write_folder(&args.out, |folder| {
                save(
                    folder.join("model.safetensors"),
                    &model.weights,
                    &about,
                    dtype,
                )?;
                write(&folder.join("README.md"), &readme)
            })?;
        }
    }
    Ok(say!(
        "{}: {} blocks, {} parameters",
        args.out.display(),
        model.depth(),
        model.weights.elem_count()
    )?)
}

/// What `DiTPipeline.from_pretrained` looks at first. A part that is not there has no class; the caller brings it.
fn pipeline(has_vae: bool, classes: &ClassNames) -> Value {
    let vae = if has_vae {
        json!(["diffusers", CLASS])
    } else {
        json!([null, null])
    };
    let mut all = json!({
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": vae,
    });
    if !classes.is_empty() {
        all["id2label"] = json!(classes);
    }
    all
}

/// diffusers' AutoencoderKL, as it will stand beside the exported model.
struct Autoencoder {
    config: PathBuf,
    weights: Checkpoint,
}

/// The name of a model's weights that every version of diffusers finds.
const THEIR_WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

impl Autoencoder {
    /// Looks at headers only.
    fn open(path: &Path) -> Result<Self> {
        let folder = vae_folder(path);
        let config = folder.join("config.json");
        let found = json_of(&config)?;
        let class = found.get("_class_name").and_then(Value::as_str);
        if class != Some(CLASS) {
            return Err(Error::file(
                config,
                format!(
                    "describes {}; a folder of diffusers' AutoencoderKL is expected",
                    class.unwrap_or("no class")
                ),
            )
            .into());
        }
        let weights = Checkpoint::open(&folder)?;
        // Whether they are what the config says.
        vae::recognised(&weights)?;
        Ok(Self { config, weights })
    }

    /// Copies it. Shards, half precision and pickles become the one file that diffusers looks for first, in f32.
    fn write(&self, to: &Path) -> tinyfusion::core::Result<()> {
        fs::create_dir(to).map_err(|e| Error::file(to, e))?;
        let copy = |from: &Path, name: &str| {
            fs::copy(from, to.join(name)).map_err(|e| Error::file(from, e))
        };
        copy(&self.config, "config.json")?;
        let files: Vec<&Path> = self.weights.files().collect();
        match files[..] {
            [file] if file.ends_with(THEIR_WEIGHTS) => copy(file, THEIR_WEIGHTS).map(drop),
            _ => {
                let root = self.weights.choose(None)?;
                let weights = self.weights.load(root, DTypePolicy::F32, &Device::Cpu)?;
                let about = Metadata::from([("format".into(), "pt".into())]);
                let to = to.join(THEIR_WEIGHTS);
                save(to, &weights.tensors, &about, DTypePolicy::F32).map(drop)
            }
        }
    }
}

fn json_of(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(|e| Error::file(path, e))?;
    Ok(
        serde_json::from_slice(&text)
            .map_err(|e| Error::file(path, format!("is not JSON: {e}")))?,
    )
}
