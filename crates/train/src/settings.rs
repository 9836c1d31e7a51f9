use std::collections::BTreeMap;
use std::path::Path;

use tinyfusion_core::{Error, Result};
use toml::{Table, Value};

/// Where a program's settings say on which device a run computes.
const DEVICE: &str = "compute.device";
/// Where they say in which numbers; a folder that does not say is of f32.
const DTYPE: &str = "compute.dtype";

/// Compares the settings of a run directory (`old`, from `path`) with those of a call (`new`), by value: a
/// setting written in another form is the same setting. How often is logged and saved may change on the way: it
/// does not change what is learned. So may the device, which changes last bits and gets a word; the type of the numbers
/// may not.
///
/// The error lists every difference with both values.
pub(crate) fn refuse_other_settings(path: &Path, old: &str, new: &str) -> Result<()> {
    let parse = |text: &str| text.parse::<Table>();
    let mut was = flat(parse(old).map_err(|e| {
        Error::file(
            path,
            format!("does not parse: {e}; it should hold the settings of this run"),
        )
    })?);
    let now = flat(parse(new).map_err(|e| Error::run(format!("the settings do not parse: {e}")))?);
    if now.contains_key(DTYPE) {
        was.entry(DTYPE.into()).or_insert_with(|| "f32".into());
    }
    let folder = path.parent().unwrap_or(path).display();
    let show = |value: Option<&Value>| value.map_or("not set".into(), ToString::to_string);
    let mut differences: Vec<String> = was
        .keys()
        .chain(now.keys().filter(|k| !was.contains_key(*k)))
        .filter(|key| was.get(*key) != now.get(*key) && !is_free(key))
        .map(|key| {
            format!(
                "`{key}` was {}, is now {}",
                show(was.get(key)),
                show(now.get(key))
            )
        })
        .collect();
    if differences.is_empty() {
        if let (Some(was), Some(now)) = (was.get(DEVICE), now.get(DEVICE))
            && was != now
        {
            tracing::warn!(
                "{folder}: this run began on {was} and goes on on {now}: its last bits differ"
            );
        }
        return Ok(());
    }
    const SHOWN: usize = 8;
    let more = differences.len().saturating_sub(SHOWN);
    differences.truncate(SHOWN);
    if more > 0 {
        differences.push(format!("and {more} more"));
    }
    let same_numbers = match was.get(DTYPE) {
        Some(Value::String(dtype)) if was.get(DTYPE) != now.get(DTYPE) => {
            format!("go on with --dtype {dtype}, ")
        }
        _ => String::new(),
    };
    Err(Error::usage(format!(
        "{folder}: this folder holds a run with other settings: {}; {same_numbers}use another folder, or remove this \
         one to start again",
        differences.join("; ")
    )))
}

/// Whether `key`, a dotted path, may change between two parts of a run.
fn is_free(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    ["checkpoint-every", "log-every"].contains(&last) || key == DEVICE
}

/// Every value under its dotted path.
fn flat(table: Table) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) if !inner.is_empty() => {
                all.extend(
                    flat(inner)
                        .into_iter()
                        .map(|(k, v)| (format!("{key}.{k}"), v)),
                );
            }
            other => {
                all.insert(key, other);
            }
        }
    }
    all
}
