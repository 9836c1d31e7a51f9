use std::path::PathBuf;

use anyhow::Result;
use tinyfusion::checkpoint::{Inspection, Provenance, inspect, sha256_file};
use tinyfusion::core::{Error, check_shapes};

use crate::model::expected_tensors;
use crate::output::say;

/// Say what a checkpoint is: architecture, depth, parameters, tensors, provenance.
///
/// Of a model directory, the weights are compared with what its config.json says of them: their hash, names and
/// shapes. Where they differ the command ends with an error after all that it has to say.
///
/// Example: tinyfusion inspect assets/teacher
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// A model directory or a .safetensors file
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Also list every tensor
    #[arg(long)]
    tensors: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let found = inspect(&args.path)?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&found)?)?;
        return agree(&found);
    }
    say!("path        {}", found.path.display())?;
    say!(
        "size        {:.2} MB, {} tensors, {} parameters",
        found.bytes as f64 / 1e6,
        found.tensors.len(),
        found.parameters
    )?;
    for (prefix, depth) in &found.blocks {
        say!("depth       {depth} (`{prefix}`)")?;
    }
    if let Some(config) = &found.config {
        let architecture = config
            .get("architecture")
            .and_then(|a| a.as_str())
            .unwrap_or("not named");
        say!("model       {architecture}")?;
        let sections = config.as_object().into_iter().flatten();
        for (section, value) in sections.filter(|(key, _)| *key != "architecture") {
            say!("{section:<11} {value}")?;
        }
    }
    if let Some(provenance) = &found.provenance {
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
        say!("provenance  {}", serde_json::to_string(provenance)?)?;
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

/// An error where a model directory's weights are not what its config.json describes.
fn agree(found: &Inspection) -> Result<()> {
    let Some(config) = &found.config else {
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
