//! Where images, statistics and features come from.

#[cfg(test)]
mod decoding;
mod folder;
mod npy;
mod npz;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use sha2::{Digest, Sha256};

use crate::hash::hex;
use crate::{Error, Result};
use folder::Folder;
pub(crate) use folder::Unread;
pub use npz::Npz;

/// Name of the array of images in ADM's files.
pub(crate) const IMAGES: &str = "arr_0";

/// What `tinyfusion sample` writes into its folder, and what says that it did.
const SAMPLES: &str = "samples.npz";
const RECORD: &str = "sample.json";

/// A set of images of one size: a folder of PNG, JPEG and WebP files, or an `.npz` with `arr_0` (N, H, W, 3) uint8 as
/// ADM's evaluator and `tinyfusion sample` write it. Nothing but heads and headers is read until it is asked for.
#[derive(Debug)]
pub struct ImageSet {
    path: PathBuf,
    kind: Kind,
    len: usize,
    size: [usize; 2],
    warnings: Vec<String>,
}

#[derive(Debug)]
enum Kind {
    Npz,
    Folder(Folder),
}

/// Some consecutive images of a set.
pub(crate) enum Batch {
    /// Their bytes, one image after the other.
    Pixels(Vec<u8>),
    /// Their places in the folder; whoever needs the pixels decodes them.
    Files(std::ops::Range<usize>),
}

impl ImageSet {
    /// Opens a folder of images, an `.npz`, or the folder of `tinyfusion sample`: its `samples.npz`, beside which
    /// `sample.json` lies. Without that the `.npz` is taken only where the folder has no images, with a warning.
    ///
    /// # Errors
    /// When there is no image, an image's head cannot be read (all such files are listed), the images are of several
    /// sizes, or the `.npz` holds something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let samples = path.join(SAMPLES);
            if samples.is_file() {
                if path.join(RECORD).is_file() {
                    return Self::open(samples);
                }
                // Whose it is nobody says, and what else lies there may be other images.
                let Some(folder) = Folder::find(path)? else {
                    let mut set = Self::open(samples)?;
                    set.warnings.push(format!(
                        "{}: no {RECORD} lies beside {SAMPLES}, so it may be of something else than `tinyfusion sample`",
                        path.display()
                    ));
                    return Ok(set);
                };
                let mut set = Self::of_folder(path, folder);
                set.warnings.push(format!(
                    "{}: the {} images of the folder are taken, not the {SAMPLES} among them; give that file itself if it is meant",
                    path.display(),
                    set.len
                ));
                return Ok(set);
            }
            return Ok(Self::of_folder(path, Folder::open(path)?));
        }
        let (len, size) = Npz::open(path)?.image_shape(IMAGES)?;
        Ok(Self {
            path: path.to_path_buf(),
            kind: Kind::Npz,
            len,
            size,
            warnings: Vec::new(),
        })
    }

    fn of_folder(path: &Path, folder: Folder) -> Self {
        Self {
            path: path.to_path_buf(),
            len: folder.len(),
            size: folder.size(),
            warnings: folder.warnings(),
            kind: Kind::Folder(folder),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty set is an error when it is opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// (height, width) of every image.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// What to know before quoting a number.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.clone()
    }

    /// SHA-256 of the content: of the file, or over the names and contents of all files of a folder.
    pub fn sha256(&self) -> Result<String> {
        match &self.kind {
            Kind::Npz => file_sha256(&self.path),
            Kind::Folder(folder) => folder.sha256(),
        }
    }

    /// Hands over all images in order, `batch` at a time; an `.npz` is unpacked on a thread of its own meanwhile.
    pub(crate) fn for_each_batch(
        &self,
        batch: usize,
        take: &mut dyn FnMut(Batch) -> Result<()>,
    ) -> Result<()> {
        if batch == 0 {
            return Err(Error::Config(
                "images are handed out in batches of 0; expected at least 1".into(),
            ));
        }
        if let Kind::Folder(_) = self.kind {
            return crate::features::ranges(self.len, batch)
                .try_for_each(|range| take(Batch::Files(range)));
        }
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(1);
            let reader = scope.spawn(move || {
                Npz::open(&self.path)?.for_each_batch(IMAGES, batch, &mut |images| {
                    // Who no longer listens has failed and says so itself.
                    sender
                        .send(images)
                        .map_err(|_| Error::file(&self.path, "reading was given up"))
                })
            });
            let taken = receiver
                .iter()
                .try_for_each(|images| take(Batch::Pixels(images)));
            drop(receiver);
            let read = reader
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            taken.and(read)
        })
    }

    /// The pixels of image `index` of a folder, or the file and why it cannot be read.
    pub(crate) fn decode(&self, index: usize) -> std::result::Result<Vec<u8>, Unread> {
        match &self.kind {
            Kind::Folder(folder) => folder.decode(index),
            Kind::Npz => Err((self.path.clone(), "not a folder".into())),
        }
    }

    /// One error that lists the files that cannot be read, if there are any.
    pub(crate) fn unreadable(&self, failures: &[Unread]) -> Result<()> {
        match &self.kind {
            Kind::Folder(folder) => folder.unreadable(failures),
            Kind::Npz => Ok(()),
        }
    }
}

/// SHA-256 of a file's content, read in pieces.
///
/// # Errors
/// When it cannot be read.
pub fn file_sha256(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let failed = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hex(hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}
