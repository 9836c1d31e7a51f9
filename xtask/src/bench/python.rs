//! The Python environment of the PyTorch side: made once, again when its requirements change.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::files;

const FOLDER: &str = "target/bench-venv";
const REQUIREMENTS: &str = "xtask/python/requirements.txt";
/// What `bench fid` adds, and `bench files`.
pub(crate) const FID: &str = "xtask/python/requirements-fid.txt";
pub(crate) const FILES: &str = "xtask/python/requirements-files.txt";
const ADVICE: &str =
    "Install Python 3.11 or newer with venv and pip, or measure without PyTorch: --without-python";

/// The environment's interpreter, from the repository's root; builds the environment where it is
/// missing or of other requirements.
pub(crate) fn environment() -> Result<PathBuf> {
    let folder = Path::new(FOLDER);
    let python = folder.join(if cfg!(windows) {
        "Scripts/python.exe"
    } else {
        "bin/python"
    });
    let stamp = folder.join("requirements.sha256");
    let wanted = files::hash_path(Path::new(REQUIREMENTS))?;
    if is_current(&python, &stamp, &wanted) {
        return Ok(python);
    }
    println!("making the Python environment {FOLDER} (several GB, once)");
    step("python3", &["-m", "venv", "--clear", FOLDER])?;
    step(
        &python.display().to_string(),
        &["-m", "pip", "install", "--quiet", "-r", REQUIREMENTS],
    )?;
    // Last, so that a half-made environment is made again.
    files::write_atomic(&stamp, wanted.as_bytes())?;
    Ok(python)
}

/// The same with what the file `extra` asks for.
pub(crate) fn environment_with(extra: &str) -> Result<PathBuf> {
    let python = environment()?;
    let name = Path::new(extra).file_stem().unwrap_or_default();
    let stamp = Path::new(FOLDER).join(name).with_extension("sha256");
    let wanted = files::hash_path(Path::new(extra))?;
    if !is_current(&python, &stamp, &wanted) {
        println!("adding {extra} to the Python environment {FOLDER}");
        step(
            &python.display().to_string(),
            // Its other dependencies stand in the environment already, with their versions pinned.
            &["-m", "pip", "install", "--quiet", "--no-deps", "-r", extra],
        )?;
        files::write_atomic(&stamp, wanted.as_bytes())?;
    }
    Ok(python)
}

/// `script`, run by `python` with so many threads in the libraries that have their own.
pub(crate) fn script(python: &Path, script: &str, threads: usize) -> Command {
    let threads = threads.to_string();
    let mut command = Command::new(files::absolute(python));
    command
        .arg(script)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("OMP_NUM_THREADS", &threads)
        .env("OPENBLAS_NUM_THREADS", &threads)
        // Whoever sets these to share a machine slows numpy and scipy down: they choose the kernels for this CPU themselves.
        .env_remove("OPENBLAS_CORETYPE")
        .env_remove("OPENBLAS_L2_SIZE");
    command
}

fn is_current(python: &Path, stamp: &Path, wanted: &str) -> bool {
    python.exists() && std::fs::read_to_string(stamp).is_ok_and(|found| found == wanted)
}

fn step(program: &str, args: &[&str]) -> Result<()> {
    let line = format!("{program} {}", args.join(" "));
    println!("$ {line}");
    match Command::new(program).args(args).status() {
        Err(error) => bail!("`{program}` cannot be started ({error}). {ADVICE}"),
        Ok(status) if !status.success() => bail!("`{line}` failed ({status}). {ADVICE}"),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_current_only_with_its_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let (python, stamp) = (dir.path().join("python"), dir.path().join("stamp"));
        std::fs::write(&stamp, "abc").unwrap();
        assert!(!is_current(&python, &stamp, "abc"));
        std::fs::write(&python, "").unwrap();
        assert!(is_current(&python, &stamp, "abc"));
        assert!(!is_current(&python, &stamp, "abd"));
    }

    #[test]
    fn a_program_that_is_missing_or_fails_is_named_with_the_way_out() {
        for (program, args) in [("no-such-python", &["-V"][..]), ("cargo", &["no-such"])] {
            let said = step(program, args).unwrap_err().to_string();
            assert!(
                said.contains(program) && said.contains("--without-python"),
                "{said}"
            );
        }
    }

    #[test]
    fn every_requirement_is_pinned() {
        for (text, first) in [
            (include_str!("../../python/requirements.txt"), "torch=="),
            (
                include_str!("../../python/requirements-fid.txt"),
                "torch-fidelity==",
            ),
            (
                include_str!("../../python/requirements-files.txt"),
                "diffusers==",
            ),
        ] {
            let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
            assert!(lines.iter().any(|l| l.starts_with(first)));
            assert!(lines.iter().all(|l| l.contains("==")), "{lines:?}");
        }
    }
}
