//! Runs of `cargo xtask reproduce`, read and put together.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::aggregate::Aggregate;
use crate::results::{Machine, Results};

/// What is wrong with the files or with putting them together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is not a `results.json`.
    #[error(
        "{name} is not a results.json of `cargo xtask reproduce`: {message}; pass the folder of a finished run, or its results.json"
    )]
    Format {
        /// The file.
        name: String,
        /// What was expected and found.
        message: String,
    },
    /// Runs that cannot be compared.
    #[error("these runs cannot be compared:\n  {}\n{HINT}", .0.join("\n  "))]
    Incomparable(Vec<String>),
    /// A file that a plot is drawn from.
    #[error(
        "{file}: {message}; run the experiment again, or take the entry out of the row's `traces`"
    )]
    Trace {
        /// The file.
        file: String,
        /// What was expected and found.
        message: String,
    },
}

const HINT: &str = "Repeat one of them with the settings of the other, report them one by one, or pass --force to see them side by \
side all the same.";

/// An experiment, and where it was read.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file, for messages.
    pub name: String,
    /// Its content, or one part of it.
    pub results: Results,
}

/// Several experiments in one file, see [`crate::Whole`].
#[derive(Deserialize)]
struct Parts {
    parts: Vec<Results>,
}

/// Reads the content of a `results.json`: one experiment, or every part of a recipe.
///
/// # Errors
/// [`Error::Format`] where `text` is neither.
pub fn parse(name: &str, text: &str) -> Result<Vec<Source>, Error> {
    let wrong = |e: &dyn std::fmt::Display| Error::Format {
        name: name.into(),
        message: e.to_string(),
    };
    let value: Value = serde_json::from_str(text).map_err(|e| wrong(&e))?;
    let whole = value.get("parts").is_some();
    // Read from the text and not from the value, so that an error names its line.
    let parts = if whole {
        serde_json::from_str::<Parts>(text)
            .map_err(|e| wrong(&e))?
            .parts
    } else {
        vec![serde_json::from_str(text).map_err(|e| wrong(&e))?]
    };
    if parts.iter().all(|p| p.rows.is_empty()) {
        return Err(wrong(&"it has no rows"));
    }
    let source = |results| Source {
        name: name.into(),
        results,
    };
    Ok(parts.into_iter().map(source).collect())
}

/// Experiments of one preset, put together.
#[derive(Debug, Clone)]
pub struct Section {
    /// The rows of all sources; of their sums and lists, those of all.
    pub results: Results,
    /// Where they were read.
    pub sources: Vec<String>,
    /// In what the sources differ without being incomparable.
    pub notes: Vec<String>,
}

/// Everything, section by section.
#[derive(Debug, Clone)]
pub struct Merged {
    /// One per preset, in the order of the sources.
    pub sections: Vec<Section>,
    /// Why they should not be compared, if that was forced.
    pub objections: Vec<String>,
}

/// Puts experiments together: runs of one preset with other seeds become seeds of the same rows, other presets sections
/// of their own.
///
/// # Errors
/// [`Error::Incomparable`] with every reason, unless `force` is set.
pub fn merge(sources: Vec<Source>, force: bool) -> Result<Merged, Error> {
    let objections = objections(&sources);
    if !(objections.is_empty() || force) {
        return Err(Error::Incomparable(objections));
    }
    let mut order: Vec<String> = Vec::new();
    let mut by_preset: BTreeMap<String, Vec<Source>> = BTreeMap::new();
    for source in sources {
        let preset = source.results.preset.clone();
        if !order.contains(&preset) {
            order.push(preset.clone());
        }
        by_preset.entry(preset).or_default().push(source);
    }
    let sections = order
        .iter()
        .filter_map(|preset| join(by_preset.remove(preset)?))
        .collect();
    Ok(Merged {
        sections,
        objections,
    })
}

