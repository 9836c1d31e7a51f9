//! `hub://owner/repo[@revision][/file]` in the place of a path: what a command reads is fetched before it runs, so that
//! every command sees paths of this machine alone.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tinyfusion::core::Error;
use tinyfusion::hub::{self, Hub, HubPath, Lock};
use tinyfusion::train::{Progress, Stop};

use crate::output::{note, progress_bar};

/// An argument that says where something is read.
pub(crate) trait Origin {
    /// As the user gave it, unless that is no text.
    fn text(&self) -> Option<&str>;
    fn set(&mut self, path: String);
}

impl Origin for PathBuf {
    fn text(&self) -> Option<&str> {
        self.to_str()
    }
    fn set(&mut self, path: String) {
        *self = path.into();
    }
}

impl Origin for String {
    fn text(&self) -> Option<&str> {
        Some(self)
    }
    fn set(&mut self, path: String) {
        *self = path;
    }
}

/// Everything that a command reads.
#[derive(Default)]
pub(crate) struct Inputs<'a>(Vec<&'a mut dyn Origin>);

impl<'a> Inputs<'a> {
    /// One, some or none more: `[&mut path]`, `&mut option`, `&mut list`.
    pub(crate) fn and<T: Origin + 'a>(mut self, more: impl IntoIterator<Item = &'a mut T>) -> Self {
        let more = more.into_iter().map(|origin| origin as &mut dyn Origin);
        self.0.extend(more);
        self
    }
}

/// Puts local paths in the place of every input that stands on the hub; downloads what the cache lacks.
///
/// `words` are those of the command line: a place on the hub that is no input cannot be written.
pub(crate) fn fetch(
    inputs: Inputs<'_>,
    words: &[OsString],
    lock: Option<&Path>,
    stop: &Stop,
) -> Result<()> {
    let mut wanted: Vec<(&mut dyn Origin, String)> = inputs
        .0
        .into_iter()
        .filter_map(|origin| {
            let text = origin.text().filter(|text| HubPath::is_hub(text))?;
            let text = text.to_owned();
            Some((origin, text))
        })
        .collect();
    let read: BTreeSet<&str> = wanted.iter().map(|(_, text)| text.as_str()).collect();
    refuse_others(words, &read)?;
    if wanted.is_empty() {
        return Ok(());
    }
    let mut client = Client::new(lock)?;
    for (origin, text) in &mut wanted {
        let local = client.resolve(text, stop)?;
        origin.set(local);
    }
    Ok(())
}

/// The hub as the environment sets it up, with the lock that was asked for.
pub(crate) struct Client<'a> {
    hub: Hub,
    lock: Option<&'a Path>,
}

impl<'a> Client<'a> {
    pub(crate) fn new(lock: Option<&'a Path>) -> Result<Self> {
        let mut hub = Hub::new(hub::Settings::from_env()?);
        if let Some(path) = lock {
            let lock = match path.exists() {
                true => Lock::read(path)?,
                false => Lock::default(),
            };
            hub = hub.with_lock(lock);
        }
        Ok(Self { hub, lock })
    }

    /// The local path of a place on the hub, and behind it what is said behind the place (`#ema`).
    fn resolve(&mut self, text: &str, stop: &Stop) -> Result<String> {
        let (place, words) = match text.split_once('#') {
            Some((place, words)) => (place, Some(words)),
            None => (text, None),
        };
        let local = self.pull(&place.parse()?, stop)?;
        let local = local.to_str().ok_or_else(|| {
            Error::file(
                &local,
                "the hub's cache stands in a folder whose name is no text; set HF_HOME to another one",
            )
        })?;
        Ok(match words {
            Some(words) => format!("{local}#{words}"),
            None => local.to_owned(),
        })
    }

    /// Downloads what the cache lacks of a place on the hub.
    pub(crate) fn pull(&mut self, place: &HubPath, stop: &Stop) -> Result<PathBuf> {
        let local = self.hub.resolve(place, &mut Bar { bar: None, stop })?;
        self.write_lock()?;
        tracing::info!("{place}: {}", local.display());
        Ok(local)
    }

    /// What [`Self::pull`] would need; downloads nothing.
    pub(crate) fn list(&self, place: &HubPath, stop: &Stop) -> Result<Vec<hub::Listed>> {
        let mut bar = Bar { bar: None, stop };
        Ok(self.hub.list(place, &hub::Selection::model(), &mut bar)?)
    }

    /// Adds all that was pulled so far to the lock file.
    fn write_lock(&self) -> Result<()> {
        match (self.lock, self.hub.lock()) {
            (Some(path), Some(lock)) => Ok(lock.add_to(path)?),
            _ => Ok(()),
        }
    }
}

/// An error if a word of the command line is a place on the hub that is not among those that are `read`.
fn refuse_others(words: &[OsString], read: &BTreeSet<&str>) -> Result<()> {
    for word in words.iter().filter_map(|word| word.to_str()) {
        let value = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => value,
            _ => word,
        };
        if HubPath::is_hub(value) && !read.contains(value) {
            return Err(Error::usage(format!(
                "{value}: only what is read can stand on the hub; this argument is written, or is of this machine \
                 alone: give a path"
            ))
            .into());
        }
    }
    Ok(())
}

/// Shows a download.
struct Bar<'a> {
    bar: Option<Progress>,
    stop: &'a Stop,
}

/// Bars count in units of which people know the size.
const MB: u64 = 1_000_000;

impl hub::Progress for Bar<'_> {
    fn plan(&mut self, files: usize, bytes: u64) {
        let word = if files == 1 { "file" } else { "files" };
        note(format_args!(
            "to download: {files} {word}, {} MB",
            bytes.div_ceil(MB)
        ));
    }

    fn file(&mut self, name: &str, bytes: u64) {
        let name = name.rsplit('/').next().unwrap_or(name);
        self.bar = Some(progress_bar(&format!("{name}, MB"), bytes.div_ceil(MB)));
    }

    fn at(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set(bytes / MB, String::new());
        }
    }

    fn done(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    fn stop(&self) -> bool {
        self.stop.requested()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_written_is_refused() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let read = BTreeSet::from(["hub://a/b"]);
        refuse_others(
            &words("tinyfusion cut hub://a/b out --vae=hub://a/b"),
            &read,
        )
        .unwrap();
        for wrong in ["cut hub://a/b hub://a/c", "cut hub://a/b --out=hub://a/c"] {
            let error = refuse_others(&words(wrong), &read).unwrap_err();
            let usage = error.downcast_ref::<Error>();
            assert!(matches!(usage, Some(Error::Usage(_))), "{error}");
            assert!(error.to_string().contains("hub://a/c"), "{error}");
        }
    }

    #[test]
    fn paths_of_this_machine_are_left_alone() {
        let (mut model, mut data) = (PathBuf::from("runs/hub:/x"), Some("shapes".to_string()));
        let inputs = Inputs::default().and([&mut model]).and(&mut data);
        fetch(inputs, &[], None, &Stop::default()).unwrap();
        assert_eq!(
            (model.to_str(), data.as_deref()),
            (Some("runs/hub:/x"), Some("shapes"))
        );
    }
}
