//! `cargo xtask gpu`: the binary with the feature `cuda`, built with or without a toolkit and a GPU, and the script that
//! compares it with the CPU and with PyTorch on a machine that has one.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::files;

/// Build for NVIDIA GPUs; with --run also compare with the CPU and with PyTorch on this machine's.
///
/// The compiler is that of xtask/cuda/toolkit.sh, which installs it below target/ and lets the program find CUDA's libraries
/// when it runs; --system-toolkit takes this machine's, and links to its libraries. The first build takes 10 to 25 minutes,
/// most of it for candle's kernels.
///
/// FOLDER gets `tinyfusion`, which needs no CUDA library to start, and `gpu.pyz`: copy both to a machine with a GPU and run
/// `python3 gpu.pyz ./tinyfusion` there.
///
/// Examples:
///   cargo xtask gpu
///   cargo xtask gpu --run
///   cargo xtask gpu --emulate
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Where the binary and the script go
    #[arg(long, value_name = "FOLDER", default_value = "target/gpu/kit")]
    out: PathBuf,
    /// Compile with the nvcc of NVCC, CUDA_HOME or the PATH
    #[arg(long)]
    system_toolkit: bool,
    /// Also run the script, which writes gpu-results/results.json and results.md
    #[arg(long)]
    run: bool,
    /// Rehearse it without a GPU: parity on an emulator of CUDA, which compiles the kernels for the processor
    #[arg(long, conflicts_with = "run")]
    emulate: bool,
    /// Words for the script (see `python3 gpu.pyz --help`)
    #[arg(last = true, requires = "run")]
    words: Vec<String>,
}

/// The largest size of what is carried: it has to go where large files do not.
const LARGEST: u64 = 60_000_000;

/// A target folder of its own: the program has the name of the one for the CPU.
const TARGET: &str = "target/gpu";

pub(crate) fn run(args: &Args) -> Result<()> {
    std::env::set_current_dir(files::root())?;
    let variables = match args.system_toolkit {
        true => Vec::new(),
        false => printed("sh", &["xtask/cuda/toolkit.sh", "target/cuda"], &[])?,
    };
    build(&variables)?;
    let binary = pack(&args.out)?;
    if args.emulate {
        let emulator = printed("python3", &["xtask/cuda/emulator/build.py"], &variables)?;
        return finished(
            Command::new(&binary)
                .args(["bench", "parity", "--device", "cuda"])
                .envs(emulator),
        );
    }
    if args.run {
        let script = args.out.join("gpu.pyz");
        return finished(
            Command::new("python3")
                .arg(script)
                .arg(&binary)
                .args(&args.words),
        );
    }
    Ok(())
}

/// The variables in the lines `export NAME='VALUE'` that a script prints.
fn printed(
    program: &str,
    words: &[&str],
    variables: &[(String, String)],
) -> Result<Vec<(String, String)>> {
    let out = Command::new(program)
        .args(words)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("{program} cannot be started"))?;
    if !out.status.success() {
        bail!("`{program} {}` failed ({})", words.join(" "), out.status);
    }
    exports(&String::from_utf8(out.stdout)?)
}

fn exports(text: &str) -> Result<Vec<(String, String)>> {
    let variable = |line: &str| {
        let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
        // What follows a closing quote, `:$NAME`, is what the variable had before.
        let value = match value.split_once('$') {
            None => value.trim_matches('\'').to_string(),
            Some((own, _)) => {
                let own = own.trim_matches('\'');
                match std::env::var(name) {
                    Ok(before) => format!("{own}:{before}"),
                    Err(_) => own.to_string(),
                }
            }
        };
        Some((name.to_string(), value))
    };
    let lines = text.lines().filter(|line| line.starts_with("export "));
    lines
        .map(|line| variable(line).with_context(|| format!("`{line}` sets no variable")))
        .collect()
}

fn build(variables: &[(String, String)]) -> Result<()> {
    // The workspace's features as a whole, so that candle is compiled for this once.
    let words = [
        "build",
        "--release",
        "--workspace",
        "--bin",
        "tinyfusion",
        "--features",
        "tinyfusion-cli/cuda",
        "--target-dir",
        TARGET,
    ];
    println!("$ cargo {}", words.join(" "));
    finished(
        files::cargo()
            .args(words)
            .envs(variables.iter().map(|(name, value)| (name, value))),
    )
}

/// The binary without its symbols and the script with what it imports, in one folder; the binary's path.
fn pack(out: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let built = Path::new(TARGET).join("release/tinyfusion");
    let binary = out.join("tinyfusion");
    finished(Command::new("strip").arg("-o").arg(&binary).arg(&built))?;
    let sources = Path::new(TARGET).join("gpu.pyz.d");
    files::remove(&sources)?;
    std::fs::create_dir_all(&sources)?;
    for name in [
        "blocks.py",
        "diffusion.py",
        "dit.py",
        "gpu.py",
        "gpu_report.py",
        "gpu_turns.py",
        "peer.py",
        "protocol.py",
        "setting.py",
        "steps.py",
        "tensors.py",
    ] {
        std::fs::copy(Path::new("xtask/python").join(name), sources.join(name))
            .with_context(|| format!("cannot copy xtask/python/{name}"))?;
    }
    let script = out.join("gpu.pyz");
    finished(
        Command::new("python3")
            .args(["-m", "zipapp", "--compress", "--main", "gpu:main"])
            .args(["--python", "/usr/bin/env python3", "--output"])
            .arg(&script)
            .arg(&sources),
    )?;
    let bytes = files::size(&binary)? + files::size(&script)?;
    println!(
        "{} and {}: {:.1} MB",
        binary.display(),
        script.display(),
        bytes as f64 / 1e6
    );
    if bytes > LARGEST {
        bail!("that is more than {} MB", LARGEST / 1_000_000);
    }
    Ok(files::absolute(&binary))
}

fn finished(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("{program} cannot be started"))?;
    if !status.success() {
        bail!("{program} failed ({status})");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_off_what_a_shell_would_evaluate() {
        let text = "export CUDA_HOME='/a b/cu13'\nexport CUDA_COMPUTE_CAP='90'\nexport X=--flag=size\n\
                    export NOT_SET_HERE='/emulator'${NOT_SET_HERE:+:$NOT_SET_HERE}\n";
        let found = exports(text).unwrap();
        let expected = [
            ("CUDA_HOME", "/a b/cu13"),
            ("CUDA_COMPUTE_CAP", "90"),
            ("X", "--flag=size"),
            ("NOT_SET_HERE", "/emulator"),
        ];
        let found: Vec<(&str, &str)> = found
            .iter()
            .map(|(n, v)| (n.as_str(), v.as_str()))
            .collect();
        assert_eq!(found, expected);
    }
}
