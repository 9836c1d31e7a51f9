use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tinyfusion::checkpoint::{
    Checkpoint, Format, Inspection, Provenance, Root, TensorEntry, inspect_root, sha256_file,
};
use tinyfusion::core::{Error, check_shapes};

use crate::address::Address;
use crate::hub::Inputs;
use crate::model::expected_tensors;
use crate::output::say;
use crate::source::Source;
use crate::vae;

/// Say what a checkpoint is: format, architecture, depth, parameters, tensors, provenance.
///
/// Every command that takes a MODEL takes what this one recognises: a model directory; a .safetensors file, or several
/// with an index; a file of torch.save (plain, or a training checkpoint with the roots ema, model, model_ema); a folder
/// of diffusers (a DiTPipeline, or its transformer alone). Autoencoders are recognised, too.
///
/// What a file does not say itself stands behind its path, between commas:
///   model.pt#ema            the averaged weights of a training checkpoint; #model the raw ones
///   model.pt#family=sit     a DiT and a SiT have the same tensors, so that one must be said
///   model.pt#ema,heads=6    heads of another width than the published ones
///   model.pt#classes=10     whether the table of labels has a row for the null class
///
/// Of a model directory, the weights are compared with what its config.json says of them: their hash, names and
/// shapes. Where they differ the command ends with an error after all that it has to say.
///
/// Examples:
///   tinyfusion inspect assets/teacher
///   tinyfusion inspect DiT-XL-2-256x256.pt#family=dit
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A model: PATH[#WORD[,WORD…]]
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Also list every tensor
    #[arg(long)]
    tensors: bool,
}

/// What the tensors are, where no model directory says it.
struct Told {
    /// What a model directory's config.json would say.
    config: Option<Value>,
    inferred: Vec<String>,
    assumed: Vec<String>,
    /// What has to be said before a command can use it.
    asks: Vec<String>,
    /// Why it is no network that a command can use.
    unknown: Option<String>,
}

/// What headers do not show of diffusers' blocks.
const ONE_EMBEDDER: &str = "every block has the same embedders of time and class; they are compared when the weights are read, and a \
                            network whose blocks have their own (as diffusers' random ones have) is refused then";

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default().and([&mut self.path])
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let address = Address::parse(&args.path)?;
    let mut found = inspect_root(&address.path, address.root)?;
    let is_own = found.format == Format::ModelDir;
    let told = if is_own {
        Source::open(&args.path)?; // nothing may stand behind its path
        None
    } else {
        Some(tell(&args.path, &address, &mut found)?)
    };
    if args.json {
        let mut value = serde_json::to_value(&found)?;
        if let (Some(told), Some(all)) = (&told, value.as_object_mut()) {
            all.insert("recognised".into(), json!(told.config));
            all.insert("inferred".into(), json!(told.inferred));
            all.insert("assumed".into(), json!(told.assumed));
            all.insert("asks".into(), json!(told.asks));
            all.insert("unknown".into(), json!(told.unknown));
        }
        say!("{}", serde_json::to_string_pretty(&value)?)?;
        return agree(&found);
    }
    say!("path        {}", found.path.display())?;
    say!("format      {}", found.format)?;
    show_roots(&address, &found)?;
    say!(
        "size        {:.2} MB, {} tensors, {} parameters",
        found.bytes as f64 / 1e6,
        found.tensors.len(),
        found.parameters
    )?;
    if !found.tensors.is_empty() {
        say!("types       {}", types(&found.tensors))?;
    }
    for (prefix, depth) in &found.blocks {
        say!("depth       {depth} (`{prefix}`)")?;
    }
    match &told {
        None => show_config(found.config.as_ref())?,
        Some(told) => {
            show_config(told.config.as_ref())?;
            for line in &told.inferred {
                say!("inferred    {line}")?;
            }
            for line in &told.assumed {
                say!("assumed     {line}")?;
            }
            for line in &told.asks {
                say!("to be said  {line}")?;
            }
            if let Some(line) = &told.unknown {
                say!("unknown     {line}")?;
            }
        }
    }
    if let Some(provenance) = &found.provenance {
        show_provenance(provenance)?;
    }
    if let Some(sha) = &found.recorded_sha256 {
        say!("sha256      {sha}")?;
    }
    if args.tensors {
        for t in &found.tensors {
            say!("{:<52} {:<6} {:?}", t.name, t.dtype, t.shape)?;
        }
    }
    agree(&found)
}

