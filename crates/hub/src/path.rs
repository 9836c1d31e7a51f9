//! `hub://owner/repo[@revision][/file]`.

use std::fmt;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tinyfusion_core::{Error, Result};

const SCHEME: &str = "hub://";
/// What stands for itself in a URL's path, and in a revision (RFC 3986, "unreserved").
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
/// Longest name of an owner or a repository; the hub's own limit.
const LONGEST_NAME: usize = 96;

/// A place on the hub: a model repository, perhaps at a revision, perhaps a file or folder in it.
///
/// Written `hub://owner/repo[@revision][/file/with/slashes]`. A revision is a branch, a tag or a commit; one with
/// slashes is percent-encoded (`@refs%2Fpr%2F1`), because a slash begins the file. `Display` writes what `FromStr` reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HubPath {
    repo: String,
    revision: Option<String>,
    file: Option<String>,
}

impl HubPath {
    /// The revision that is meant when none is written.
    pub const DEFAULT_REVISION: &str = "main";

    /// Whether `text` means a place on the hub rather than a path of this machine.
    pub fn is_hub(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// The repository, `owner/repo`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// The revision, [`Self::DEFAULT_REVISION`] when none was written.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(Self::DEFAULT_REVISION)
    }

    /// The file or folder inside the repository.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// The same repository and revision, and `file` in it.
    pub fn with_file(&self, file: &str) -> Result<Self> {
        check_file(file).map_err(|what| Error::usage(format!("{self}: {file:?} {what}")))?;
        Ok(Self {
            file: Some(file.to_owned()),
            ..self.clone()
        })
    }
}

impl fmt::Display for HubPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.repo)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{}", utf8_percent_encode(revision, ESCAPED))?;
        }
        match &self.file {
            Some(file) => write!(f, "/{file}"),
            None => Ok(()),
        }
    }
}

impl FromStr for HubPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text).map_err(|what| {
            Error::usage(format!(
                "{text:?}: {what}; a place on the hub is written hub://owner/repo[@revision][/file]"
            ))
        })
    }
}

fn parse(text: &str) -> std::result::Result<HubPath, String> {
    let rest = text
        .strip_prefix(SCHEME)
        .ok_or_else(|| format!("does not begin with {SCHEME}"))?;
    let (owner, rest) = rest
        .split_once('/')
        .ok_or("names an owner but no repository")?;
    let (name, file) = match rest.split_once('/') {
        Some((name, file)) => (name, Some(file)),
        None => (rest, None),
    };
    let (name, revision) = match name.split_once('@') {
        Some((name, revision)) => (name, Some(decode(revision)?)),
        None => (name, None),
    };
    if ["datasets", "spaces"].contains(&owner) {
        return Err(format!("{owner} are not models, and only models are read"));
    }
    check_name("owner", owner)?;
    check_name("repository", name)?;
    if let Some(revision) = &revision {
        check_revision(revision).map_err(|what| format!("the revision {revision:?} {what}"))?;
    }
    // A slash at the end is how people write folders.
    let file = file
        .map(|f| f.strip_suffix('/').unwrap_or(f))
        .filter(|f| !f.is_empty());
    if let Some(file) = file {
        check_file(file).map_err(|what| format!("the file {file:?} {what}"))?;
    }
    Ok(HubPath {
        repo: format!("{owner}/{name}"),
        revision,
        file: file.map(str::to_owned),
    })
}

fn decode(revision: &str) -> std::result::Result<String, String> {
    let bytes = revision.as_bytes();
    for (i, _) in revision.match_indices('%') {
        let digits = bytes.get(i + 1..i + 3).unwrap_or_default();
        if digits.len() < 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(format!(
                "the revision {revision:?} has a % that is no percent-encoding (write it %25)"
            ));
        }
    }
    match percent_decode_str(revision).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(format!("the revision {revision:?} is not UTF-8")),
    }
}

/// The hub's rules for names. `--` matters to us too: it separates owner and name in the cache.
fn check_name(what: &str, name: &str) -> std::result::Result<(), String> {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: char| matches!(c, '-' | '.');
    let complaint = if name.is_empty() {
        "is missing"
    } else if name.len() > LONGEST_NAME {
        "is longer than the hub allows"
    } else if !name.chars().all(letter) {
        "may hold only letters, digits, '-', '_' and '.'"
    } else if name.contains("--") || name.contains("..") || name.ends_with(".git") {
        "may not hold '--' or '..' or end in '.git'"
    } else if name.starts_with(edge) || name.ends_with(edge) {
        "may not begin or end with '-' or '.'"
    } else {
        return Ok(());
    };
    Err(format!("the {what} {name:?} {complaint}"))
}

/// git's rules, as far as they keep a revision from meaning another place in the cache.
pub(crate) fn check_revision(revision: &str) -> std::result::Result<(), &'static str> {
    if revision.is_empty() {
        return Err("is empty");
    }
    let forbidden = |c: char| c.is_control() || " ~^:?*[\\".contains(c);
    if revision.contains(forbidden) || revision.contains("..") {
        return Err("is no name of a branch, tag or commit");
    }
    check_segments(revision)
}

/// A file must stay inside its repository, on every system.
pub(crate) fn check_file(file: &str) -> std::result::Result<(), &'static str> {
    if file.contains(|c: char| c.is_control() || c == '\\') {
        return Err("holds a character that no file of the hub has");
    }
    if cfg!(windows) && file.contains(':') {
        return Err("holds a colon, which this system does not allow");
    }
    check_segments(file)
}

fn check_segments(path: &str) -> std::result::Result<(), &'static str> {
    if path.split('/').any(|s| matches!(s, "" | "." | "..")) {
        return Err("has an empty part, '.' or '..'");
    }
    Ok(())
}

/// Whether a revision is a commit, which never changes.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A revision or one part of a file's path, as it stands in a URL.
pub(crate) fn escape(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}
