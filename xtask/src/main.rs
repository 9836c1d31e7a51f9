#![doc = include_str!("../README.md")]
#![allow(clippy::print_stdout)] // a program: what it does and finds goes to stdout

mod bench;
mod ci;
mod files;
mod gpu;
mod layers;
mod machine;
mod pretrain;
mod report;
mod reproduce;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Drives the project",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the experiment of a preset, or of each of its parts, and write results.json, report.md and report.html
    Reproduce(reproduce::Args),
    /// Train the embedded teachers and the classifier again
    Pretrain(pretrain::Args),
    /// Time the binary against PyTorch, in turn, and write bench.json, bench.md and bench.svg
    Bench(bench::Args),
    /// Build the binary for NVIDIA GPUs, on any machine, and pack it with the script that checks and times it on one
    Gpu(gpu::Args),
    /// Everything a change has to pass: format, layers, clippy, tests, docs, the smoke experiment
    Ci,
    /// Check that every crate uses only the crates below it
    Layers,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Reproduce(args) => reproduce::run(&args),
        Command::Pretrain(args) => pretrain::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Gpu(args) => gpu::run(&args),
        Command::Ci => ci::run(),
        Command::Layers => layers::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            // The shells' convention for a program ended by Ctrl-C.
            ExitCode::from(if error.is::<reproduce::Interrupted>() {
                130
            } else {
                1
            })
        }
    }
}