/// One section of all runs of a preset.
fn join(sources: Vec<Source>) -> Option<Section> {
    let several = sources.len() > 1;
    let mut sources = sources.into_iter().map(|mut source| {
        // What a run has in common with no other is its own seed: its rows are paired with each other.
        if let Some(seed) = seed(&source.results).filter(|_| several) {
            let repeats = source.results.rows.iter().any(|r| r.repetition.is_some());
            let rows = source.results.rows.iter_mut();
            rows.filter(|_| !repeats).for_each(|r| {
                // The group is read off the id, so it stays; the seed is that of the repetition.
                r.repetition = Some(seed);
            });
        }
        source
    });
    let first = sources.next()?;
    let mut section = Section {
        results: first.results,
        sources: vec![first.name],
        notes: Vec::new(),
    };
    let machine = section.results.machine.clone();
    let place = |m: &Machine| (m.cpu.clone(), m.cores, m.memory_bytes);
    let (mut machines, mut binaries) = (false, false);
    for Source { name, results } in sources {
        section.sources.push(name);
        machines |= place(&results.machine) != place(&machine);
        binaries |= results.machine.binary_sha256 != machine.binary_sha256;
        let all = &mut section.results;
        all.seconds += results.seconds;
        all.wall_seconds += results.wall_seconds;
        all.peak_rss_bytes = all.peak_rss_bytes.max(results.peak_rss_bytes);
        for warning in results.warnings {
            if !all.warnings.contains(&warning) {
                all.warnings.push(warning);
            }
        }
        all.commands.extend(results.commands);
        all.rows.extend(results.rows);
    }
    if machines {
        let note = "The runs were made on different machines, of which the first is named: speeds mix them.";
        section.notes.push(note.into());
    }
    if binaries {
        let note = "The runs were made with different builds of tinyfusion.";
        section.notes.push(note.into());
    }
    let masks: Vec<_> = section
        .results
        .rows
        .iter()
        .filter(|r| r.criterion == "random")
        .map(|r| (r.group(), r.seed))
        .collect();
    if several && (1..masks.len()).any(|i| masks[..i].contains(&masks[i])) {
        let note = "Some random masks are in several runs: they were recovered again under another seed, and count once for each.";
        section.notes.push(note.into());
    }
    section.results.random = Aggregate::of(&section.results.rows);
    Some(section)
}

/// The seed of a run: its preset's.
fn seed(results: &Results) -> Option<u64> {
    results.settings.get("seed").and_then(Value::as_u64)
}

/// Why the sources must not be compared.
fn objections(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for (i, b) in sources.iter().enumerate() {
        // Against the first it would be compared with; the others were held against that one too.
        let alike = |a: &&Source| a.results.preset == b.results.preset;
        if let Some(a) = sources[..i].iter().find(alike) {
            found.extend(settings(a, b));
        }
        // Families are never compared with each other: their teachers differ.
        let relatives = |a: &&Source| a.results.family == b.results.family;
        if let Some(a) = sources[..i].iter().find(relatives) {
            found.extend(scores(a, b));
        }
        let repeated = sources[..i].iter().filter(alike).find_map(|a| {
            let same = |r: &&crate::ResultRow| {
                let of = |r: &crate::ResultRow, run: &Source| {
                    let repetition = r.repetition.or(seed(&run.results));
                    (r.group(), r.seed, repetition)
                };
                a.results.rows.iter().any(|s| of(s, a) == of(r, b))
            };
            Some((a, b.results.rows.iter().find(same)?))
        });
        if let Some((a, row)) = repeated {
            found.push(format!(
                "the row `{}` of seed {} is in {} and in {}: one of them would count twice",
                row.id, row.seed, a.name, b.name
            ));
        }
    }
    found
}

