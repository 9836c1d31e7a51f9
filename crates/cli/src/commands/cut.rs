use std::path::PathBuf;

use anyhow::Result;
use tinyfusion::checkpoint::{DTypePolicy, Provenance};
use tinyfusion::core::{BlockLayout, Error, Selection};
use tinyfusion::mask::Pattern;

use crate::family::{Architecture, Family, Model, save, with_family};
use crate::hub::Inputs;
use crate::output::say;
use crate::resources::Resources;
use crate::selection_file::{SELECTION_FILE, read_selection_for};

/// Keep some blocks for good: writes a shallower model directory.
///
/// The selection lies beside the model as OUT/selection.json, where distill finds it.
///
/// Examples:
///   tinyfusion cut assets/teacher runs/cut --selection runs/learned/selection.json
///   tinyfusion cut assets/teacher runs/cut --keep 0,2,4,6,8,10,12,14 --pattern 1:2
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The dense network, a model as `inspect` takes it: PATH or hub://OWNER/REPO, with [#WORD,…]
    model: PathBuf,
    /// Model directory to write
    out: PathBuf,
    #[command(flatten)]
    which: Which,
    /// Groups that the kept indices obey, as 1:2: distillation aligns hidden states at their ends. Without it
    /// all blocks of a stage are one group
    #[arg(long, requires = "keep", conflicts_with = "selection")]
    pattern: Option<Pattern>,
    /// Store the weights in 16 bits
    #[arg(long)]
    f16: bool,
}

#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// selection.json from learn or score
    #[arg(long, value_name = "FILE")]
    selection: Option<PathBuf>,
    /// Block indices from 0, ascending
    #[arg(long, value_delimiter = ',', value_name = "I,J,…", value_parser = index)]
    keep: Option<Vec<usize>>,
}

/// A block's index, which may have spaces around it: `--keep "0, 2"`.
fn index(text: &str) -> std::result::Result<usize, std::num::ParseIntError> {
    text.trim().parse()
}

impl Args {
    /// What is read.
    pub(crate) fn inputs(&mut self) -> Inputs<'_> {
        Inputs::default()
            .and([&mut self.model])
            .and(&mut self.which.selection)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    with_family!(Architecture::of(&args.model)?, cut(args))
}

fn cut<F: Family>(args: &Args) -> Result<()> {
    let resources = Resources::start();
    let model = Model::<F>::load(&args.model)?;
    if args.out.exists() {
        // Least of all the dense model itself is to be replaced by a part of it.
        return Err(Error::usage(format!(
            "{} exists; cut writes a new folder",
            args.out.display()
        ))
        .into());
    }
    let layout = model.layout();
    let mut selection = match (&args.which.selection, &args.which.keep) {
        (Some(path), _) => read_selection_for(path, &layout)?,
        (None, Some(kept)) => by_indices(&layout, kept, args.pattern.as_ref())?,
        (None, None) => unreachable!("clap requires one of the two"),
    };
    if let Some(made_for) = selection
        .source_sha256
        .as_ref()
        .filter(|s| **s != model.sha256)
    {
        tracing::warn!(%made_for, found = %model.sha256, "the selection was made for other weights");
    }
    selection
        .source_sha256
        .get_or_insert_with(|| model.sha256.clone());
    let (config, weights) = F::keep(&model.config, &model.weights, &selection.kept)?;
    weights.check(&F::params(&config))?;
    let mut provenance =
        Provenance::of_command(super::command_line()).with_parent(&model.sha256, &model.provenance);
    provenance.kept = Some(selection.kept.clone());
    provenance.criterion = Some(selection.criterion.clone());
    provenance.pattern = Some(
        selection
            .groups
            .iter()
            .map(|g| format!("{}:{}", g.n, g.m))
            .collect::<Vec<_>>()
            .join(","),
    );
    let dtype = if args.f16 {
        DTypePolicy::F16
    } else {
        DTypePolicy::F32
    };
    save(
        &args.out,
        &model.description(&config)?,
        &weights,
        &provenance,
        dtype,
        &[(SELECTION_FILE, selection.to_json()?)],
    )?;
    resources.write(&args.out, None)?;
    Ok(say!(
        "{}: {} blocks, {} parameters",
        args.out.display(),
        F::layout(&config).depth(),
        weights.elem_count()
    )?)
}

/// The blocks `kept` as a selection, in the groups of `pattern` or in one for each stage.
fn by_indices(
    layout: &BlockLayout,
    kept: &[usize],
    pattern: Option<&Pattern>,
) -> Result<Selection> {
    let mut selection = Selection::from_indices(layout, kept.to_vec())?;
    if let Some(pattern) = pattern {
        selection.groups = pattern.groups(layout)?;
    }
    Ok(selection.validated()?)
}
