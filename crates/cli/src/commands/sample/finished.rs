//! What a folder has from a run that came to its end.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};
use tinyfusion::core::{Error, Result};

use super::parts::{Parts, differs, setting};
use crate::output::warn;

pub(super) const NPZ: &str = "samples.npz";
pub(super) const RECORD: &str = "sample.json";
/// Entries of the record that are of the run, and no settings.
pub(super) const SECONDS: &str = "seconds";
pub(super) const IMAGES_PER_SECOND: &str = "images_per_second";
/// Size of samples.npz, by which a damaged one is known.
pub(super) const BYTES: &str = "samples_bytes";

/// The record of the samples of these settings, if `out` has them whole.
///
/// # Errors
/// Where samples of other settings, or of nobody knows which, stand there: they are not written over.
pub(super) fn look(
    out: &Path,
    settings: &Map<String, Value>,
) -> Result<Option<Map<String, Value>>> {
    let (path, npz) = (out.join(RECORD), out.join(NPZ));
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // A run that was killed between the two files has its parts still.
        Err(e) if e.kind() == ErrorKind::NotFound && npz.exists() && !Parts::wait_in(out) => {
            return Err(Error::usage(format!(
                "{}: stands there without a {RECORD} that says what it holds; name another folder",
                npz.display()
            )));
        }
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::file(&path, format!("could not be read: {e}"))),
    };
    let record: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
        Error::file(
            &path,
            format!("is no record of samples ({e}); name another folder"),
        )
    })?;
    let mut there = record.clone();
    for of_the_run in [SECONDS, IMAGES_PER_SECOND, BYTES] {
        there.remove(of_the_run);
    }
    if let Some(key) = differs(&there, settings) {
        return Err(Error::usage(format!(
            "{}: samples of other settings stand there ({key} {}, asked for: {}); name another folder",
            path.display(),
            setting(&there, key),
            setting(settings, key)
        )));
    }
    let expected = record.get(BYTES).and_then(Value::as_u64);
    match fs::metadata(&npz) {
        Ok(found) if expected.is_none_or(|bytes| bytes == found.len()) => Ok(Some(record)),
        Ok(found) => {
            warn(format_args!(
                "{}: is damaged: {} bytes are expected, {} are there; the samples are drawn again",
                npz.display(),
                expected.unwrap_or_default(),
                found.len()
            ));
            Ok(None)
        }
        Err(e) => {
            warn(format_args!(
                "{}: could not be read ({e}), though {RECORD} speaks of it; the samples are drawn again",
                npz.display()
            ));
            Ok(None)
        }
    }
}
