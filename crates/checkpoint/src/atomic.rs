//! Files that are either whole or not there.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Seek, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};
use tinyfusion_core::{Error, Result};

/// Ending of every file and folder that is still being written.
pub(crate) const PARTIAL: &str = ".partial";

/// Writes `path` through `write` so that, whatever happens, either the old file or the whole new
/// one stands there: written beside its place under a name ending in `.partial`, flushed,
/// fsynced, renamed, and the folder fsynced.
///
/// On any error the partial file is removed; after a kill it may be left (see
/// [`remove_partials`]). The folder must exist.
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    stage(path.as_ref(), write)?.commit()
}

/// Removes what killed processes left half-written in `folder`: every file or folder whose name
/// ends in `.partial`. Returns their paths. Not to be called while another process writes there.
pub fn remove_partials(folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let folder = folder.as_ref();
    let failed = |e: io::Error| {
        Error::file(
            folder,
            format!("left-over partial files could not be removed: {e}"),
        )
    };
    let mut removed = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().ends_with(PARTIAL) {
            continue;
        }
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            fs::remove_dir_all(&path).map_err(failed)?;
        } else {
            fs::remove_file(&path).map_err(failed)?;
        }
        removed.push(path);
    }
    removed.sort();
    Ok(removed)
}

/// Writes the folder `dir`, which must not exist, so that it is there whole or not at all: `fill` writes its files
/// into a folder beside its place, which is renamed when they are all there.
pub fn write_folder(dir: impl AsRef<Path>, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = dir.as_ref();
    if dir.exists() {
        return Err(Error::usage(format!(
            "{} exists; a new folder is written",
            dir.display()
        )));
    }
    let failed = |e: &io::Error| not_written(dir, e);
    let parent = folder_of(dir);
    fs::create_dir_all(parent).map_err(|e| failed(&e))?;
    let temp = builder(0o777).tempdir_in(parent).map_err(|e| failed(&e))?;
    fill(temp.path())?;
    fs::rename(temp.path(), dir).map_err(|e| failed(&e))?;
    let _ = temp.keep(); // it has moved: nothing to clean up
    sync_folder(parent)
}

/// A file that is wholly on disk but not yet in its place. Dropping it removes it.
pub(crate) struct Staged {
    temp: NamedTempFile,
    path: PathBuf,
}

/// What a format that patches its headers is written to.
pub(crate) trait WriteSeek: Write + Seek {}

impl<T: Write + Seek> WriteSeek for T {}

/// The first half of [`write_atomic`]: everything but the rename.
pub(crate) fn stage(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<Staged> {
    stage_seek(path, |w| write(w))
}

/// As [`stage`], for a writer that goes back.
pub(crate) fn stage_seek(
    path: &Path,
    write: impl FnOnce(&mut dyn WriteSeek) -> io::Result<()>,
) -> Result<Staged> {
    let mut temp = builder(0o666)
        .tempfile_in(folder_of(path))
        .map_err(|e| not_written(path, &e))?;
    fill(temp.as_file_mut(), write).map_err(|e| not_written(path, &e))?;
    Ok(Staged {
        temp,
        path: path.to_path_buf(),
    })
}

impl Staged {
    /// The second half: puts the file in its place, for good.
    pub(crate) fn commit(self) -> Result<()> {
        let Self { temp, path } = self;
        temp.persist(&path)
            .map_err(|e| not_written(&path, &e.error))?;
        sync_folder(folder_of(&path))
    }
}

fn fill(
    file: &mut File,
    write: impl FnOnce(&mut dyn WriteSeek) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffered = BufWriter::with_capacity(1 << 20, &mut *file);
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    file.sync_all()
}

/// Random names, so that two processes never write into one partial file.
pub(crate) fn builder(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder
        .prefix(".tinyfusion-")
        .suffix(PARTIAL)
        .rand_bytes(10);
    // The library's default is private to the user; checkpoints follow the umask like other files.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// The folder that holds `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes renames and new names in `folder` survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    // Elsewhere a folder cannot be opened as a file; the rename is then as durable as the system makes it.
    if cfg!(unix) {
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(|e| Error::file(folder, format!("the folder could not be synced: {e}")))?;
    }
    Ok(())
}

pub(crate) fn not_written(path: &Path, cause: &io::Error) -> Error {
    let stands = if path.exists() {
        "what stood there is unchanged"
    } else {
        "nothing was left behind"
    };
    let advice = match cause.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "; free some space and run the same command again"
        }
        ErrorKind::NotFound => "; its folder must exist",
        _ => "",
    };
    Error::file(
        path,
        format!("could not be written: {cause} ({stands}{advice})"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn staged_but_not_committed_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_atomic(&path, |w| w.write_all(b"old")).unwrap();
        let staged = stage(&path, |w| w.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        // A kill here: the destructor does not run.
        let (_, left) = staged.temp.keep().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(remove_partials(folder.path()).unwrap(), [left]);
        assert_eq!(names(folder.path()), ["a.txt"]);
    }

    #[test]
    fn dropping_a_staged_file_removes_it() {
        let folder = tempfile::tempdir().unwrap();
        drop(stage(&folder.path().join("a.txt"), |w| w.write_all(b"new")).unwrap());
        assert!(names(folder.path()).is_empty());
    }
}
