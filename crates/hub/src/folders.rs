//! Folders of a repository, and of the cache.

use std::fs;
use std::path::Path;

/// The rest of `file` inside `folder`; the whole repository is the folder "".
pub(crate) fn within<'f>(folder: &str, file: &'f str) -> Option<&'f str> {
    match folder {
        "" => Some(file),
        _ => file.strip_prefix(folder)?.strip_prefix('/'),
    }
}

/// Every file below `folder`, with its size; what is still being written, and links to nothing, are left out.
pub(crate) fn walk(
    folder: &Path,
    prefix: &str,
    files: &mut Vec<(String, u64)>,
) -> std::io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        if name.ends_with(".partial") {
            continue;
        }
        match fs::metadata(entry.path()) {
            Ok(m) if m.is_file() => files.push((path, m.len())),
            // A link to a folder could lead round in circles; the hub's layout has none.
            Ok(m) if m.is_dir() && entry.file_type()?.is_dir() => {
                walk(&entry.path(), &format!("{path}/"), files)?;
            }
            _ => {}
        }
    }
    Ok(())
}
