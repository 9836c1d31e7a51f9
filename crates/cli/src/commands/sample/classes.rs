use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tinyfusion::core::{Error, Result};

/// The file of class names in a model directory: `{"0": "tench, Tinca tinca", …}`, synonyms separated by commas.
pub(crate) const LABELS_FILE: &str = "labels.json";

/// Whose pictures are drawn: the classes take turns.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Classes(Vec<u32>);

impl Classes {
    /// The classes that `wanted` names by number or name, or all `count`.
    pub(super) fn choose(wanted: &[String], model: &Path, count: usize) -> Result<Self> {
        if wanted.is_empty() {
            return Ok(Self((0..count as u32).collect()));
        }
        let mut names = None;
        let mut class = |text: &String| -> Result<u32> {
            if let Ok(number) = text.parse::<u32>() {
                let known = (number as usize) < count;
                return known.then_some(number).ok_or_else(|| {
                    Error::usage(format!(
                        "class {number}: the model has the classes 0 to {}",
                        count - 1
                    ))
                });
            }
            if names.is_none() {
                names = Some(Names::of(model)?);
            }
            match &names {
                Some(names) => names.find(text, count),
                None => Err(Error::run("no names were read")),
            }
        };
        Ok(Self(wanted.iter().map(&mut class).collect::<Result<_>>()?))
    }

    /// The class of image `number`.
    pub(super) fn of(&self, number: usize) -> u32 {
        self.0[number % self.0.len()]
    }

    /// All, in turn.
    pub(super) fn listed(&self) -> &[u32] {
        &self.0
    }
}

/// Names of classes, from a file.
struct Names {
    path: PathBuf,
    by_number: BTreeMap<String, String>,
}

/// The part of diffusers' `model_index.json` that is read.
#[derive(Deserialize)]
struct ModelIndex {
    id2label: BTreeMap<String, String>,
}

impl Names {
    /// Those beside the model: `labels.json`, or diffusers' `model_index.json` there or above a `transformer` folder.
    fn of(model: &Path) -> Result<Self> {
        let wrong = |path: &Path, e: &dyn std::fmt::Display| {
            Error::file(path, format!("holds no class names: {e}"))
        };
        let own = model.join(LABELS_FILE);
        if let Ok(text) = std::fs::read_to_string(&own) {
            let by_number = serde_json::from_str(&text).map_err(|e| wrong(&own, &e))?;
            return Ok(Self {
                path: own,
                by_number,
            });
        }
        let folders = [Some(model), model.parent()];
        for folder in folders.into_iter().flatten() {
            let path = folder.join("model_index.json");
            if let Ok(text) = std::fs::read_to_string(&path) {
                let index: ModelIndex =
                    serde_json::from_str(&text).map_err(|e| wrong(&path, &e))?;
                return Ok(Self {
                    path,
                    by_number: index.id2label,
                });
            }
        }
        Err(Error::usage(format!(
            "there are no class names beside {}: no {LABELS_FILE} and no model_index.json; name classes by number",
            model.display()
        )))
    }

    /// The class that has `name` as its name, or as one of its synonyms.
    fn find(&self, name: &str, count: usize) -> Result<u32> {
        let plain = |text: &str| text.trim().to_lowercase();
        let wanted = plain(name);
        let matches = |label: &String| label.split(',').any(|synonym| plain(synonym) == wanted);
        let found: Vec<&String> = self
            .by_number
            .iter()
            .filter(|(_, label)| matches(label))
            .map(|(number, _)| number)
            .collect();
        let fail = |what: String| Err(Error::usage(format!("class `{name}`: {what}")));
        match found[..] {
            [number] => match number.parse::<u32>() {
                Ok(class) if (class as usize) < count => Ok(class),
                _ => fail(format!(
                    "{} numbers it {number}, the model has the classes 0 to {}",
                    self.path.display(),
                    count - 1
                )),
            },
            [] => {
                let near: Vec<&str> = self
                    .by_number
                    .values()
                    .filter(|label| plain(label).contains(&wanted))
                    .map(String::as_str)
                    .take(3)
                    .collect();
                let hint = match near[..] {
                    [] => "name it by number".to_string(),
                    _ => format!("did you mean `{}`?", near.join("` or `")),
                };
                fail(format!("{} has no such name; {hint}", self.path.display()))
            }
            _ => fail(format!(
                "{} has the name {} times; name it by number",
                self.path.display(),
                found.len()
            )),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn choose(model: &Path, wanted: &[&str]) -> std::result::Result<Vec<u32>, String> {
        let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
        let found = Classes::choose(&wanted, model, 4).map_err(|e| e.to_string())?;
        Ok(found.listed().to_vec())
    }

    #[test]
    fn classes_take_turns() {
        let all = Classes::choose(&[], Path::new("nowhere"), 3).unwrap();
        assert_eq!([0, 1, 2, 3, 7].map(|i| all.of(i)), [0, 1, 2, 0, 1]);
        assert_eq!(choose(Path::new("nowhere"), &["3", "1"]).unwrap(), [3, 1]);
        let error = choose(Path::new("nowhere"), &["4"]).unwrap_err();
        assert!(error.contains("0 to 3"), "{error}");
        let error = choose(Path::new("nowhere"), &["star"]).unwrap_err();
        assert!(
            error.contains("nowhere") && error.contains("by number"),
            "{error}"
        );
    }

    #[test]
    fn names_and_their_synonyms_are_found_in_either_file() {
        let dir = tempfile::tempdir().unwrap();
        let transformer = dir.path().join("transformer");
        std::fs::create_dir(&transformer).unwrap();
        let names = r#"{"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane", "3": "crane", "9": "box"}"#;
        std::fs::write(
            dir.path().join("model_index.json"),
            format!(r#"{{"_class_name": "DiTPipeline", "id2label": {names}}}"#),
        )
        .unwrap();
        for model in [dir.path(), &transformer] {
            assert_eq!(
                choose(model, &["Goldfish", "tinca Tinca", "3"]).unwrap(),
                [1, 0, 3]
            );
        }
        std::fs::write(transformer.join(LABELS_FILE), names).unwrap();
        assert_eq!(choose(&transformer, &["tench"]).unwrap(), [0]);
        for (name, says) in [
            ("gold", "did you mean `goldfish`?"),
            ("crane", "2 times"),
            ("box", "numbers it 9"),
            ("sofa", "by number"),
        ] {
            let error = choose(&transformer, &[name]).unwrap_err();
            assert!(
                error.contains(says) && error.contains(LABELS_FILE),
                "{error}"
            );
        }
        std::fs::write(transformer.join(LABELS_FILE), "[").unwrap();
        let error = choose(&transformer, &["tench"]).unwrap_err();
        assert!(error.contains("holds no class names"), "{error}");
    }
}
