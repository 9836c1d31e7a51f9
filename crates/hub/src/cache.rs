//! The layout of the cache that the Python tools share:
//!
//! ```text
//! models--owner--repo/blobs/ETAG                   the content
//! models--owner--repo/blobs/ETAG.incomplete        what has come of it
//! models--owner--repo/refs/main                    the commit that the branch meant last
//! models--owner--repo/snapshots/COMMIT/path/file   a relative link to the blob
//! .locks/models--owner--repo/ETAG.lock             held while a blob is downloaded
//! ```
//!
//! and one file that is ours alone:
//!
//! ```text
//! models--owner--repo/tinyfusion/COMMIT.json       which files the commit has, and their sizes
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use tinyfusion_core::{Error, Result};

use crate::client::{Contents, repository};
use crate::path::{HubPath, check_file, is_commit};
use crate::progress::Progress;
use crate::settings::Settings;

/// One repository in the cache.
pub(crate) struct RepoCache {
    inner: hf_hub::CacheRepo,
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(settings: &Settings, path: &HubPath) -> Self {
        let repo = repository(path, path.revision().to_owned());
        let name = repo.folder_name();
        let cache = hf_hub::Cache::new(settings.cache.clone());
        Self {
            folder: settings.cache.join(&name),
            locks: settings.cache.join(".locks").join(&name),
            inner: cache.repo(repo),
        }
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.inner.blob_path(etag)
    }

    pub(crate) fn incomplete(&self, etag: &str) -> PathBuf {
        self.inner.blob_path(&format!("{etag}.incomplete"))
    }

    /// The folder of a commit's files.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.inner.pointer_path(commit)
    }

    /// The commit that `revision` is known to mean: itself, what the hub said last, or, for a file that was put there
    /// by hand, the folder of that name.
    pub(crate) fn commit_of(&self, revision: &str) -> String {
        if is_commit(revision) {
            return revision.to_owned();
        }
        match fs::read_to_string(self.folder.join("refs").join(revision)) {
            // Written by other programs too, and about to become a folder's name.
            Ok(text) if is_commit(text.trim()) => text.trim().to_owned(),
            _ => revision.to_owned(),
        }
    }

    /// Notes what `revision` means now, for the day without a network.
    pub(crate) fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.commit_of(revision) == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_parent(&path)?;
        tinyfusion_checkpoint::write_atomic(&path, |w| w.write_all(commit.as_bytes()))
    }

    /// Notes which files a commit has, for the day without a network; not where the hub listed them without sizes, by which
    /// whole files are known then.
    pub(crate) fn remember_files(&self, contents: &Contents) -> Result<()> {
        let path = self.listing(&contents.commit);
        if !is_commit(&contents.commit) || !contents.sized || path.exists() {
            return Ok(());
        }
        make_parent(&path)?;
        tinyfusion_checkpoint::write_atomic(&path, |w| {
            serde_json::to_writer(w, &contents.files)?;
            Ok(())
        })
    }

    /// The files of a commit, if they were noted.
    pub(crate) fn files_of(&self, commit: &str) -> Option<Vec<(String, u64)>> {
        let text = fs::read(self.listing(commit)).ok()?;
        let files: Vec<(String, u64)> = serde_json::from_slice(&text).ok()?;
        // They become paths. Sizes that are all 0 were noted of a hub that lists none.
        let are_paths = files.iter().all(|(file, _)| check_file(file).is_ok());
        let are_sized = files.iter().any(|(_, size)| *size > 0);
        (are_paths && are_sized).then_some(files)
    }

    fn listing(&self, commit: &str) -> PathBuf {
        self.folder
            .join("tinyfusion")
            .join(format!("{commit}.json"))
    }

    /// Links `file` of `commit` to its blob; an older link, or a copy, is replaced in one step.
    pub(crate) fn point(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let pointer = self.snapshot(commit).join(file);
        make_parent(&pointer)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let beside = format!(".tinyfusion-{}-{number}.partial", std::process::id());
        let beside = pointer.with_file_name(beside);
        let up = "../".repeat(2 + file.matches('/').count());
        let relative = format!("{up}blobs/{etag}");
        link(&self.blob(etag), Path::new(&relative), &beside)
            .and_then(|()| fs::rename(&beside, &pointer))
            .map_err(|e| {
                // It may not be there at all; the first error is the one that counts.
                let _ = fs::remove_file(&beside);
                Error::file(&pointer, format!("could not be linked to its content: {e}"))
            })?;
        Ok(pointer)
    }

    /// Waits until nobody else downloads this blob.
    pub(crate) fn lock(&self, etag: &str, progress: &dyn Progress) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        let failed = |e: &io::Error| Error::file(&path, format!("could not be locked: {e}"));
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| failed(&e))?;
        let mut noted = false;
        // The system frees the lock of a process that dies, so this waits for a living one only.
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) if progress.stop() => return Err(Error::Stopped),
                Err(TryLockError::WouldBlock) => {
                    if !noted {
                        tracing::info!(lock = %path.display(), "waiting for another program's download");
                        noted = true;
                    }
                    sleep(Duration::from_millis(100));
                }
                Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                    tracing::warn!(lock = %path.display(), "this file system has no locks; do not download twice at once");
                    return Ok(None);
                }
                Err(TryLockError::Error(e)) => return Err(failed(&e)),
            }
        }
    }
}

/// Makes the folder that `path` will stand in.
pub(crate) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| {
        Error::file(
            parent,
            format!("the folder could not be made: {e}; HF_HOME chooses another place"),
        )
    })
}

#[cfg(unix)]
fn link(_blob: &Path, relative: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(relative, at)
}

/// Links need privileges elsewhere; the Python tools copy there too. A hard link costs no space.
#[cfg(not(unix))]
fn link(blob: &Path, _relative: &Path, at: &Path) -> io::Result<()> {
    fs::hard_link(blob, at).or_else(|_| fs::copy(blob, at).map(drop))
}
