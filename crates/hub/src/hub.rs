use std::fs;
use std::path::{Path, PathBuf};

use tinyfusion_checkpoint::require_space;
use tinyfusion_core::{Error, Result};

use crate::cache::RepoCache;
use crate::client::{Client, Contents};
use crate::download::{Download, is_whole};
use crate::explain::Subject;
use crate::failure::Failure;
use crate::folders::{walk, within};
use crate::hashes::Content;
use crate::lock::{Lock, Pinned};
use crate::path::{HubPath, is_commit};
use crate::progress::Progress;
use crate::selection::Selection;
use crate::settings::Settings;

/// Turns places on the hub into files of this machine.
///
/// What the cache has is taken from there; what it lacks is downloaded into it, verified, and taken from there.
pub struct Hub {
    client: Client,
    lock: Option<Lock>,
    frozen: bool,
}

/// A folder of a repository, as far as it was wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// Where it stands.
    pub root: PathBuf,
    /// The wanted files, relative to it.
    pub files: Vec<String>,
}

/// A wanted file before it is downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The file in the repository.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// Whether the cache has it.
    pub cached: bool,
}

/// A file that could not be had.
enum Miss {
    /// The repository has no such file; there may be a folder of that name.
    NoSuchFile(Failure),
    Other(Error),
}

impl From<Error> for Miss {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// The local path of one place on the hub: [`Hub::resolve`] without a lock.
pub fn resolve(
    path: &HubPath,
    settings: &Settings,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    Hub::new(settings.clone()).resolve(path, progress)
}

impl Hub {
    /// A hub without a lock.
    pub fn new(settings: Settings) -> Self {
        Self {
            client: Client::new(settings),
            lock: None,
            frozen: false,
        }
    }

    /// Verifies every file against `lock`, takes the commits that it pins, and adds what it does not pin yet.
    pub fn with_lock(mut self, lock: Lock) -> Self {
        self.lock = Some(lock);
        self
    }

    /// Makes a file that the lock does not pin an error.
    pub fn frozen(mut self) -> Self {
        self.frozen = true;
        self
    }

    /// The lock with everything that was resolved so far, if there is one.
    pub fn lock(&self) -> Option<&Lock> {
        self.lock.as_ref()
    }

    /// The local path of a file, or of a folder with everything that a model needs ([`Selection::model`]).
    pub fn resolve(&mut self, path: &HubPath, progress: &mut dyn Progress) -> Result<PathBuf> {
        let Some(file) = path.file() else {
            return Ok(self.folder(path, &Selection::model(), progress)?.root);
        };
        let revision = self.revision(path);
        let snapshot = self.snapshot(path, &revision);
        let pinned_folder = self.frozen
            && self.lock.as_ref().is_some_and(|lock| {
                lock.of(path)
                    .any(|p| within(file, &p.file).is_some_and(|rest| !rest.is_empty()))
            });
        if pinned_folder || snapshot.join(file).is_dir() {
            return Ok(self.folder(path, &Selection::model(), progress)?.root);
        }
        match self.file(path, file, &revision, None, progress) {
            Ok(local) => Ok(local),
            Err(Miss::Other(error)) => Err(error),
            Err(Miss::NoSuchFile(failure)) => {
                let subject = self.subject(path, &revision, Some(file));
                let Ok(contents) = self.client.contents(path, &revision, progress) else {
                    return Err(subject.failed(&failure));
                };
                let is_folder = contents
                    .files
                    .iter()
                    .any(|(f, _)| within(file, f).is_some());
                if !is_folder {
                    return Err(subject.no_such_file(&contents));
                }
                Ok(self.folder(path, &Selection::model(), progress)?.root)
            }
        }
    }

