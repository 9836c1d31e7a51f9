//! What the README and the help say can be done, can be done.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::Path;

use tinyfusion_tests::{Place, TINY};

/// The lines of `text` that are commands of the binary, without its name.
fn examples(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("tinyfusion "))
        .map(String::from)
        .collect()
}

#[test]
fn the_lines_of_the_readme_and_of_the_help_run() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = std::fs::read_to_string(repository.join("crates/cli/README.md")).unwrap();
    for text in [readme, Place::new().ok("--help")] {
        let place = Place::new();
        for asset in ["teacher", "classifier"] {
            let folder = Path::new("assets").join(asset);
            std::fs::create_dir_all(place.path("").join(&folder)).unwrap();
            for file in ["model.safetensors", "config.json"] {
                let file = folder.join(file);
                std::fs::copy(repository.join(&file), place.path("").join(&file)).unwrap();
            }
        }
        let lines = examples(&text);
        assert!(lines.len() >= 5, "{text}");
        for line in lines {
            if line.contains("--weights") {
                continue; // needs the public file; tests/evaluating.rs has one of its own
            }
            // The same words, less work: a later flag wins.
            let less = match line.split(' ').next().unwrap() {
                "learn" | "distill" => " --steps 2 --batch-size 2",
                "loss" => " --images 8",
                "narrow" => " --samples 2 --stride 400",
                "sample" if line.contains("--respacing") => " --count 6 --respacing 2",
                "sample" => " --count 6 --steps 2",
                _ => "",
            };
            let line = line
                .replace("shapes:2000", "shapes:8")
                .replace("shapes:1000", "shapes:8");
            place.ok(&(line + less));
        }
    }
}

#[test]
fn every_command_explains_itself() {
    let place = Place::new();
    let all = place.ok("--help");
    for command in [
        "models",
        "inspect",
        "pretrain",
        "learn",
        "score",
        "cut",
        "distill",
        "encode",
        "narrow",
        "stats",
        "report",
        "loss",
        "activations",
        "sample",
        "evaluate",
        "bench",
    ] {
        assert!(all.contains(command), "{all}");
        let help = place.ok(&format!("{command} --help"));
        assert!(
            help.contains("Example"),
            "{command} --help shows an example:\n{help}"
        );
    }
    // What happens without flags stands in the help.
    for (command, setting) in [
        ("learn", "mask-lr = 0.005"),
        ("distill", "alpha-kd = "),
        ("pretrain", "steps = 20000"),
    ] {
        let help = place.ok(&format!("{command} --help"));
        assert!(help.contains(setting), "{command}: {setting}\n{help}");
    }
    assert_eq!(place.ok("--version").split(' ').next(), Some("tinyfusion"));
    assert!(place.ok("models").contains("DiT-XL/2"));
    place.ok(&format!("pretrain t --steps 2 {TINY}"));
    let seen = place.ok("inspect t/model");
    assert!(
        seen.contains("DiT") && seen.contains("depth       4"),
        "{seen}"
    );
}