/// What a checkpoint that does not say it itself is. Questions to the user are no error here; tensors that are no network
/// are one.
fn tell(whole: &Path, address: &Address, found: &mut Inspection) -> Result<Told> {
    let mut told = Told {
        config: None,
        inferred: Vec::new(),
        assumed: Vec::new(),
        asks: Vec::new(),
        unknown: None,
    };
    let checkpoint = Checkpoint::open(&address.path)?;
    if let Some(vae) = vae::recognised(&checkpoint)? {
        let sizes: Value = serde_json::from_str(&vae.to_diffusers()?)?;
        told.config = Some(json!({ "architecture": vae::CLASS, "model": sizes }));
        return Ok(told);
    }
    if let Err(e) = checkpoint.choose(address.root) {
        told.asks.push(e.to_string());
        return Ok(told);
    }
    let root = checkpoint.choose(address.root)?;
    if root != Root::Plain || address.root.is_some() {
        told.inferred.push(format!("root {root}"));
    }
    match Source::open(whole) {
        Ok(source) => {
            told.config = Some(source.config);
            if let Some(recognised) = source.recognised {
                told.inferred.extend(recognised.inferred);
                told.assumed = recognised.assumed;
                if found.format == Format::Diffusers {
                    told.assumed.push(ONE_EMBEDDER.into());
                }
            } else {
                // `tinyfusion export` wrote it.
                found.provenance = Some(source.provenance);
            }
        }
        Err(e) if matches!(e.downcast_ref(), Some(Error::Usage(_))) => {
            told.asks.push(format!("{e:#}"));
        }
        // A classifier's weights, say: told as they are.
        Err(e) if found.format == Format::Safetensors => told.unknown = Some(format!("{e:#}")),
        Err(e) => return Err(e),
    }
    Ok(told)
}

/// The types that tensors are stored in, the commonest first.
fn types(tensors: &[TensorEntry]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in tensors {
        *counts.entry(&tensor.dtype).or_default() += 1;
    }
    let mut counts: Vec<(&str, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| Reverse(*count));
    match counts[..] {
        [(only, _)] => only.to_string(),
        _ => {
            let each = counts
                .iter()
                .map(|(name, count)| format!("{name} ({count})"));
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

fn show_roots(address: &Address, found: &Inspection) -> Result<()> {
    let names: Vec<String> = found.roots.iter().map(Root::to_string).collect();
    if names != ["plain"] && !names.is_empty() {
        let chosen = match (&address.root, &names[..]) {
            (Some(root), _) => format!("; {root} is chosen"),
            (None, [only]) => format!("; {only} is the only one"),
            _ => "; none is chosen".into(),
        };
        say!("roots       {}{chosen}", names.join(", "))?;
    }
    if !found.others.is_empty() {
        say!("beside      {} (not read)", found.others.join(", "))?;
    }
    Ok(())
}

fn show_config(config: Option<&Value>) -> Result<()> {
    let Some(config) = config else {
        return Ok(());
    };
    let architecture = config
        .get("architecture")
        .and_then(|a| a.as_str())
        .unwrap_or("not named");
    say!("model       {architecture}")?;
    let sections = config.as_object().into_iter().flatten();
    for (section, value) in sections.filter(|(key, _)| *key != "architecture") {
        say!("{section:<11} {value}")?;
    }
    Ok(())
}

fn show_provenance(provenance: &Provenance) -> Result<()> {
    let (mut shown, mut narrowed) = (None, None);
    for record in std::iter::once(provenance).chain(&provenance.ancestors) {
        // A model trained after its cut repeats what the cut says.
        if record.kept.is_some() && shown != record.kept.as_ref() {
            shown = record.kept.as_ref();
            say!("kept        {}", cut(record))?;
        }
        if let Some(found) = &record.narrowed
            && narrowed.replace(found) != Some(found)
        {
            say!(
                "narrowed    {:.1} % of the heads and MLP channels, ranked by {}",
                100.0 * found.ratio,
                found.importance
            )?;
        }
    }
    Ok(say!("provenance  {}", serde_json::to_string(provenance)?)?)
}

/// An error where a model directory's weights are not what its config.json describes.
fn agree(found: &Inspection) -> Result<()> {
    let Some(config) = found
        .config
        .as_ref()
        .filter(|_| found.format == Format::ModelDir)
    else {
        return Ok(());
    };
    let folder = found.path.parent().unwrap_or(&found.path);
    if let Some(expected) = expected_tensors(folder, config)? {
        let shapes = found
            .tensors
            .iter()
            .map(|t| (t.name.as_str(), t.shape.as_slice()));
        check_shapes(&shapes.collect(), &expected).map_err(|e| Error::file(&found.path, e))?;
    }
    if let Some(recorded) = &found.recorded_sha256 {
        let sha256 = sha256_file(&found.path)?;
        if sha256 != *recorded {
            return Err(Error::file(
                &found.path,
                format!("was exchanged or altered: config.json expects SHA-256 {recorded}, found {sha256}"),
            )
            .into());
        }
    }
    Ok(())
}

/// What a record says of its cut, for people.
fn cut(record: &Provenance) -> String {
    let kept = record.kept.as_deref().unwrap_or_default();
    let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "not recorded".into());
    format!(
        "{kept:?}, found by {}, pattern {}",
        or_unknown(&record.criterion),
        or_unknown(&record.pattern)
    )
}
