//! Both hashes by which the hub names content, in one pass.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::progress::Progress;

/// Size of the pieces in which files are read.
pub(crate) const PIECE: usize = 256 << 10;

/// Bytes between two looks at the progress.
const SHOWN: u64 = 16 << 20;

/// SHA-256 of what has come so far, and git's hash of the blob where the hub names that.
pub(crate) struct Hashes {
    sha256: Sha256,
    git: Option<Sha1>,
}

impl Hashes {
    /// For a file that the hub names `etag`; git hashes the size first, so it must be known.
    pub(crate) fn new(etag: &str, size: u64) -> Self {
        let git = (Kind::of(etag) == Some(Kind::Git))
            .then(|| Sha1::new().chain_update(format!("blob {size}\0")));
        Self {
            sha256: Sha256::new(),
            git,
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        if let Some(git) = &mut self.git {
            git.update(bytes);
        }
    }

    /// Takes in the rest of `reader`; returns how much that was.
    pub(crate) fn read(&mut self, mut reader: impl Read) -> io::Result<u64> {
        let mut piece = vec![0; PIECE];
        let mut count = 0;
        loop {
            match reader.read(&mut piece) {
                Ok(0) => return Ok(count),
                Ok(n) => {
                    self.update(&piece[..n]);
                    count += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    pub(crate) fn finish(self) -> Content {
        Content {
            sha256: hex(&self.sha256.finalize()),
            git: self.git.map(|git| hex(&git.finalize())),
        }
    }
}

/// What an ETag says of the content.
#[derive(PartialEq)]
enum Kind {
    Sha256,
    Git,
}

impl Kind {
    fn of(etag: &str) -> Option<Self> {
        let hexadecimal = etag.bytes().all(|b| b.is_ascii_hexdigit());
        match etag.len() {
            64 if hexadecimal => Some(Self::Sha256),
            40 if hexadecimal => Some(Self::Git),
            _ => None,
        }
    }
}

/// What a file's content hashes to.
pub(crate) struct Content {
    pub(crate) sha256: String,
    git: Option<String>,
}

impl Content {
    /// The content of a file in the cache that the hub names `etag` (empty if that is not known).
    pub(crate) fn of(path: &Path, etag: &str) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut hashes = Hashes::new(etag, file.metadata()?.len());
        hashes.read(file)?;
        Ok(hashes.finish())
    }

    /// The content of any file, shown as it is read; `None` if that was stopped.
    pub(crate) fn watched(path: &Path, progress: &mut dyn Progress) -> io::Result<Option<Self>> {
        let mut file = File::open(path)?;
        let mut hashes = Hashes::new("", 0);
        let mut have = 0;
        loop {
            if progress.stop() {
                return Ok(None);
            }
            match hashes.read((&mut file).take(SHOWN))? {
                0 => return Ok(Some(hashes.finish())),
                n => have += n,
            }
            progress.at(have);
        }
    }

    /// The hash to compare with `etag`; `None` if `etag` says nothing of the content.
    pub(crate) fn like(&self, etag: &str) -> Option<&str> {
        match Kind::of(etag)? {
            Kind::Sha256 => Some(&self.sha256),
            Kind::Git => self.git.as_deref(),
        }
    }

    /// Whether this is what `etag` names, as far as it can be told.
    pub(crate) fn is(&self, etag: &str) -> bool {
        self.like(etag)
            .is_none_or(|own| own.eq_ignore_ascii_case(etag))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
