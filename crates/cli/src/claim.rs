//! A folder of results is written by one process at a time.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use tinyfusion::core::{Error, Result};

/// Keeps other processes from writing into a folder until this is dropped; the system lets go of it when a process is killed.
#[derive(Debug)]
pub(crate) struct Claim {
    folder: PathBuf,
    /// Whether the folder was made for this.
    made: bool,
    _lock: Option<File>,
}

impl Claim {
    /// Claims `folder`, which is made where it is not there.
    ///
    /// # Errors
    /// Where another process has claimed it.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let made = !folder.exists();
        fs::create_dir_all(folder)
            .map_err(|e| Error::file(folder, format!("could not be made: {e}")))?;
        Ok(Self {
            _lock: lock(folder)?,
            folder: folder.to_path_buf(),
            made,
        })
    }
}

/// The folder itself as a locked file; nothing where the system has no such locks.
fn lock(folder: &Path) -> Result<Option<File>> {
    // Elsewhere a folder cannot be opened as a file.
    if !cfg!(unix) {
        return Ok(None);
    }
    let file =
        File::open(folder).map_err(|e| Error::file(folder, format!("could not be opened: {e}")))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(Error::usage(format!(
            "{}: another process writes into this folder; wait for it, or name another folder",
            folder.display()
        ))),
        Err(TryLockError::Error(e)) => {
            tracing::debug!(folder = %folder.display(), "no locks here: {e}");
            Ok(None)
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.made {
            // Goes only where nothing was written: a mistake leaves no folder behind.
            let _ = fs::remove_dir(&self.folder);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_folder_has_one_writer_and_stays_if_something_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/out");
        let claim = Claim::take(&out).unwrap();
        let error = Claim::take(&out).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
        assert!(error.to_string().contains("another process"), "{error}");
        drop(claim);
        assert!(!out.exists());
        let claim = Claim::take(&out).unwrap();
        fs::write(out.join("x"), "").unwrap();
        drop(claim);
        drop(Claim::take(&out).unwrap());
        assert!(out.join("x").exists());
    }
}
