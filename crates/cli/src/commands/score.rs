use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion::checkpoint::{CONFIG_FILE, write_atomic};
use tinyfusion::core::{BlockLayout, Error, Selection};
use tinyfusion::mask::{Pattern, oracle_selection, random_selection};

use crate::family::{Architecture, Family, Model, with_family};
use crate::output::say;
use crate::resources::Resources;

/// Choose blocks without learning: BK-SDM's oracle, or at random within a pattern.
///
/// Examples:
///   tinyfusion score assets/teacher runs/oracle --criterion oracle
///   tinyfusion score assets/teacher runs/random --criterion random --pattern 1:2 --seed 3
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Model directory of the dense network
    model: PathBuf,
    /// Folder that gets selection.json
    out: PathBuf,
    /// How to choose
    #[arg(long)]
    criterion: Criterion,
    /// How many of how many to keep (random only) [default: 1:2]
    #[arg(long)]
    pattern: Option<Pattern>,
    /// Seed of the choice (random only) [default: 0]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Criterion {
    /// First of each pair in the first half, last of each pair in the second half (BK-SDM)
    Oracle,
    /// Uniform over the masks of the pattern
    Random,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, score(args))
}

fn score<F: Family>(args: &Args) -> Result<()> {
    let resources = Resources::start();
    if matches!(args.criterion, Criterion::Oracle)
        && (args.pattern.is_some() || args.seed.is_some())
    {
        return Err(Error::usage(
            "the oracle knows one mask, so that pattern and seed need --criterion random",
        )
        .into());
    }
    let model = Model::<F>::load(&args.model)?;
    if args.out.join(CONFIG_FILE).exists() {
        return Err(Error::usage(format!(
            "{} is a model's folder: the selection in it would be taken for the one that cut the model; use another",
            args.out.display()
        ))
        .into());
    }
    let layout = model.layout();
    let mut selection = match args.criterion {
        Criterion::Oracle => oracle_selection(&layout)?,
        Criterion::Random => {
            let pattern = match &args.pattern {
                Some(pattern) => pattern.clone(),
                None => "1:2".parse()?,
            };
            random_selection(&pattern.groups(&layout)?, args.seed.unwrap_or(0), 0)?
        }
    };
    selection.source_sha256 = Some(model.sha256);
    let place = args.out.join(SELECTION_FILE);
    if place.exists() && read_selection(&place).ok().as_ref() != Some(&selection) {
        return Err(Error::usage(format!(
            "{}: another selection stands there, perhaps a learned one; use another folder",
            place.display()
        ))
        .into());
    }
    write_selection(&args.out, &selection)?;
    resources.write(&args.out, None)
}

/// Writes `OUT/selection.json` and says which blocks it keeps.
pub(crate) fn write_selection(out: &Path, selection: &Selection) -> Result<()> {
    save_selection(out, selection)?;
    Ok(say!(
        "kept {:?} of {} blocks",
        selection.kept,
        selection.depth
    )?)
}

/// The name of a selection in a folder: what `learn` and `score` find, and what `cut` lays beside a model.
pub(crate) const SELECTION_FILE: &str = "selection.json";

/// Writes `OUT/selection.json`.
pub(crate) fn save_selection(out: &Path, selection: &Selection) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, e))?;
    let text = selection.to_json()?;
    Ok(write_atomic(out.join(SELECTION_FILE), |f| {
        f.write_all(text.as_bytes())
    })?)
}

/// Reads a selection.
pub(crate) fn read_selection(path: &Path) -> Result<Selection> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    Ok(
        Selection::from_json(&text)
            .map_err(|e| Error::usage(format!("{}: {e}", path.display())))?,
    )
}

/// An error where the selection from `path` is not for a network of this layout.
pub(crate) fn check_layout(selection: &Selection, path: &Path, layout: &BlockLayout) -> Result<()> {
    Ok(selection
        .check_layout(layout)
        .map_err(|e| Error::usage(format!("{}: {e}", path.display())))?)
}

/// Reads a selection and checks that it is for a network of this layout.
pub(crate) fn read_selection_for(path: &Path, layout: &BlockLayout) -> Result<Selection> {
    let selection = read_selection(path)?;
    check_layout(&selection, path, layout)?;
    Ok(selection)
}
