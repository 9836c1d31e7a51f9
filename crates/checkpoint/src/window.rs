//! A weight file read from front to back: mapped into memory one piece at a time, and hashed on the way.
//!
//! The whole file is never mapped at once: pages that were read count as this process's memory until they are unmapped,
//! and beside the tensors made from them the file would be in memory twice.

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapOptions};
use sha2::{Digest, Sha256};
use tinyfusion_core::{Error, Result};

/// Bytes that are mapped at once where they are only hashed.
const STEP: u64 = 16 << 20;

/// A piece of a file.
pub(crate) enum Window {
    Mapped(Mmap),
    /// A mapping cannot be empty.
    Empty,
}

impl Deref for Window {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Empty => &[],
        }
    }
}

/// Opens `path`, which must be a file; its length.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let failed = |e: std::io::Error| Error::file(path, format!("could not be opened: {e}"));
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(Error::file(
            path,
            "is not a file; a weight file is expected",
        ));
    }
    Ok((file, meta.len()))
}

/// The first bytes of a file, fewer where it is shorter.
pub(crate) fn first_bytes(path: &Path, count: u64) -> Result<Vec<u8>> {
    let (file, _) = open(path)?;
    let mut bytes = Vec::new();
    file.take(count)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::file(path, format!("could not be read: {e}")))?;
    Ok(bytes)
}

/// A file that is read forwards.
pub(crate) struct Forwards<'a> {
    path: PathBuf,
    file: File,
    length: u64,
    at: u64,
    hash: &'a mut Sha256,
}

impl<'a> Forwards<'a> {
    /// The file `path`, which had `length` bytes when its header was read; all of it goes into `hash`.
    pub(crate) fn new(path: &Path, length: u64, hash: &'a mut Sha256) -> Result<Self> {
        let (file, found) = open(path)?;
        if found != length {
            return Err(Error::file(
                path,
                format!(
                    "changed while it was read: it had {length} bytes, now {found}; wait until it is whole"
                ),
            ));
        }
        Ok(Self {
            path: path.to_path_buf(),
            file,
            length,
            at: 0,
            hash,
        })
    }

    /// The bytes `range`, which must not begin before the end of the last one and must lie in the file.
    pub(crate) fn window(&mut self, range: &Range<u64>) -> Result<Window> {
        if range.start < self.at || range.end < range.start || range.end > self.length {
            return Err(Error::file(
                &self.path,
                format!(
                    "is damaged: its tensors lie over each other or behind its end (bytes {} to {} of {}, {} are read)",
                    range.start, range.end, self.length, self.at
                ),
            ));
        }
        while self.at < range.start {
            self.take(range.start.min(self.at + STEP))?;
        }
        self.take(range.end)
    }

    /// Reads the rest, so that it is in the hash.
    pub(crate) fn finish(mut self) -> Result<()> {
        while self.at < self.length {
            self.take(self.length.min(self.at + STEP))?;
        }
        Ok(())
    }

    fn take(&mut self, end: u64) -> Result<Window> {
        let window = map(&self.path, &self.file, self.at..end)?;
        self.hash.update(&*window);
        self.at = end;
        Ok(window)
    }
}

#[allow(unsafe_code)]
fn map(path: &Path, file: &File, range: Range<u64>) -> Result<Window> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::file(path, format!("could not be mapped into memory: {e}"))
    };
    if range.is_empty() {
        return Ok(Window::Empty);
    }
    let length = usize::try_from(range.end - range.start).map_err(|e| failed(&e))?;
    let mut options = MmapOptions::new();
    // SAFETY: the mapping is read-only and only ever read as bytes, of which every value is valid. What remains is that
    // another process could shorten the file while a piece of it is mapped; our writers replace files by a rename, which
    // leaves the mapped one whole, and the crate's documentation states the condition.
    unsafe { options.offset(range.start).len(length).map(file) }
        .map(Window::Mapped)
        .map_err(|e| failed(&e))
}
