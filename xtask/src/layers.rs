//! `cargo xtask layers`: the arrows between crates, as ARCHITECTURE.md draws them.

use anyhow::{Result, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

/// What each crate may use in its normal and build dependencies. A crate that is not in this table
/// is an error, so that a new one has to be given its place.
const MAY_USE: &[(&str, &[&str])] = &[
    ("tinyfusion-core", &[]),
    ("tinyfusion-fid", &[]),
    ("tinyfusion-report", &[]),
    ("tinyfusion-testing", &[]),
    ("tinyfusion-nn", &["tinyfusion-core"]),
    ("tinyfusion-mask", &["tinyfusion-core"]),
    ("tinyfusion-checkpoint", &["tinyfusion-core"]),
    ("tinyfusion-diffusion", &["tinyfusion-core"]),
    ("tinyfusion-data", &["tinyfusion-core"]),
    (
        "tinyfusion-hub",
        &["tinyfusion-core", "tinyfusion-checkpoint"],
    ),
    (
        "tinyfusion-models",
        &[
            "tinyfusion-core",
            "tinyfusion-nn",
            "tinyfusion-diffusion",
            "tinyfusion-checkpoint",
        ],
    ),
    (
        "tinyfusion-train",
        &[
            "tinyfusion-core",
            "tinyfusion-nn",
            "tinyfusion-checkpoint",
            "tinyfusion-data",
        ],
    ),
    (
        "tinyfusion-recover",
        &[
            "tinyfusion-core",
            "tinyfusion-nn",
            "tinyfusion-mask",
            "tinyfusion-diffusion",
            "tinyfusion-train",
        ],
    ),
    (
        "tinyfusion-distill",
        &[
            "tinyfusion-core",
            "tinyfusion-nn",
            "tinyfusion-diffusion",
            "tinyfusion-train",
        ],
    ),
    (
        "tinyfusion",
        &[
            "tinyfusion-core",
            "tinyfusion-fid",
            "tinyfusion-report",
            "tinyfusion-nn",
            "tinyfusion-mask",
            "tinyfusion-checkpoint",
            "tinyfusion-diffusion",
            "tinyfusion-data",
            "tinyfusion-hub",
            "tinyfusion-models",
            "tinyfusion-train",
            "tinyfusion-recover",
            "tinyfusion-distill",
        ],
    ),
    ("tinyfusion-cli", &["tinyfusion"]),
    ("tinyfusion-tests", &["tinyfusion", "tinyfusion-cli"]),
    ("xtask", &["tinyfusion-report"]),
];

/// Test helpers: no crate ships them.
const TESTING: &str = "tinyfusion-testing";
/// Layer 0: usable with nothing else of ours, so also their tests use nothing but the helpers.
const LAYER_0: &[&str] = &["tinyfusion-core", "tinyfusion-fid", "tinyfusion-report"];
/// Arrows that stay forbidden in tests too: the two meet in a file and do not know each other.
/// (Their tests may name a model, as the subject of a parity test; their libraries may not.)
const NEVER: &[(&str, &str)] = &[
    ("tinyfusion-recover", "tinyfusion-distill"),
    ("tinyfusion-distill", "tinyfusion-recover"),
];

/// How one crate of the workspace uses another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// In its library or program, or in its build script.
    Normal,
    /// In its tests only.
    Dev,
}

/// A crate and the workspace crates it uses.
struct Uses {
    name: String,
    deps: Vec<(String, Kind)>,
}

/// Checks the workspace of the current folder; prints what it found.
pub(crate) fn run() -> Result<()> {
    let metadata = MetadataCommand::new()
        .current_dir(crate::files::root())
        .no_deps()
        .exec()?;
    let names: Vec<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    let crates: Vec<Uses> = metadata
        .packages
        .iter()
        .map(|package| Uses {
            name: package.name.to_string(),
            deps: package
                .dependencies
                .iter()
                .filter(|d| names.contains(&d.name.as_str()))
                .map(|d| {
                    let dev = d.kind == DependencyKind::Development;
                    (d.name.clone(), if dev { Kind::Dev } else { Kind::Normal })
                })
                .collect(),
        })
        .collect();
    let broken = check(&crates);
    if !broken.is_empty() {
        bail!(
            "{} forbidden\n  {}",
            plural(broken.len(), "arrow"),
            broken.join("\n  ")
        );
    }
    let arrows: usize = crates.iter().map(|c| c.deps.len()).sum();
    println!(
        "layers: {} crates, {arrows} arrows, all allowed",
        crates.len()
    );
    Ok(())
}

fn plural(n: usize, what: &str) -> String {
    if n == 1 {
        format!("1 {what} is")
    } else {
        format!("{n} {what}s are")
    }
}