    /// The wanted files of a repository, or of the folder in it that `path` names.
    pub fn folder(
        &mut self,
        path: &HubPath,
        selection: &Selection,
        progress: &mut dyn Progress,
    ) -> Result<Folder> {
        let revision = self.revision(path);
        let contents = self.contents(path, &revision, progress)?;
        let wanted = self.wanted(path, selection, &contents)?;
        let prefix = path.file().unwrap_or_default();
        let inside: Vec<&str> = wanted
            .iter()
            .filter_map(|(f, _)| within(prefix, f))
            .collect();
        if let Some(several) = selection.undecided(&inside) {
            return Err(Error::usage(format!(
                "{path}: holds several checkpoints ({}), and nothing that says which is meant; name one: {path}/{}",
                several.join(", "),
                several[0]
            )));
        }
        let commit = &contents.commit;
        if !self.frozen {
            // Before the first file: a download that is broken off leaves a part, and nobody should take it for the whole.
            RepoCache::new(&self.client.settings, path).remember_files(&contents)?;
        }

        let snapshot = self.snapshot(path, commit);
        let missing: Vec<u64> = wanted
            .iter()
            .filter(|(file, size)| !is_whole(&snapshot.join(file), *size))
            .map(|(_, size)| *size)
            .collect();
        if !missing.is_empty() {
            let bytes = missing.iter().sum();
            progress.plan(missing.len(), bytes);
            require_space(
                &self.client.settings.cache,
                bytes,
                "make room, or set HF_HOME to a folder on a larger disk",
            )?;
        }
        for (file, size) in &wanted {
            self.file(path, file, commit, Some(*size), progress)
                .map_err(|miss| match miss {
                    Miss::Other(error) => error,
                    Miss::NoSuchFile(failure) => {
                        self.subject(path, commit, Some(file)).failed(&failure)
                    }
                })?;
        }
        if is_commit(commit) && revision == path.revision() {
            RepoCache::new(&self.client.settings, path).remember(&revision, commit)?;
        }
        Ok(Folder {
            root: match path.file() {
                Some(folder) => snapshot.join(folder),
                None => snapshot,
            },
            files: wanted
                .iter()
                .filter_map(|(f, _)| Some(within(prefix, f)?.to_owned()))
                .collect(),
        })
    }

    /// What [`Self::resolve`] or [`Self::folder`] would need, with sizes; downloads nothing.
    pub fn list(
        &self,
        path: &HubPath,
        selection: &Selection,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Listed>> {
        let revision = self.revision(path);
        let contents = self.contents(path, &revision, progress)?;
        let named = contents
            .files
            .iter()
            .find(|(f, _)| Some(f.as_str()) == path.file());
        let wanted = match named {
            Some(file) => vec![file.clone()],
            None => self.wanted(path, selection, &contents)?,
        };
        let snapshot = self.snapshot(path, &contents.commit);
        Ok(wanted
            .into_iter()
            .map(|(file, size)| Listed {
                cached: is_whole(&snapshot.join(&file), size),
                file,
                size,
            })
            .collect())
    }

    /// The revision to ask for: the pinned commit if there is one.
    fn revision(&self, path: &HubPath) -> String {
        let pinned = self.lock.as_ref().and_then(|lock| lock.commit(path));
        pinned.unwrap_or(path.revision()).to_owned()
    }

    fn snapshot(&self, path: &HubPath, revision: &str) -> PathBuf {
        let cache = RepoCache::new(&self.client.settings, path);
        cache.snapshot(&cache.commit_of(revision))
    }

    fn subject<'s>(
        &'s self,
        path: &'s HubPath,
        revision: &'s str,
        file: Option<&'s str>,
    ) -> Subject<'s> {
        let snapshot = self.snapshot(path, revision);
        Subject {
            settings: &self.client.settings,
            path,
            revision,
            by_hand: snapshot.join(file.unwrap_or_default()),
            file,
        }
    }

