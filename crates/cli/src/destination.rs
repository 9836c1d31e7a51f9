//! Where results are to be written, looked at before the work.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion::core::Error;

/// A file can be written under the name `path` that `flag` gives, and it is none of the `inputs`: asked before work
/// of hours, whose result would be lost.
pub(crate) fn check_destination<'a>(
    flag: &str,
    path: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<()> {
    let refused = |message: String| Err(Error::file(path, format!("{flag}: {message}")).into());
    if let Ok(there) = std::fs::metadata(path)
        && !there.is_file()
    {
        let what = if there.is_dir() {
            "a folder"
        } else {
            "no plain file"
        };
        return refused(format!("is {what}, expected the name of a file to write"));
    }
    if let Ok(real) = path.canonicalize()
        && let Some(input) = inputs
            .into_iter()
            .find(|input| input.canonicalize().is_ok_and(|input| input == real))
    {
        return Err(Error::usage(format!(
            "{flag} {}: would write over what is read ({}); give another name",
            path.display(),
            input.display()
        ))
        .into());
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match tempfile::Builder::new()
        .prefix(".tinyfusion-")
        .tempfile_in(folder)
    {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => refused(format!(
            "cannot be written: there is no folder {}; make it first",
            folder.display()
        )),
        Err(e) => refused(format!("cannot be written: {e}")),
    }
}

/// The same for a report on the model at `model`: none of the model's own files either.
pub(crate) fn check_report_on(flag: &str, path: &Path, model: &Path, data: &str) -> Result<()> {
    const OWN: [&str; 3] = ["config.json", "model.safetensors", "selection.json"];
    let own: Vec<PathBuf> = OWN.iter().map(|name| model.join(name)).collect();
    let read = own.iter().map(PathBuf::as_path);
    check_destination(flag, path, read.chain([model, Path::new(data)]))
}