/// One line per forbidden arrow, naming it and what is allowed.
fn check(crates: &[Uses]) -> Vec<String> {
    let mut broken = Vec::new();
    for Uses { name, deps } in crates {
        let Some((_, allowed)) = MAY_USE.iter().find(|(n, _)| n == name) else {
            broken.push(format!(
                "{name}: not in the table of xtask/src/layers.rs; give it its place there"
            ));
            continue;
        };
        for (dep, kind) in deps {
            if let Some(reason) = forbidden(name, dep, *kind, allowed) {
                let how = if *kind == Kind::Dev {
                    " (in tests)"
                } else {
                    ""
                };
                broken.push(format!("{name} -> {dep}{how}: {reason}"));
            }
        }
    }
    broken
}

fn forbidden(name: &str, dep: &str, kind: Kind, allowed: &[&str]) -> Option<String> {
    if NEVER.contains(&(name, dep)) {
        return Some("never, also not in tests: the two meet in a file".into());
    }
    if name == "xtask" && !allowed.contains(&dep) {
        return Some(format!(
            "xtask drives the binary and shares only {} with it",
            allowed.join(", ")
        ));
    }
    match kind {
        Kind::Dev if LAYER_0.contains(&name) && dep != TESTING => Some(format!(
            "a crate of layer 0 uses only {TESTING} in its tests"
        )),
        Kind::Dev => None,
        Kind::Normal if dep == TESTING => {
            Some(format!("{TESTING} belongs under [dev-dependencies]"))
        }
        Kind::Normal if !allowed.contains(&dep) => Some(match allowed {
            [] => format!("{name} may use no crate of the workspace"),
            _ => format!("{name} may use only {}", allowed.join(", ")),
        }),
        Kind::Normal => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(name: &str, deps: &[(&str, Kind)]) -> Uses {
        Uses {
            name: name.into(),
            deps: deps.iter().map(|(d, k)| ((*d).into(), *k)).collect(),
        }
    }

    fn arrow(from: &str, to: &str, kind: Kind) -> Vec<String> {
        check(&[uses(from, &[(to, kind)])])
    }

    #[test]
    fn arrows_of_the_table_are_allowed() {
        for (name, deps) in MAY_USE {
            let deps: Vec<_> = deps.iter().map(|d| (*d, Kind::Normal)).collect();
            assert_eq!(check(&[uses(name, &deps)]), Vec::<String>::new());
        }
    }

    #[test]
    fn the_table_has_no_cycle_and_only_looks_down() {
        for (i, (name, deps)) in MAY_USE.iter().enumerate() {
            for dep in *deps {
                let at = MAY_USE.iter().position(|(n, _)| n == dep);
                assert!(at.is_some_and(|at| at < i), "{name} -> {dep}");
            }
        }
    }

    #[test]
    fn a_forbidden_arrow_is_named() {
        let broken = arrow("tinyfusion-mask", "tinyfusion-models", Kind::Normal);
        assert_eq!(
            broken,
            ["tinyfusion-mask -> tinyfusion-models: tinyfusion-mask may use only tinyfusion-core"]
        );
        assert_eq!(
            arrow("tinyfusion-core", "tinyfusion-nn", Kind::Normal).len(),
            1
        );
        assert_eq!(
            arrow("tinyfusion-cli", "tinyfusion-models", Kind::Normal).len(),
            1
        );
    }

    #[test]
    fn tests_may_use_more_but_not_everything() {
        assert!(arrow("tinyfusion-nn", "tinyfusion-models", Kind::Dev).is_empty());
        assert!(arrow("tinyfusion-nn", TESTING, Kind::Dev).is_empty());
        assert!(arrow("tinyfusion-core", TESTING, Kind::Dev).is_empty());
        assert_eq!(
            arrow("tinyfusion-fid", "tinyfusion-core", Kind::Dev).len(),
            1
        );
        for (from, to) in NEVER {
            assert_eq!(arrow(from, to, Kind::Dev).len(), 1, "{from} -> {to}");
            assert_eq!(arrow(from, to, Kind::Normal).len(), 1, "{from} -> {to}");
        }
        for from in ["tinyfusion-recover", "tinyfusion-distill"] {
            assert!(arrow(from, "tinyfusion-models", Kind::Dev).is_empty());
            assert_eq!(arrow(from, "tinyfusion-models", Kind::Normal).len(), 1);
        }
        assert_eq!(arrow("xtask", "tinyfusion", Kind::Dev).len(), 1);
        assert_eq!(arrow("xtask", "tinyfusion", Kind::Normal).len(), 1);
        assert!(arrow("xtask", "tinyfusion-report", Kind::Normal).is_empty());
    }

    #[test]
    fn testing_is_for_tests() {
        let broken = arrow("tinyfusion-models", TESTING, Kind::Normal);
        assert!(broken[0].contains("[dev-dependencies]"), "{broken:?}");
    }

    #[test]
    fn a_new_crate_needs_a_place() {
        let broken = check(&[uses("tinyfusion-new", &[])]);
        assert!(
            broken[0].starts_with("tinyfusion-new: not in the table"),
            "{broken:?}"
        );
    }
}
