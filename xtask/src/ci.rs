//! `cargo xtask ci`: everything a change has to pass, in order, cheap checks first.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{files, layers, reproduce};

/// One check: a cargo call, or something of our own.
enum Check {
    Cargo {
        args: Vec<&'static str>,
        env: Option<(&'static str, &'static str)>,
    },
    Layers,
    Smoke,
}

impl Check {
    fn cargo(args: &[&'static str]) -> Self {
        Self::Cargo {
            args: args.to_vec(),
            env: None,
        }
    }

    /// The command, as it can be pasted.
    fn line(&self) -> String {
        match self {
            Self::Cargo { args, env } => {
                let env = env
                    .map(|(k, v)| format!("{k}=\"{v}\" "))
                    .unwrap_or_default();
                format!("{env}cargo {}", args.join(" "))
            }
            Self::Layers => "cargo xtask layers".into(),
            Self::Smoke => "cargo xtask reproduce --preset smoke".into(),
        }
    }
}

/// The checks. All but one use the release profile, so that the dependencies are built once; that one builds candle again,
/// which takes some minutes the first time.
fn checks(nextest: bool) -> Vec<Check> {
    let tests: &[&str] = if nextest {
        &["nextest", "run", "--release", "--workspace"]
    } else {
        &[
            "test",
            "--release",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
        ]
    };
    vec![
        Check::cargo(&["fmt", "--all", "--check"]),
        Check::Layers,
        Check::cargo(&[
            "clippy",
            "--release",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]),
        Check::cargo(tests),
        // The kernels are where `unsafe` is: there once more with every assertion on.
        Check::cargo(&["test", "--profile", "checked", "-p", "tinyfusion-nn"]),
        Check::cargo(&["test", "--release", "--workspace", "--doc"]),
        Check::Cargo {
            args: vec!["doc", "--release", "--workspace", "--no-deps"],
            env: Some(("RUSTDOCFLAGS", "-D warnings")),
        },
        Check::Smoke,
    ]
}

/// Runs every check, stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    let nextest = files::cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    let checks = checks(nextest);
    let start = Instant::now();
    let mut times = Vec::new();
    for (i, check) in checks.iter().enumerate() {
        println!("\n==> [{}/{}] {}", i + 1, checks.len(), check.line());
        let began = Instant::now();
        one(check).with_context(|| format!("ci stopped at `{}`", check.line()))?;
        times.push((began.elapsed().as_secs_f64(), check.line()));
    }
    println!("\nci passed in {:.0} s", start.elapsed().as_secs_f64());
    for (seconds, line) in times {
        println!("{seconds:8.1} s  {line}");
    }
    Ok(())
}

fn one(check: &Check) -> Result<()> {
    match check {
        Check::Layers => layers::run(),
        Check::Smoke => reproduce::run(&reproduce::Args::preset("smoke")),
        Check::Cargo { args, env } => {
            let mut command = files::cargo();
            command.args(args).current_dir(files::root()).envs(*env);
            let status = command.status().context("cargo cannot be started")?;
            if !status.success() {
                bail!("it failed ({status})");
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_checked_in_order_and_optimised() {
        for nextest in [true, false] {
            let lines: Vec<String> = checks(nextest).iter().map(Check::line).collect();
            let order = [
                "fmt",
                "layers",
                "clippy",
                "--workspace",
                "--profile checked -p tinyfusion-nn",
                "--doc",
                "cargo doc",
                "reproduce --preset smoke",
            ];
            assert_eq!(lines.len(), order.len());
            for (line, part) in lines.iter().zip(order) {
                assert!(line.contains(part), "{line}");
                let builds = line.starts_with("cargo ") || line.starts_with("RUSTDOCFLAGS");
                let own = ["fmt", "xtask", "checked"].iter().any(|w| line.contains(w));
                assert!(own || (builds && line.contains("--release")), "{line}");
            }
            assert!(lines[2].ends_with("-- -D warnings"));
            assert!(lines[3].contains(if nextest {
                "nextest run"
            } else {
                "--lib --bins --tests"
            }));
            assert!(lines[6].starts_with("RUSTDOCFLAGS=\"-D warnings\" "));
        }
    }
}
