use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use crate::path::{HubPath, check_file, is_commit};

const VERSION: u32 = 1;

/// Pins what was used: for each file its commit, size and SHA-256.
///
/// Kept as TOML, sorted, so that two locks can be compared line by line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lock {
    files: BTreeMap<(String, String, String), Pinned>,
}

/// One file that a [`Lock`] pins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pinned {
    /// The repository, `owner/repo`.
    pub repo: String,
    /// The revision that was asked for.
    pub revision: String,
    /// The commit that it meant.
    pub commit: String,
    /// The file in the repository.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of its content in lower-case hexadecimal.
    pub sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    #[serde(default)]
    file: Vec<Pinned>,
}

impl Lock {
    /// Reads a lock file.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::file(path, format!("the lock could not be read: {e}")))?;
        let written: Written = toml::from_str(&text)
            .map_err(|e| Error::file(path, format!("is no lock of hub files: {e}")))?;
        if written.version != VERSION {
            return Err(Error::file(
                path,
                format!(
                    "is a lock of version {}, and this program reads version {VERSION}",
                    written.version
                ),
            ));
        }
        let mut lock = Self::default();
        for pinned in written.file {
            pinned.check().map_err(|what| {
                Error::file(path, format!("{} of {}: {what}", pinned.file, pinned.repo))
            })?;
            let (repo, file) = (pinned.repo.clone(), pinned.file.clone());
            if !lock.insert(pinned) {
                return Err(Error::file(path, format!("pins {file} of {repo} twice")));
            }
        }
        lock.check_commits()
            .map_err(|what| Error::file(path, what))?;
        Ok(lock)
    }

    /// Adds everything here to the lock file at `path`, wholly or not at all. What another command has pinned there
    /// meanwhile stays; one place pinned in two ways is an error.
    pub fn add_to(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let _guard = guard(path)?;
        let mut all = match path.exists() {
            true => Self::read(path)?,
            false => Self::default(),
        };
        for (key, pinned) in &self.files {
            let there = all
                .files
                .entry(key.clone())
                .or_insert_with(|| pinned.clone());
            if there != pinned {
                return Err(Error::file(
                    path,
                    format!(
                        "pins {} of {} at commit {} since another command wrote it, and this one has read commit {}; run it \
                         again",
                        there.file, there.repo, there.commit, pinned.commit
                    ),
                ));
            }
        }
        all.check_commits()
            .map_err(|what| Error::file(path, what))?;
        all.write(path)
    }

    /// Writes the lock file, wholly or not at all.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let written = Written {
            version: VERSION,
            file: self.files.values().cloned().collect(),
        };
        let text = toml::to_string(&written)
            .map_err(|e| Error::file(path, format!("the lock could not be written: {e}")))?;
        let note = "# Written by tinyfusion: what the hub's files were when they were used.\n";
        tinyfusion_checkpoint::write_atomic(path, |w| {
            w.write_all(note.as_bytes())?;
            w.write_all(text.as_bytes())
        })
    }

    /// Everything pinned, sorted by repository, revision and file.
    pub fn files(&self) -> impl Iterator<Item = &Pinned> {
        self.files.values()
    }

    /// What is pinned for `file` at the repository and revision of `path`.
    pub fn get(&self, path: &HubPath, file: &str) -> Option<&Pinned> {
        self.files.get(&(
            path.repo().to_owned(),
            path.revision().to_owned(),
            file.to_owned(),
        ))
    }

    /// The commit that is pinned for the repository and revision of `path`, by whichever file.
    pub(crate) fn commit(&self, path: &HubPath) -> Option<&str> {
        self.of(path).next().map(|p| p.commit.as_str())
    }

    /// Everything pinned for the repository and revision of `path`.
    pub(crate) fn of<'a, 'p>(
        &'a self,
        path: &'p HubPath,
    ) -> impl Iterator<Item = &'a Pinned> + use<'a, 'p> {
        self.files()
            .filter(|p| p.repo == path.repo() && p.revision == path.revision())
    }

    /// Adds a file; `false` if it was there.
    pub(crate) fn insert(&mut self, pinned: Pinned) -> bool {
        let key = (
            pinned.repo.clone(),
            pinned.revision.clone(),
            pinned.file.clone(),
        );
        self.files.insert(key, pinned).is_none()
    }

    /// A revision is one commit: files of two would be no model.
    fn check_commits(&self) -> std::result::Result<(), String> {
        let files: Vec<&Pinned> = self.files().collect();
        for pair in files.windows(2) {
            let same = pair[0].repo == pair[1].repo && pair[0].revision == pair[1].revision;
            if same && pair[0].commit != pair[1].commit {
                return Err(format!(
                    "pins {} of {} at two commits, {} and {}",
                    pair[0].revision, pair[0].repo, pair[0].commit, pair[1].commit
                ));
            }
        }
        Ok(())
    }
}

/// Held while a lock file is read and written anew. It is of the folder, for the file itself is replaced; where a system
/// locks no folders, two commands that end in the same moment are not kept apart.
fn guard(path: &Path) -> Result<Option<File>> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, e))?;
    Ok(File::open(folder).ok().filter(|f| f.lock().is_ok()))
}

impl Pinned {
    /// What is read becomes paths and addresses.
    fn check(&self) -> std::result::Result<(), String> {
        let place = format!("hub://{}/x", self.repo);
        let parsed = place.parse::<HubPath>().map_err(|e| e.to_string())?;
        if parsed.repo() != self.repo {
            return Err(format!("{:?} is no repository", self.repo));
        }
        check_file(&self.file).map_err(|what| format!("the file {what}"))?;
        crate::path::check_revision(&self.revision).map_err(|what| format!("revision {what}"))?;
        if !is_commit(&self.commit) {
            return Err(format!("{:?} is no commit", self.commit));
        }
        let hash = &self.sha256;
        if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("{hash:?} is no SHA-256"));
        }
        Ok(())
    }
}
