use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::{BlockLayout, Error, Selection};
use tinyfusion::mask::{Pattern, oracle_selection, random_selection};

use crate::model::DiTModel;
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
    /// How many of how many to keep, for example 1:2 (random only)
    #[arg(long, default_value = "1:2")]
    pattern: Pattern,
    /// Seed of the choice (random only)
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Criterion {
    /// First of each pair in the first half, last of each pair in the second half (BK-SDM)
    Oracle,
    /// Uniform over the masks of the pattern
    Random,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let resources = Resources::start();
    let model = DiTModel::load(&args.model)?;
    let layout = BlockLayout::single(model.config.depth);
    let mut selection = match args.criterion {
        Criterion::Oracle => oracle_selection(&layout)?,
        Criterion::Random => random_selection(&args.pattern.groups(&layout)?, args.seed, 0)?,
    };
    selection.source_sha256 = Some(model.sha256);
    write_selection(&args.out, &selection)?;
    resources.write(&args.out, None)
}

/// Writes `OUT/selection.json` and says which blocks it keeps.
pub(crate) fn write_selection(out: &Path, selection: &Selection) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, e))?;
    let text = selection.to_json()?;
    write_atomic(out.join("selection.json"), |f| f.write_all(text.as_bytes()))?;
    println!("kept {:?} of {} blocks", selection.kept, selection.depth);
    Ok(())
}

/// Reads a selection and checks that it is for a network of `depth` blocks.
pub(crate) fn read_selection(path: &Path, depth: usize) -> Result<Selection> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
    let selection = Selection::from_json(&text)
        .map_err(|e| Error::usage(format!("{}: {e}", path.display())))?;
    if selection.depth != depth {
        return Err(Error::usage(format!(
            "{}: made for {} blocks, the network has {depth}",
            path.display(),
            selection.depth
        ))
        .into());
    }
    Ok(selection)
}
