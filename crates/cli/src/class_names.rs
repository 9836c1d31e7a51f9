//! Names of the classes that a model draws: kept in its config, so that what is made of it has them, too.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tinyfusion::core::{Error, Result};

/// The file of class names in a folder of latents or beside a model: `{"0": "tench, Tinca tinca", …}`, synonyms
/// separated by commas.
pub(crate) const LABELS_FILE: &str = "labels.json";

/// The entry of a model's config that holds them.
pub(crate) const KEY: &str = "classes";

/// Names by number; empty where none are known.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ClassNames(BTreeMap<u32, String>);

/// The part of diffusers' `model_index.json` that is read.
#[derive(Deserialize)]
struct ModelIndex {
    #[serde(default)]
    id2label: ClassNames,
}

impl ClassNames {
    /// Names in the order of the classes.
    pub(crate) fn listed(names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self((0..).zip(names.into_iter().map(Into::into)).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those of `labels.json` in a folder, none where there is no such file.
    pub(crate) fn of_folder(folder: &Path) -> Result<Self> {
        read(&folder.join(LABELS_FILE)).map(Option::unwrap_or_default)
    }

    /// Those beside a model: `labels.json`, or diffusers' `model_index.json`, in its folder or in the one above (a pipeline's
    /// `transformer` lies in it).
    pub(crate) fn beside(model: &Path) -> Result<Self> {
        let folders = [Some(model), model.parent()];
        for folder in folders.into_iter().flatten() {
            if let Some(names) = read(&folder.join(LABELS_FILE))? {
                return Ok(names);
            }
            if let Some(ModelIndex { id2label }) = read(&folder.join("model_index.json"))? {
                return Ok(id2label);
            }
        }
        Ok(Self::default())
    }

    /// The class that has `name` as its name, or as one of its synonyms, of a model with `count` classes.
    pub(crate) fn find(&self, name: &str, count: usize) -> Result<u32> {
        let plain = |text: &str| text.trim().to_lowercase();
        let wanted = plain(name);
        let matches = |label: &str| {
            plain(label) == wanted || label.split(',').any(|synonym| plain(synonym) == wanted)
        };
        let found: Vec<u32> = self
            .0
            .iter()
            .filter(|(_, label)| matches(label))
            .map(|(number, _)| *number)
            .collect();
        let fail = |what: String| Err(Error::usage(format!("class `{name}`: {what}")));
        match found[..] {
            [number] if (number as usize) < count => Ok(number),
            [number] => fail(format!(
                "its names number it {number}, but the model has the classes 0 to {}",
                count - 1
            )),
            [] if self.is_empty() => fail(format!(
                "the model has no names of classes, neither in its config nor in a {LABELS_FILE} or model_index.json beside \
                 it; name classes by number"
            )),
            [] => {
                let near: Vec<&str> = self
                    .0
                    .values()
                    .filter(|label| plain(label).contains(&wanted))
                    .map(String::as_str)
                    .take(3)
                    .collect();
                let hint = match near[..] {
                    [] => "name it by number".to_string(),
                    _ => format!("did you mean `{}`?", near.join("` or `")),
                };
                fail(format!("the model has no such name; {hint}"))
            }
            _ => fail(format!(
                "{} classes have this name; name it by number, {}",
                found.len(),
                found
                    .iter()
                    .map(u32::to_string)
                    .collect::<Vec<_>>()
                    .join(" or ")
            )),
        }
    }
}

/// What a JSON file holds; nothing where there is none.
fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(None);
    };
    serde_json::from_str(&text).map(Some).map_err(|e| {
        Error::file(
            path,
            format!(
                "holds no names of classes, which look like {{\"0\": \"tench, Tinca tinca\"}}: {e}"
            ),
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NAMES: &str =
        r#"{"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane", "3": "crane", "9": "box"}"#;

    #[test]
    fn names_and_their_synonyms_are_found_in_either_file() {
        let dir = tempfile::tempdir().unwrap();
        let transformer = dir.path().join("transformer");
        std::fs::create_dir(&transformer).unwrap();
        assert!(ClassNames::beside(&transformer).unwrap().is_empty());
        std::fs::write(
            dir.path().join("model_index.json"),
            format!(r#"{{"_class_name": "DiTPipeline", "id2label": {NAMES}}}"#),
        )
        .unwrap();
        for model in [dir.path(), &transformer, &dir.path().join("model.pt")] {
            let names = ClassNames::beside(model).unwrap();
            for (name, number) in [
                ("Goldfish", 1),
                ("tinca Tinca", 0),
                ("tench, Tinca tinca", 0),
            ] {
                assert_eq!(names.find(name, 4).unwrap(), number);
            }
        }
        std::fs::write(transformer.join(LABELS_FILE), r#"{"2": "tench"}"#).unwrap();
        let own = ClassNames::beside(&transformer).unwrap();
        assert_eq!(own.find("tench", 4).unwrap(), 2);
        std::fs::write(transformer.join(LABELS_FILE), "[").unwrap();
        let error = ClassNames::beside(&transformer).unwrap_err().to_string();
        assert!(
            error.contains(LABELS_FILE) && error.contains("no names"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_name_is_told_what_would_be() {
        let names: ClassNames = serde_json::from_str(NAMES).unwrap();
        for (name, says) in [
            ("gold", "did you mean `goldfish`?"),
            ("crane", "2 or 3"),
            ("box", "number it 9"),
            ("sofa", "by number"),
        ] {
            let error = names.find(name, 4).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let error = ClassNames::default().find("tench", 4).unwrap_err();
        assert!(error.to_string().contains(LABELS_FILE), "{error}");
    }

    #[test]
    fn a_list_is_numbered() {
        let names = ClassNames::listed(["a", "b"]);
        assert_eq!(
            serde_json::to_string(&names).unwrap(),
            r#"{"0":"a","1":"b"}"#
        );
    }
}
