//! Failures in words: which file, what is wrong, what to do.

use std::path::PathBuf;

use tinyfusion_core::Error;

use crate::client::{Contents, file_url};
use crate::failure::Failure;
use crate::path::HubPath;
use crate::settings::Settings;

/// What a message is about.
pub(crate) struct Subject<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) path: &'a HubPath,
    pub(crate) revision: &'a str,
    /// A file; `None` when it is about the list of files.
    pub(crate) file: Option<&'a str>,
    /// Where a file downloaded by hand is found, or the folder for several.
    pub(crate) by_hand: PathBuf,
}

impl Subject<'_> {
    /// `the file vae/config.json of facebook/DiT-XL-2-256 (revision main)`.
    fn name(&self) -> String {
        let (repo, revision) = (self.path.repo(), self.revision);
        match self.file {
            Some(file) => format!("the file {file} of {repo} (revision {revision})"),
            None => format!("the list of files of {repo} (revision {revision})"),
        }
    }

    /// Which file to fetch with a browser and where to put it.
    fn hand(&self) -> String {
        let place = self.by_hand.display();
        match self.file {
            Some(file) => {
                let url = file_url(self.settings, self.path, self.revision, file);
                format!("download {url} by hand and put it at {place}")
            }
            None => format!(
                "download the files of {} by hand and put them into {place}",
                self.page()
            ),
        }
    }

    fn page(&self) -> String {
        format!("{}/{}", self.settings.endpoint, self.path.repo())
    }

    /// The network is forbidden, and the cache lacks it.
    pub(crate) fn offline(&self) -> Error {
        Error::run(format!(
            "{}: {} is not in the cache, and offline mode is on: run once without it (HF_HUB_OFFLINE), or {}",
            self.path,
            self.name(),
            self.hand()
        ))
    }

    /// A failure that no repetition and no cache has mended.
    pub(crate) fn failed(&self, failure: &Failure) -> Error {
        let (path, name) = (self.path, self.name());
        let endpoint = &self.settings.endpoint;
        match failure {
            Failure::Stopped => Error::Stopped,
            Failure::Status {
                code, error_code, ..
            } if !failure.passes() => self.refused(*code, error_code.as_deref(), failure),
            Failure::Status { .. } => Error::run(format!(
                "{path}: {name}: {}, {}; try again later (what has come is kept), or {}",
                failure.brief(),
                self.times(),
                self.hand()
            )),
            Failure::Unreachable(cause) => Error::run(format!(
                "{path}: {name} is not in the cache, and {endpoint} cannot be reached ({cause}); without a network, {}",
                self.hand()
            )),
            Failure::Broken(cause) => Error::run(format!(
                "{path}: {name}: the connection broke {} ({cause}); the same command goes on where it ended, or {}",
                self.times(),
                self.hand()
            )),
            Failure::Nonsense(what) => Error::run(format!(
                "{path}: {name}: {what}; is {endpoint} (HF_ENDPOINT) a hub? If not, {}",
                self.hand()
            )),
        }
    }

    /// There is no such file, but there are others.
    pub(crate) fn no_such_file(&self, contents: &Contents) -> Error {
        let names: Vec<&str> = contents.files.iter().map(|(f, _)| f.as_str()).collect();
        Error::usage(format!(
            "{}: {} has no file or folder {:?} at revision {}; {}",
            self.path,
            self.path.repo(),
            self.file.unwrap_or_default(),
            self.revision,
            some_of(&names)
        ))
    }

    /// The folder has nothing of what is wanted.
    pub(crate) fn nothing_wanted(&self, wanted: &str, names: &[&str], frozen: bool) -> Error {
        let place = match (frozen, self.settings.offline) {
            (true, _) => "the lock pins there",
            (false, true) => "the cache has there (offline mode is on)",
            (false, false) => "is there",
        };
        Error::usage(format!(
            "{}: no {wanted} {place} at revision {}; {}",
            self.path,
            self.revision,
            some_of(names)
        ))
    }

    fn times(&self) -> String {
        match self.settings.retries {
            0 => "once".into(),
            n => format!("{} times in a row", n + 1),
        }
    }

    /// The server knows what is asked for, and says no.
    fn refused(&self, code: u16, error_code: Option<&str>, failure: &Failure) -> Error {
        let (path, repo, revision) = (self.path, self.path.repo(), self.revision);
        let (endpoint, page) = (&self.settings.endpoint, self.page());
        let token = match self.settings.token {
            Some(_) => "the token that was sent (HF_TOKEN) does not open it",
            None => "no token was sent: set HF_TOKEN",
        };
        // What a person may see in a browser needs no token here; offline mode, since the hub would refuse again.
        let by_hand = format!("or {}, and set HF_HUB_OFFLINE=1", self.hand());
        let message = match (code, error_code) {
            (_, Some("GatedRepo")) => {
                let then = match self.settings.token {
                    Some(_) => "with the account of the token that was sent (HF_TOKEN)".into(),
                    None => format!(
                        "and set HF_TOKEN to a token of that account ({endpoint}/settings/tokens)"
                    ),
                };
                format!("{repo} is gated: accept the licence at {page} {then}; {by_hand}")
            }
            (401 | 404, Some("RepoNotFound")) => format!(
                "{endpoint} has no model repository {repo}, or it is private; check the spelling, and \
                 for a private one: {token}; {by_hand}"
            ),
            (404, Some("RevisionNotFound")) => format!(
                "{repo} has no revision {revision:?}; its branches, tags and commits are at {page}/tree/main"
            ),
            (404, Some("EntryNotFound")) => format!(
                "{repo} has no file {:?} at revision {revision}; its files are at {page}/tree/main",
                self.file.unwrap_or_default()
            ),
            (401, _) => format!("{repo} wants to know who asks; {token}; {by_hand}"),
            (403, _) => format!(
                "{repo} may not be read ({}); {token}; {by_hand}",
                failure.brief()
            ),
            (404, _) => format!("{} is not at {endpoint}; {by_hand}", self.name()),
            _ => return Error::run(format!("{path}: {}: {}", self.name(), failure.brief())),
        };
        Error::usage(format!("{path}: {message}"))
    }
}

/// The first of these names, for a message.
fn some_of(names: &[&str]) -> String {
    const SHOWN: usize = 12;
    match names.len() {
        0 => "there is no file at all".into(),
        n if n <= SHOWN => format!("there is {}", names.join(", ")),
        n => format!(
            "there is {} and {} more",
            names[..SHOWN].join(", "),
            n - SHOWN
        ),
    }
}