    /// One file into the cache.
    fn file(
        &mut self,
        path: &HubPath,
        file: &str,
        revision: &str,
        size: Option<u64>,
        progress: &mut dyn Progress,
    ) -> std::result::Result<PathBuf, Miss> {
        if self.frozen
            && self
                .lock
                .as_ref()
                .is_none_or(|l| l.get(path, file).is_none())
        {
            return Err(Miss::Other(Error::usage(format!(
                "{path}: the lock does not pin {file} at revision {}, and only pinned files may be used",
                path.revision()
            ))));
        }
        let (local, commit, sha256) = self.find(path, file, revision, size, progress)?;
        self.settle(path, file, &commit, &local, sha256, progress)?;
        Ok(local)
    }

    /// The file's path, its commit, and its SHA-256 if that is known by the way.
    fn find(
        &self,
        path: &HubPath,
        file: &str,
        revision: &str,
        size: Option<u64>,
        progress: &mut dyn Progress,
    ) -> std::result::Result<(PathBuf, String, Option<String>), Miss> {
        let settings = &self.client.settings;
        let cache = RepoCache::new(settings, path);
        let known = cache.commit_of(revision);
        let local = cache.snapshot(&known).join(file);
        let cached = match size {
            Some(size) => is_whole(&local, size),
            None => local.is_file(),
        };
        // A commit never changes, so the hub need not be asked.
        if cached && (settings.offline || is_commit(revision)) {
            return Ok((local, known, None));
        }
        let subject = self.subject(path, revision, Some(file));
        if settings.offline {
            return Err(Miss::Other(subject.offline()));
        }
        let metadata = match self.client.metadata(path, revision, file, progress) {
            Ok(metadata) => metadata,
            Err(failure) if failure.no_such_file() => return Err(Miss::NoSuchFile(failure)),
            Err(failure) if failure.passes() && cached => {
                tracing::warn!(%path, file, "the hub does not answer ({}); taking what the cache has", failure.brief());
                return Ok((local, known, None));
            }
            Err(failure) => return Err(Miss::Other(subject.failed(&failure))),
        };
        let commit = metadata.commit.clone();
        if is_commit(revision) && revision != commit {
            let odd = Failure::Nonsense(format!("the server sent commit {commit} instead"));
            return Err(Miss::Other(subject.failed(&odd)));
        }
        let pointer = cache.snapshot(&commit).join(file);
        let (pointer, sha256) =
            if is_whole(&pointer, metadata.size) && is_sound(&pointer, &metadata.etag) {
                (pointer, None)
            } else {
                let download = Download {
                    client: &self.client,
                    cache: &cache,
                    metadata: &metadata,
                    file,
                    subject: &subject,
                };
                let sha256 = download.run(progress)?;
                (cache.point(&commit, file, &metadata.etag)?, sha256)
            };
        cache.remember(revision, &commit)?;
        Ok((pointer, commit, sha256))
    }

    /// The repository's files: from the hub, or from the lock or the cache if it may not be or cannot be asked.
    fn contents(
        &self,
        path: &HubPath,
        revision: &str,
        progress: &mut dyn Progress,
    ) -> Result<Contents> {
        if let Some(lock) = self.lock.as_ref().filter(|_| self.frozen) {
            return Ok(Contents {
                sized: true,
                commit: revision.to_owned(),
                files: lock.of(path).map(|p| (p.file.clone(), p.size)).collect(),
            });
        }
        let subject = self.subject(path, revision, None);
        let failure = if self.client.settings.offline {
            None
        } else {
            match self.client.contents(path, revision, progress) {
                Ok(contents) => return Ok(contents),
                Err(failure) if failure.passes() => Some(failure),
                Err(failure) => return Err(subject.failed(&failure)),
            }
        };
        let cache = RepoCache::new(&self.client.settings, path);
        let commit = cache.commit_of(revision);
        // What stands in the cache may be a part of it: of a folder that was not downloaded to its end, or of which
        // somebody wanted one file.
        let files = match cache.files_of(&commit).filter(|_| is_commit(&commit)) {
            Some(files) => files,
            None => {
                let mut files = Vec::new();
                let snapshot = cache.snapshot(&commit);
                walk(&snapshot, "", &mut files)
                    .map_err(|e| Error::file(&snapshot, format!("could not be listed: {e}")))?;
                files.sort();
                files
            }
        };
        match (files.is_empty(), failure) {
            (false, failure) => {
                if let Some(failure) = failure {
                    tracing::warn!(%path, "the hub does not answer ({}); taking what the cache has", failure.brief());
                }
                Ok(Contents {
                    sized: true,
                    commit,
                    files,
                })
            }
            (true, Some(failure)) => Err(subject.failed(&failure)),
            (true, None) => Err(subject.offline()),
        }
    }

