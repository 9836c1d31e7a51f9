//! `selection.json`: written by `learn` and `score`, read by `cut`, `loss` and `distill`.

use std::path::Path;

use anyhow::Result;
use tinyfusion::checkpoint::write_atomic;
use tinyfusion::core::{BlockLayout, Error, Selection};

use crate::output::say;

/// Writes `OUT/selection.json` and says which blocks it keeps.
pub(crate) fn write_selection(out: &Path, selection: &Selection) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::file(out, e))?;
    let text = selection.to_json()?;
    write_atomic(out.join(SELECTION_FILE), |f| f.write_all(text.as_bytes()))?;
    Ok(say!(
        "kept {:?} of {} blocks",
        selection.kept,
        selection.depth
    )?)
}

/// The name of a selection in a folder: what `learn` and `score` find, and what `cut` lays beside a model.
pub(crate) const SELECTION_FILE: &str = "selection.json";

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
