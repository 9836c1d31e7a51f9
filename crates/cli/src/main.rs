#![doc = include_str!("../README.md")]

mod address;
mod claim;
mod class_names;
mod classifier;
mod commands;
mod compute;
mod config_file;
mod destination;
mod family;
mod hub;
mod model;
mod out_of_memory;
mod output;
mod resources;
mod selection_file;
mod settings;
mod source;
mod training_data;
mod vae;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};
use tinyfusion::core::Error;
use tinyfusion::train::Stop;

use crate::out_of_memory::Flags;

/// Training allocates and frees the same large buffers every step; glibc hands them back to the
/// system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Make a trained diffusion transformer twice as shallow and nearly as good.
#[derive(Parser)]
#[command(name = "tinyfusion", version, arg_required_else_help = true, args_override_self = true, after_help = commands::EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
    /// More log lines on standard error (repeat for debugging)
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
    /// Errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// TOML file with any of the command's long flags (keys without the dashes); flags given here win
    // Here for --help alone: `config_file` takes it out before clap reads the words.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Pin what comes from the hub: commits and hashes that this file has are kept to, others are added to it
    #[arg(long, value_name = "FILE", global = true)]
    lock: Option<PathBuf>,
}

fn main() -> ExitCode {
    candle_on_one_thread();
    keep_freed_memory();
    let (mut cli, flags) = match parse() {
        Ok(parsed) => parsed,
        Err(error) => return fail(&error, "", &Flags::default()),
    };
    log_to_stderr(cli.verbose, cli.quiet);
    if cli.quiet {
        output::be_quiet();
    }
    let stop = Stop::default();
    let on_signal = stop.clone();
    let handler = ctrlc::set_handler(move || {
        if on_signal.requested() {
            // Asked twice: the user does not want to wait for the step's end.
            std::process::exit(130);
        }
        tracing::warn!(
            "stopping as soon as what is begun is done (training: after a micro-batch, with a checkpoint); once more to \
             stop at once"
        );
        on_signal.request();
    });
    if let Err(error) = handler {
        tracing::warn!("no clean stop on Ctrl-C: {error}");
    }
    match cli.command.run(cli.lock.as_deref(), &stop) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, cli.command.when_stopped(), &flags),
    }
}

/// The command line, with the settings of `--config`, and what of it decides how much memory is taken. Ends the process
/// where clap does: help, version, bad usage.
fn parse() -> anyhow::Result<(Cli, Flags)> {
    let mut command = negative_numbers_are_values(Cli::command());
    let arguments = config_file::with_config_file(std::env::args_os().collect(), &command)?;
    let parsed = command
        .try_get_matches_from_mut(&arguments.words)
        .and_then(|mut matches| {
            let flags = Flags::of(&command, &matches);
            Ok((Cli::from_arg_matches_mut(&mut matches)?, flags))
        });
    let parsed = parsed.unwrap_or_else(|error| {
        if let Some(file) = arguments.file.as_ref().filter(|_| error.use_stderr()) {
            output::complain(format_args!("with the settings of {}:", file.display()));
        }
        error.format(&mut command).exit()
    });
    commands::remember(arguments.words);
    Ok(parsed)
}

/// `--cfg -3` is a mistake in a number, which its command explains better than clap, who sees an unknown flag `-3`.
fn negative_numbers_are_values(command: clap::Command) -> clap::Command {
    let allow = |arg: clap::Arg| {
        if arg.get_long().is_some() && arg.get_action().takes_values() {
            arg.allow_negative_numbers(true)
        } else {
            arg
        }
    };
    command
        .mut_args(allow)
        .mut_subcommands(negative_numbers_are_values)
}

/// Says what went wrong, `when_stopped` where it was the user, and which `flags` help where it was a GPU's memory.
fn fail(error: &anyhow::Error, when_stopped: &str, flags: &Flags) -> ExitCode {
    let kind = error.downcast_ref::<Error>();
    let text = format!("{error:#}");
    match (kind, flags.explain(&text, compute::memory())) {
        (Some(Error::Stopped), _) => {
            output::complain(format_args!("error: {text}; {when_stopped}"));
        }
        (_, Some(explained)) => output::complain(format_args!("error: {explained}")),
        _ => output::complain(format_args!("error: {text}")),
    }
    ExitCode::from(match kind {
        Some(Error::Usage(_)) => 2,
        Some(Error::Interrupted { .. } | Error::Stopped) => 130,
        _ => 1,
    })
}

fn log_to_stderr(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, _) => "debug",
    };
    // RUST_LOG speaks only where no flag does.
    let filter = match tracing_subscriber::EnvFilter::try_from_default_env() {
        Ok(filter) if !quiet && verbose == 0 => filter,
        _ => tracing_subscriber::EnvFilter::new(level),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false) // they would be printed to where nothing can be
        .with_target(false)
        .init();
}

/// Keeps candle's own elementwise operations on the thread that calls them.
///
/// Its helper threads spin while they wait. Here the cores are already busy, one micro-batch or one batch of
/// samples each, and spinning took half the time of a training step. A value that is set already stands.
#[allow(unsafe_code)]
fn candle_on_one_thread() {
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_none() {
        // SAFETY: the first statement of main: no other thread exists that could read the environment.
        unsafe { std::env::set_var(VARIABLE, "1") };
    }
}

/// Keeps freed memory for the next allocation, as long as the user has not chosen otherwise.
///
/// A step frees what the next one needs again. Given back to the system in between, every page is cleared anew when it
/// is touched: a fifth of a fine-tuning step of DiT-S/2 (`perf record` on `tinyfusion bench worker`).
#[allow(unsafe_code)]
fn keep_freed_memory() {
    /// `mi_option_purge_delay` of mimalloc.h, in milliseconds; never is −1.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: sets a number in a table of the allocator; an option it does not know is ignored.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two flags of one name, a group that names no flag, and the like.
    #[test]
    fn the_flags_of_every_command_go_together() {
        Cli::command().debug_assert();
    }
}