    /// The wanted files of the folder that `path` names, with their whole paths and sizes.
    fn wanted(
        &self,
        path: &HubPath,
        selection: &Selection,
        contents: &Contents,
    ) -> Result<Vec<(String, u64)>> {
        let prefix = path.file().unwrap_or_default();
        let inside: Vec<(&str, u64)> = contents
            .files
            .iter()
            .filter_map(|(f, size)| Some((within(prefix, f)?, *size)))
            .collect();
        let names: Vec<&str> = inside.iter().map(|(f, _)| *f).collect();
        let Some(picked) = selection.pick(&names) else {
            let subject = self.subject(path, &contents.commit, None);
            return Err(subject.nothing_wanted(&selection.wanted(), &names, self.frozen));
        };
        let whole = |f: &str| match prefix {
            "" => f.to_owned(),
            _ => format!("{prefix}/{f}"),
        };
        Ok(inside
            .iter()
            .filter(|(f, _)| picked.contains(f))
            .map(|(f, size)| (whole(f), *size))
            .collect())
    }

    /// Compares with the lock, or adds to it.
    fn settle(
        &mut self,
        path: &HubPath,
        file: &str,
        commit: &str,
        local: &Path,
        sha256: Option<String>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let Some(lock) = &mut self.lock else {
            return Ok(());
        };
        let unread = |e| Error::file(local, format!("could not be read: {e}"));
        let size = fs::metadata(local).map_err(unread)?.len();
        let sha256 = match sha256 {
            Some(sha256) => sha256,
            None => {
                progress.file(&format!("verifying {file}"), size);
                let content = Content::watched(local, progress).map_err(unread)?;
                progress.done();
                content.ok_or(Error::Stopped)?.sha256
            }
        };
        match lock.get(path, file) {
            Some(pinned) if pinned.size == size && pinned.sha256.eq_ignore_ascii_case(&sha256) => {
                Ok(())
            }
            Some(pinned) => Err(Error::file(
                local,
                format!(
                    "is not the {file} of {} that the lock pins at commit {}: expected SHA-256 {} ({} bytes), \
                     found {sha256} ({size} bytes); delete {} to download it again, or its entry in the lock if the \
                     change is meant",
                    pinned.repo,
                    pinned.commit,
                    pinned.sha256,
                    pinned.size,
                    // Where the content is: without its link alone the same content would be linked again.
                    fs::canonicalize(local)
                        .unwrap_or_else(|_| local.to_path_buf())
                        .display()
                ),
            )),
            None => {
                if !is_commit(commit) {
                    return Err(Error::file(
                        local,
                        format!(
                            "was put there by hand without its commit, so that {path} cannot be pinned; \
                             ask the hub once, or do without a lock"
                        ),
                    ));
                }
                lock.insert(Pinned {
                    repo: path.repo().to_owned(),
                    revision: path.revision().to_owned(),
                    commit: commit.to_owned(),
                    file: file.to_owned(),
                    size,
                    sha256,
                });
                Ok(())
            }
        }
    }
}

/// A link leads to a blob that was verified under its name. A plain file was put there by hand (or, where links need
/// privileges, by a copy), and is compared with what the hub names.
fn is_sound(pointer: &Path, etag: &str) -> bool {
    let link = fs::symlink_metadata(pointer).is_ok_and(|m| m.is_symlink());
    let sound = link || Content::of(pointer, etag).is_ok_and(|content| content.is(etag));
    if !sound {
        tracing::warn!(file = %pointer.display(), "is not what the hub names; downloading it");
    }
    sound
}
