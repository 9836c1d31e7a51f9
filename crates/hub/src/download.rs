//! One file from the hub into the cache: resumed, verified, and only then in its place.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tinyfusion_core::{Error, Result};

use crate::cache::{RepoCache, make_parent};
use crate::client::{Client, Metadata, classify, header, nonsense};
use crate::explain::Subject;
use crate::failure::Failure;
use crate::hashes::{Content, Hashes, PIECE};
use crate::progress::Progress;

/// A connection that brought so much was worth it: the count of failures begins anew.
const WORTH: u64 = 1 << 20;

/// What is downloaded, and with what.
pub(crate) struct Download<'a> {
    pub(crate) client: &'a Client,
    pub(crate) cache: &'a RepoCache,
    pub(crate) metadata: &'a Metadata,
    pub(crate) file: &'a str,
    pub(crate) subject: &'a Subject<'a>,
}

/// The file that grows.
struct Part {
    file: File,
    path: PathBuf,
    have: u64,
    hashes: Hashes,
}

enum Trouble {
    Net(Failure),
    Disk(io::Error),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Net(failure)
    }
}

impl Download<'_> {
    /// Makes the blob stand in the cache; returns the SHA-256 of its content if it was read on the way.
    pub(crate) fn run(&self, progress: &mut dyn Progress) -> Result<Option<String>> {
        let Metadata { etag, size, .. } = self.metadata;
        let blob = self.cache.blob(etag);
        progress.file(self.file, *size);
        let there = |progress: &mut dyn Progress| {
            progress.at(*size);
            progress.done();
            Ok(None)
        };
        if is_whole(&blob, *size) {
            return there(progress);
        }
        make_parent(&blob)?;
        let _lock = self.cache.lock(etag, progress)?;
        // Another program may have finished it meanwhile.
        if is_whole(&blob, *size) {
            return there(progress);
        }
        let mut part = self.open()?;
        let content = match self.complete(&mut part, progress)? {
            Ok(content) => content,
            // What was left by an earlier run may have been spoilt, or this transfer; the next tells which.
            Err(found) => {
                tracing::warn!(file = self.file, %found, "the content does not match its hash; once more from the start");
                self.restart(&mut part, progress)?;
                self.complete(&mut part, progress)?
                    .map_err(|found| self.mismatch(&part, &found))?
            }
        };
        part.file.sync_all().map_err(|e| self.disk(&part, &e))?;
        fs::rename(&part.path, &blob).map_err(|e| self.disk(&part, &e))?;
        progress.done();
        Ok(Some(content.sha256))
    }

    /// The part that an earlier run left, or an empty one.
    fn open(&self) -> Result<Part> {
        let Metadata { etag, size, .. } = self.metadata;
        let path = self.cache.incomplete(etag);
        let unread = |e: io::Error| Error::file(&path, format!("could not be opened: {e}"));
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(unread)?;
        let mut hashes = Hashes::new(etag, *size);
        let mut have = file.metadata().map_err(unread)?.len();
        if have > *size {
            file.set_len(0).map_err(unread)?;
            have = 0;
        } else if have > 0 {
            have = hashes.read(&mut file).map_err(unread)?;
            tracing::info!(file = self.file, have, "going on with an earlier download");
        }
        Ok(Part {
            file,
            path,
            have,
            hashes,
        })
    }

    /// Loads what is missing. `Ok(Err(hash))` if the whole is not what the hub names.
    fn complete(
        &self,
        part: &mut Part,
        progress: &mut dyn Progress,
    ) -> Result<std::result::Result<Content, String>> {
        let Metadata { etag, size, .. } = self.metadata;
        let (mut failed, mut mark) = (0, part.have);
        progress.at(part.have);
        while part.have < *size {
            let failure = match self.transfer(part, progress) {
                Ok(()) => continue,
                Err(Trouble::Disk(e)) => return Err(self.disk(part, &e)),
                Err(Trouble::Net(failure)) => failure,
            };
            let useless = matches!(failure, Failure::Status { code: 416, .. }) && part.have > 0;
            if useless {
                // The server has less than what is here: not the same file.
                self.restart(part, progress)?;
            }
            if part.have >= mark + WORTH {
                failed = 0;
            }
            mark = part.have;
            if failed >= self.subject.settings.retries || !(useless || failure.passes()) {
                return Err(self.subject.failed(&failure));
            }
            self.client
                .wait(failed, &failure, progress)
                .map_err(|f| self.subject.failed(&f))?;
            failed += 1;
        }
        let fresh = Hashes::new(etag, *size);
        let content = std::mem::replace(&mut part.hashes, fresh).finish();
        if content.is(etag) {
            return Ok(Ok(content));
        }
        Ok(Err(content.like(etag).unwrap_or_default().to_owned()))
    }

    /// One request, and what it brings.
    fn transfer(
        &self,
        part: &mut Part,
        progress: &mut dyn Progress,
    ) -> std::result::Result<(), Trouble> {
        let Metadata { commit, size, .. } = self.metadata;
        let path = self.subject.path;
        let mut response = self.client.body(path, commit, self.file, part.have)?;
        if response.status() == 206 {
            let range = header(response.headers(), "content-range").unwrap_or_default();
            let wanted = format!("bytes {}-{}/{size}", part.have, size.saturating_sub(1));
            if range != wanted {
                return Err(nonsense(&format!("{range:?} instead of {wanted:?}")).into());
            }
        } else if part.have > 0 {
            tracing::info!(
                file = self.file,
                "the server sends no parts; from the start"
            );
            part.clear(self.metadata).map_err(Trouble::Disk)?;
            progress.at(0);
        }
        let mut reader = response.body_mut().as_reader();
        let mut piece = vec![0; PIECE];
        while part.have < *size {
            if progress.stop() {
                return Err(Failure::Stopped.into());
            }
            let n = match reader.read(&mut piece) {
                Ok(0) => return Err(Failure::Broken("it ended too early".into()).into()),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(classify(&ureq::Error::from(e)).broken().into()),
            };
            if part.have + n as u64 > *size {
                return Err(nonsense(&format!("more than the {size} bytes it promised")).into());
            }
            part.file.write_all(&piece[..n]).map_err(Trouble::Disk)?;
            part.hashes.update(&piece[..n]);
            part.have += n as u64;
            progress.at(part.have);
        }
        Ok(())
    }

    fn restart(&self, part: &mut Part, progress: &mut dyn Progress) -> Result<()> {
        part.clear(self.metadata).map_err(|e| self.disk(part, &e))?;
        progress.at(0);
        Ok(())
    }

    fn mismatch(&self, part: &Part, found: &str) -> Error {
        // Nothing of it can be trusted. If it cannot be removed, the next run finds the mismatch again.
        let _ = fs::remove_file(&part.path);
        let etag = &self.metadata.etag;
        Error::run(format!(
            "{}: {} was downloaded twice and is not what the hub names: expected {etag}, found {found}; \
             nothing was kept. A proxy or mirror between here and {} may change files",
            self.subject.path, self.file, self.subject.settings.endpoint
        ))
    }

    fn disk(&self, part: &Part, cause: &io::Error) -> Error {
        let missing = self.metadata.size.saturating_sub(part.have);
        let advice = match cause.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => format!(
                "; free at least {missing} bytes, or set HF_HOME to a folder on a larger disk"
            ),
            _ => String::new(),
        };
        Error::file(
            &part.path,
            format!(
                "could not be written while {} was downloaded: {cause}{advice}; \
                 what has come is kept, and the same command goes on from there",
                self.subject.path
            ),
        )
    }
}

impl Part {
    fn clear(&mut self, metadata: &Metadata) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.have = 0;
        self.hashes = Hashes::new(&metadata.etag, metadata.size);
        Ok(())
    }
}

/// Whether a file of this size stands there; a link to nothing does not count.
pub(crate) fn is_whole(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == size)
}
