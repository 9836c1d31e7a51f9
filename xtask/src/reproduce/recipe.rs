//! What `--preset` names: one experiment, or several parts that share a report.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::preset::Preset;

/// One experiment, or several that run one after another.
pub(crate) struct Recipe {
    /// The stem of its file.
    pub(crate) name: String,
    /// What the report of all parts is called.
    pub(crate) title: Option<String>,
    /// Whether the file itself is the experiment, and not a list of parts.
    pub(crate) alone: bool,
    pub(crate) parts: Vec<Preset>,
}

/// A file of parts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parts {
    title: Option<String>,
    /// Names of presets in the same folder; each runs in a folder of its name.
    parts: Vec<String>,
}

impl Recipe {
    /// Reads and checks the preset and its parts.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let Some(listed) = parts(path)? else {
            let preset = Preset::read(path)?;
            return Ok(Self {
                name: preset.name.clone(),
                title: None,
                alone: true,
                parts: vec![preset],
            });
        };
        let read = || -> Result<Vec<Preset>> {
            let names = &listed.parts;
            if names.is_empty() {
                bail!("`parts` is empty; name at least one preset beside it");
            }
            if let Some(twice) = names
                .iter()
                .enumerate()
                .find_map(|(i, n)| names[..i].contains(n).then_some(n))
            {
                bail!("`parts` has `{twice}` twice; every part runs once");
            }
            names.iter().map(|name| part(path, name)).collect()
        };
        Ok(Self {
            name: super::preset::stem(path),
            title: listed.title.clone(),
            alone: false,
            parts: read().with_context(|| format!("preset {}", path.display()))?,
        })
    }
}

/// Begins the teacher of a preset that another part makes: `part:NAME/ROW`.
const PART: &str = "part:";

impl Recipe {
    /// Finds the teachers that parts make for later ones, in the folder `out` of the run.
    pub(crate) fn find_teachers(&mut self, out: &Path) -> Result<()> {
        let names: Vec<String> = self.parts.iter().map(|part| part.name.clone()).collect();
        for (i, preset) in self.parts.iter_mut().enumerate() {
            let said = preset.teacher.display().to_string();
            let Some(made) = said.strip_prefix(PART) else {
                continue;
            };
            let found = made.split_once('/').filter(|(part, _)| {
                let before = names.iter().take(i);
                !self.alone && before.into_iter().any(|name| name == part)
            });
            let Some((part, row)) = found else {
                bail!(
                    "the teacher of {} is made by another part, {made}; run a preset that has both parts, such as `paper`",
                    preset.name
                );
            };
            preset.teacher = out
                .join(part)
                .join("rows")
                .join(row)
                .join("recovered/model");
        }
        Ok(())
    }
}

/// The list of parts in `path`, if the file is one.
fn parts(path: &Path) -> Result<Option<Parts>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the preset {}", path.display()))?;
    let read = || -> Result<Option<Parts>> {
        let table: toml::Table = toml::from_str(&text)?;
        if !table.contains_key("parts") {
            return Ok(None);
        }
        Ok(Some(toml::from_str(&text)?))
    };
    read().with_context(|| format!("preset {}", path.display()))
}

fn part(path: &Path, name: &str) -> Result<Preset> {
    if Path::new(name).file_name() != Some(name.as_ref()) {
        bail!("part `{name}` is no name; parts stand beside the file that names them");
    }
    let file = path.with_file_name(format!("{name}.toml"));
    if !file.is_file() {
        bail!("part `{name}` is missing: there is no {}", file.display());
    }
    if parts(&file)?.is_some() {
        bail!("part `{name}` is itself made of parts; name those in its place");
    }
    Preset::read(&file)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::reproduce::file_of;

    pub(crate) fn embedded(name: &str) -> Recipe {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        Recipe::read(&file_of(name, &root).unwrap()).unwrap()
    }

    #[test]
    fn the_embedded_recipes_have_a_part_for_each_family() {
        for name in ["table2", "smoke"] {
            let recipe = embedded(name);
            assert_eq!((recipe.name.as_str(), recipe.alone), (name, false));
            let names: Vec<&str> = recipe.parts.iter().map(|p| p.name.as_str()).collect();
            let expected = ["dit", "sit", "mar"].map(|family| format!("{name}-{family}"));
            assert_eq!(names, expected);
            let teachers: Vec<_> = recipe.parts.iter().map(|p| p.teacher.clone()).collect();
            let expected = ["", "-sit", "-mar"].map(|tail| format!("assets/teacher{tail}"));
            assert_eq!(teachers, expected.map(std::path::PathBuf::from));
        }
        let tiny = embedded("tiny");
        assert!(tiny.alone && tiny.parts.len() == 1 && tiny.name == "tiny");
    }

    #[test]
    fn a_part_may_make_the_teacher_of_a_later_one() {
        let mut recipe = embedded("paper");
        recipe.find_teachers(Path::new("runs/x")).unwrap();
        let teacher = recipe.parts[2].teacher.display().to_string();
        assert_eq!(
            teacher,
            "runs/x/TinyDiT-D14/rows/learned-2-4-kd-500k/recovered/model"
        );
        let mut alone = embedded("TinyDiT-D7");
        let said = alone.find_teachers(Path::new("runs/x")).unwrap_err();
        assert!(said.to_string().contains("such as `paper`"), "{said}");
    }

    #[test]
    fn mistakes_in_parts_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("whole.toml");
        let part = include_str!("../../../assets/presets/smoke-dit.toml");
        std::fs::write(dir.path().join("a.toml"), part).unwrap();
        std::fs::write(dir.path().join("nested.toml"), "parts = [\"a\"]").unwrap();
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Recipe::read(&file)
        };
        let whole = read("title = \"All\"\nparts = [\"a\"]").unwrap();
        assert_eq!(
            (whole.parts[0].name.as_str(), whole.title.as_deref()),
            ("a", Some("All"))
        );
        let said = |text: &str| format!("{:#}", read(text).err().unwrap());
        for (text, part) in [
            (
                "parts = [\"a\", \"b\"]",
                "part `b` is missing: there is no ",
            ),
            ("parts = [\"nested\"]", "`nested` is itself made of parts"),
            ("parts = [\"whole\"]", "`whole` is itself made of parts"),
            ("parts = [\"a\", \"a\"]", "`a` twice"),
            ("parts = []", "`parts` is empty"),
            ("parts = [\"../a\"]", "part `../a` is no name"),
            ("parts = [\"a\"]\nseed = 1", "seed"),
        ] {
            let said = said(text);
            assert!(said.contains(part) && said.contains("whole.toml"), "{said}");
        }
    }
}
