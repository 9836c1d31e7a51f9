use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ArgAction;
use tinyfusion::core::Error;

/// The arguments of a command line, and the settings file that some of them come from.
pub(crate) struct Arguments {
    pub(crate) words: Vec<OsString>,
    pub(crate) file: Option<PathBuf>,
}

/// Puts the settings of `--config FILE` in the file's place, but before the user's own flags. `cli` lets a later
/// flag override an earlier one, so the user's own win; and every command takes a file, without a line of its own.
pub(crate) fn with_config_file(mut words: Vec<OsString>, cli: &clap::Command) -> Result<Arguments> {
    let (rest, file) = without_config(&words);
    let (Some((at, command)), Some(file)) = (command_of(&rest, cli), file) else {
        // clap explains what is missing.
        return Ok(Arguments { words, file: None });
    };
    words = rest;
    words.splice(at + 1..at + 1, flags_of(&file, command)?);
    Ok(Arguments {
        words,
        file: Some(file),
    })
}

/// The innermost command, as `prepare` of `bench prepare`, and its place.
fn command_of<'a>(
    words: &[OsString],
    cli: &'a clap::Command,
) -> Option<(usize, &'a clap::Command)> {
    let mut found = None;
    for (at, word) in words.iter().enumerate().skip(1) {
        let outer = found.map_or(cli, |(_, command)| command);
        found = outer.find_subcommand(word).map(|c| (at, c)).or(found);
    }
    found
}

/// The words without `--config FILE` and `--config=FILE`, and the last such file.
fn without_config(words: &[OsString]) -> (Vec<OsString>, Option<PathBuf>) {
    let (mut rest, mut file) = (Vec::new(), None);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let joined = word.to_str().and_then(|w| w.strip_prefix("--config="));
        if word == "--" {
            rest.push(word.clone());
            rest.extend(words.by_ref().cloned());
        } else if word == "--config" {
            file = words.next().map(PathBuf::from).or(file);
        } else if let Some(path) = joined {
            file = Some(path.into());
        } else {
            rest.push(word.clone());
        }
    }
    (rest, file)
}

/// The settings in `file` as flags of `command`.
fn flags_of(file: &Path, command: &clap::Command) -> Result<Vec<OsString>> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::file(file, e))?;
    let usage = |what: String| Error::usage(format!("{}: {what}", file.display()));
    let table: toml::Table = toml::from_str(&text).map_err(|e| usage(e.to_string()))?;
    let mut flags = Vec::new();
    for (key, value) in &table {
        let Some(flag) = command.get_arguments().find(|a| a.get_long() == Some(key)) else {
            let known: Vec<_> = command
                .get_arguments()
                .filter_map(clap::Arg::get_long)
                .collect();
            return Err(usage(format!(
                "unknown setting `{key}`; there are {}",
                known.join(", ")
            ))
            .into());
        };
        let not_taken = || usage(format!("`{key}` cannot be {value}"));
        match flag.get_action() {
            ArgAction::SetTrue => {
                if value.as_bool().ok_or_else(not_taken)? {
                    flags.push(format!("--{key}").into());
                }
            }
            _ => {
                let text = word(value).ok_or_else(not_taken)?;
                // `=`, so that a negative number is no flag of its own.
                flags.push(format!("--{key}={text}").into());
            }
        }
    }
    Ok(flags)
}

/// A value as it would be typed; of a list, its elements between commas.
fn word(value: &toml::Value) -> Option<String> {
    use toml::Value::{Array, Boolean, Float, Integer, String};
    Some(match value {
        String(text) => text.clone(),
        Integer(n) => n.to_string(),
        Float(x) => x.to_string(),
        Boolean(b) => b.to_string(),
        Array(list) => {
            let words: Option<Vec<_>> = list.iter().map(word).collect();
            words?.join(",")
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cli() -> clap::Command {
        use clap::{Arg, Command};
        let inner = Command::new("inner").arg(Arg::new("lr").long("lr"));
        let demo = Command::new("demo")
            .args_override_self(true)
            .arg(Arg::new("model"))
            .arg(Arg::new("lr").long("lr"))
            .arg(Arg::new("keep").long("keep"))
            .arg(Arg::new("f16").long("f16").action(ArgAction::SetTrue));
        Command::new("tinyfusion")
            .subcommand(demo)
            .subcommand(Command::new("outer").subcommand(inner))
            .arg(Arg::new("config").long("config").global(true))
    }

    fn expand(toml: &str, line: &str) -> Result<Vec<String>> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("c.toml");
        std::fs::write(&file, toml)?;
        let line = line.replace("FILE", &file.to_string_lossy());
        let words = line.split(' ').map(OsString::from).collect();
        let all = with_config_file(words, &cli())?.words;
        Ok(all
            .iter()
            .map(|w| w.to_string_lossy().into_owned())
            .collect())
    }

    #[test]
    fn the_users_flags_come_after_the_files() {
        for line in [
            "t demo m --lr 2 --config FILE",
            "t demo --config=FILE m --lr 2",
            "t --config FILE demo m --lr 2",
        ] {
            let words = expand("lr = -1e-3\nf16 = true\nkeep = [0, 2]", line).unwrap();
            let at = words.iter().position(|w| w == "demo").unwrap();
            assert_eq!(
                words[at + 1..at + 4],
                ["--f16", "--keep=0,2", "--lr=-0.001"]
            );
            let matches = cli().try_get_matches_from(&words).unwrap();
            let demo = matches.subcommand_matches("demo").unwrap();
            assert_eq!(demo.get_one::<String>("lr").unwrap(), "2");
            assert_eq!(demo.get_one::<String>("model").unwrap(), "m");
        }
    }

    #[test]
    fn a_command_inside_a_command_has_settings_of_its_own() {
        assert_eq!(
            expand("lr = 1", "t outer --config FILE inner").unwrap(),
            ["t", "outer", "inner", "--lr=1"]
        );
        assert!(expand("keep = 1", "t outer inner --config FILE").is_err());
    }

    #[test]
    fn without_a_file_nothing_changes() {
        assert_eq!(expand("", "t demo m").unwrap(), ["t", "demo", "m"]);
        assert_eq!(
            expand("lr = 1", "t demo -- --config FILE").unwrap().len(),
            5
        );
    }

    #[test]
    fn mistakes_name_the_file_and_the_key() {
        for (toml, named) in [
            ("rate = 1", "`rate`; there are lr, keep, f16"),
            ("f16 = 3", "`f16` cannot be 3"),
            ("lr = { a = 1 }", "`lr` cannot be"),
            ("lr = ", "c.toml"),
        ] {
            let error = expand(toml, "t demo m --config FILE")
                .unwrap_err()
                .to_string();
            assert!(error.contains(named) && error.contains("c.toml"), "{error}");
        }
    }
}
