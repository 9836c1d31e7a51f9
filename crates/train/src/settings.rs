use std::collections::BTreeMap;
use std::path::Path;

use tinyfusion_core::{Error, Result};
use toml::{Table, Value};

/// Compares the settings of a run directory (`old`, from `path`) with those of a call (`new`), by value: a
/// setting written in another form is the same setting. How often is logged and saved may change on the way: it
/// does not change what is learned.
///
/// The error lists every difference with both values.
pub(crate) fn refuse_other_settings(path: &Path, old: &str, new: &str) -> Result<()> {
    let parse = |text: &str| text.parse::<Table>();
    let was = flat(parse(old).map_err(|e| {
        Error::file(
            path,
            format!("does not parse: {e}; it should hold the settings of this run"),
        )
    })?);
    let now = flat(parse(new).map_err(|e| Error::run(format!("the settings do not parse: {e}")))?);
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
        return Ok(());
    }
    const SHOWN: usize = 8;
    let more = differences.len().saturating_sub(SHOWN);
    differences.truncate(SHOWN);
    if more > 0 {
        differences.push(format!("and {more} more"));
    }
    let folder = path.parent().unwrap_or(path).display();
    Err(Error::usage(format!(
        "{folder}: this folder holds a run with other settings: {}; use another folder, or remove this one to \
         start again",
        differences.join("; ")
    )))
}

/// Whether `key`, a dotted path, may change between two parts of a run.
fn is_free(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    ["checkpoint-every", "log-every"].contains(&last)
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