/// What makes the scores of two experiments incomparable.
fn scores(a: &Source, b: &Source) -> Vec<String> {
    let count = |n: Option<u64>| n.map_or("none".into(), |n| n.to_string());
    let setting = |s: &Source, path: &str| {
        let value = s.results.settings.pointer(path);
        value.map_or("none".into(), Value::to_string)
    };
    let of = |s: &Source| {
        [
            ("features of the evaluation", s.results.features.clone()),
            ("classifiers", setting(s, "/classifier")),
            ("references", setting(s, "/evaluate/reference")),
            ("reference images", count(s.results.reference_count)),
            ("samples per row", count(s.results.sample_count)),
        ]
    };
    let differ = |((what, x), (_, y)): ((&str, String), (&str, String))| {
        (x != y).then(|| {
            format!(
                "{what} differ: {x} in {} ({}), {y} in {} ({})",
                a.name, a.results.preset, b.name, b.results.preset
            )
        })
    };
    of(a).into_iter().zip(of(b)).filter_map(differ).collect()
}

/// What differs in the settings of two runs of a preset, but for the seed and what decides no result.
fn settings(a: &Source, b: &Source) -> Option<String> {
    // Expected seconds are the progress bar's, the study says what is shown; what `scores` compares it reports itself.
    const APART: &[&str] = &[
        "seed",
        "seeds",
        "seconds",
        "study",
        "evaluate",
        "classifier",
        "name",
    ];
    let keys = |s: &Source| {
        let mut flat = BTreeMap::new();
        flatten(&s.results.settings, String::new(), &mut flat);
        flat.retain(|key, _| !APART.contains(&key.split('/').nth(1).unwrap_or("")));
        flat
    };
    let (x, y) = (keys(a), keys(b));
    let missing = Value::Null;
    let all: std::collections::BTreeSet<&String> = x.keys().chain(y.keys()).collect();
    let said: Vec<String> = all
        .into_iter()
        .filter_map(|key| {
            let (x, y) = (
                x.get(key).unwrap_or(&missing),
                y.get(key).unwrap_or(&missing),
            );
            (x != y).then(|| format!("{} = {x} and {y}", key.trim_start_matches('/')))
        })
        .collect();
    (!said.is_empty()).then(|| {
        format!(
            "{} and {} are both of the preset `{}`, with other settings: {}",
            a.name,
            b.name,
            a.results.preset,
            said.join(", ")
        )
    })
}

