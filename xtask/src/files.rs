//! Paths, atomic writes and content hashes.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

/// The repository's root: the parent of this package.
pub(crate) fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// A path as the user gave it (relative to where they stand) said from the repository's root.
pub(crate) fn from_root(path: &Path, standing_in: &Path, root: &Path) -> PathBuf {
    let mut whole = PathBuf::new();
    for part in standing_in.join(path).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                whole.pop();
            }
            part => whole.push(part),
        }
    }
    whole
        .strip_prefix(root)
        .map(Path::to_path_buf)
        .unwrap_or(whole)
}

/// Of a program: `tinyfusion` alone would be looked up in PATH. Links stay: a virtual environment is found by one.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Writes beside the file, syncs and renames: a reader sees the old text or the new, never half.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let mut file = fs::File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// `value` as indented JSON, atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// Reads and parses a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is not what was expected", path.display()))
}

/// Reads a file of one JSON object per line; a half-written last line is left out.
pub(crate) fn read_json_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let mut values = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(value) => values.push(value),
            Err(_) if i + 1 == lines.len() => {}
            Err(e) => bail!("{} line {}: {e}", path.display(), i + 1),
        }
    }
    Ok(values)
}

/// Removes a file or folder, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    gone.with_context(|| format!("cannot remove {}", path.display()))
}

/// Bytes of a file, or of all files in a folder.
pub(crate) fn size(path: &Path) -> Result<u64> {
    let failed = || format!("cannot read {}", path.display());
    let meta = fs::metadata(path).with_context(failed)?;
    if !meta.is_dir() {
        return Ok(meta.len());
    }
    let mut bytes = 0;
    for entry in fs::read_dir(path).with_context(failed)? {
        bytes += size(&entry.with_context(failed)?.path())?;
    }
    Ok(bytes)
}

/// Bytes that can be written below a folder, or below the nearest one above it that is there; where the system tells.
pub(crate) fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let absolute = absolute(folder);
        let there = absolute.ancestors().find(|f| f.exists())?;
        let found = rustix::fs::statvfs(there).ok()?;
        Some(found.f_bavail.saturating_mul(found.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of a text.
pub(crate) fn hash_text(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// SHA-256 of a file's content, or of a folder's files (names and contents, in name order).
///
/// Left out are `resources.json` (times and memory, which differ between equal runs) and prose
/// (`*.md`: a model card changes no result).
pub(crate) fn hash_path(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    add(&mut hasher, path, "").with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&hasher.finalize()))
}

/// `cargo`, as a shell would start it.
///
/// What cargo tells this program of its own package is left out: build scripts that read the same variables (ring's) would
/// run again, and everything behind them be compiled again, whenever a build began elsewhere.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The file or folder that an input of a stage means: without what is said behind a `#`, and none where it stands on
/// the Hugging Face hub.
pub(crate) fn local(input: &Path) -> Option<PathBuf> {
    let text = input.to_string_lossy();
    if text.starts_with("hub://") {
        return None;
    }
    match text.rsplit_once('#') {
        Some((path, _)) if !input.exists() => Some(path.into()),
        _ => Some(input.to_path_buf()),
    }
}

fn add(hasher: &mut Sha256, path: &Path, name: &str) -> std::io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        let mut entries: Vec<_> = fs::read_dir(path)?.collect::<std::io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries.iter().filter(|e| is_content(&e.file_name())) {
            add(
                hasher,
                &entry.path(),
                &format!("{name}/{}", entry.file_name().to_string_lossy()),
            )?;
        }
        return Ok(());
    }
    let mut file = fs::File::open(path)?;
    hasher.update(format!("{name}\0{}\0", file.metadata()?.len()));
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        hasher.update(&buffer[..n]);
    }
}

fn is_content(name: &OsStr) -> bool {
    name != "resources.json" && Path::new(name).extension() != Some(OsStr::new("md"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folders_hash_sees_names_and_contents_but_not_times() {
        let dir = tempfile::tempdir().unwrap();
        let path = |n: &str| dir.path().join(n);
        fs::write(path("a"), "1").unwrap();
        fs::create_dir(path("sub")).unwrap();
        fs::write(path("sub/b"), "2").unwrap();
        let first = hash_path(dir.path()).unwrap();
        fs::write(path("resources.json"), "{}").unwrap();
        fs::write(path("README.md"), "a card").unwrap();
        assert_eq!(hash_path(dir.path()).unwrap(), first);
        fs::write(path("sub/b"), "3").unwrap();
        let second = hash_path(dir.path()).unwrap();
        assert_ne!(second, first);
        fs::rename(path("sub/b"), path("sub/c")).unwrap();
        assert_ne!(hash_path(dir.path()).unwrap(), second);
        assert!(
            hash_path(&path("none"))
                .unwrap_err()
                .to_string()
                .contains("none")
        );
    }

    #[test]
    fn paths_are_said_from_the_root() {
        let say = |p: &str| from_root(Path::new(p), Path::new("/repo/crates"), Path::new("/repo"));
        assert_eq!(say("../runs/x"), Path::new("runs/x"));
        assert_eq!(say("./y.toml"), Path::new("crates/y.toml"));
        assert_eq!(say("/tmp/z"), Path::new("/tmp/z"));
    }

    #[test]
    fn a_half_written_last_line_is_left_out_and_another_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        fs::write(&path, "1\n2\n{\"st").unwrap();
        assert_eq!(read_json_lines::<u32>(&path).unwrap(), [1, 2]);
        fs::write(&path, "1\n{\n3\n").unwrap();
        assert!(
            read_json_lines::<u32>(&path)
                .unwrap_err()
                .to_string()
                .contains("line 2")
        );
    }
}