/// Every value that is no object, by its path.
fn flatten(value: &Value, path: String, into: &mut BTreeMap<String, Value>) {
    match value.as_object() {
        Some(object) => {
            for (key, value) in object {
                flatten(value, format!("{path}/{key}"), into);
            }
        }
        None => {
            into.insert(path, value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groups::groups;
    use crate::sample::results;

    fn source(name: &str, seed: u64) -> Source {
        let mut results = results();
        results.settings = serde_json::json!({"seed": seed, "recover": {"flags": {"steps": 900}}});
        Source {
            name: name.into(),
            results,
        }
    }

    fn refused(sources: Vec<Source>) -> Vec<String> {
        match merge(sources, false) {
            Err(Error::Incomparable(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn other_seeds_become_seeds_of_the_same_rows() {
        let merged = merge(vec![source("a", 0), source("b", 1)], false).unwrap();
        let [section] = &merged.sections[..] else {
            panic!("{}", merged.sections.len());
        };
        assert_eq!(section.sources, ["a", "b"]);
        let groups = groups(&section.results.rows);
        let learned = groups.iter().find(|g| g.id == "learned-1-2-ft").unwrap();
        let of: Vec<u64> = learned.rows.iter().map(|r| r.repetition()).collect();
        assert_eq!(of, [0, 1]);
        let random = groups.iter().find(|g| g.id == "random-1-2-ft").unwrap();
        let of: Vec<u64> = random.rows.iter().map(|r| r.repetition()).collect();
        assert_eq!(of, [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(section.results.seconds, 1680.0);
        assert_eq!(section.results.random[0].count, 8);
        assert_eq!(section.notes.len(), 1, "{:?}", section.notes); // the same four masks twice
    }

    #[test]
    fn what_a_study_shows_makes_no_run_incomparable() {
        let mut b = source("b", 1);
        b.results.settings["study"] = serde_json::json!({"against": [{"column": "recovery"}]});
        assert!(merge(vec![source("a", 0), b], false).is_ok());
    }

    #[test]
    fn other_machines_and_builds_are_noted() {
        let mut b = source("b", 1);
        b.results.machine.cores = 64;
        b.results.machine.binary_sha256 = "other".into();
        let merged = merge(vec![source("a", 0), b], false).unwrap();
        assert_eq!(merged.sections[0].notes.len(), 3);
    }

    #[test]
    fn other_presets_are_sections() {
        let mut b = source("b", 0);
        b.results.preset = "other".into();
        let merged = merge(vec![source("a", 0), b], false).unwrap();
        let names: Vec<&str> = merged
            .sections
            .iter()
            .map(|s| s.results.preset.as_str())
            .collect();
        assert_eq!(names, ["made-up", "other"]);
    }

    #[test]
    fn what_cannot_be_compared_is_refused_with_every_reason() {
        let mut b = source("b", 1);
        b.results.preset = "other".into();
        b.results.features = "Inception".into();
        b.results.sample_count = Some(50_000);
        let why = refused(vec![source("a", 0), b.clone()]);
        assert_eq!(why.len(), 2, "{why:?}");
        assert!(why[0].contains("Inception in b (other)"), "{why:?}");
        assert!(
            why[1].starts_with("samples per row differ: 600 in a"),
            "{why:?}"
        );
        let forced = merge(vec![source("a", 0), b.clone()], true).unwrap();
        assert_eq!((forced.sections.len(), forced.objections.len()), (2, 2));
        // Another family has another teacher: it is shown beside, and never compared.
        b.results.family = "MAR".into();
        assert!(merge(vec![source("a", 0), b], false).is_ok());
    }

    #[test]
    fn a_preset_with_other_settings_or_the_same_seed_is_refused() {
        let mut b = source("b", 1);
        b.results.settings["recover"]["flags"]["steps"] = 500.into();
        let why = refused(vec![source("a", 0), b]);
        assert!(
            why[0].contains("recover/flags/steps = 900 and 500"),
            "{why:?}"
        );
        let why = refused(vec![source("a", 0), source("b", 0)]);
        assert!(
            why[0].contains("the row `dense` of seed 0 is in a and in b"),
            "{why:?}"
        );
    }

    #[test]
    fn a_results_json_of_either_kind_is_read_and_nothing_else() {
        let one = serde_json::to_string(&results()).unwrap();
        assert_eq!(parse("f", &one).unwrap().len(), 1);
        let two = format!("{{\"preset\": \"x\", \"parts\": [{one}, {one}]}}");
        assert_eq!(parse("f", &two).unwrap().len(), 2);
        for (bad, says) in [
            ("{\"a\": 1}", "missing field `preset`"),
            ("no json", "expected"),
            ("[]", "invalid"),
            ("{\"parts\": []}", "no rows"),
            (
                &one.replace("\"rows\":", "\"lines\":"),
                "missing field `rows`",
            ),
        ] {
            let error = parse("f.json", bad).unwrap_err().to_string();
            assert!(
                error.starts_with("f.json is not") && error.contains(says),
                "{error}"
            );
        }
    }

    #[test]
    fn results_from_before_studies_are_read() {
        let mut value = serde_json::to_value(results()).unwrap();
        for key in ["family", "teacher", "study"] {
            value.as_object_mut().unwrap().remove(key);
        }
        let read = parse("f", &value.to_string()).unwrap();
        assert_eq!(read[0].results.family, "DiT");
        assert!(
            read[0]
                .results
                .rows
                .iter()
                .all(|r| r.budget_steps.is_none())
        );
    }
}
