//! What a command shows: results on standard output, a progress bar on standard error.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tinyfusion::core::{Error, Result};
use tinyfusion::train::Progress;

static QUIET: AtomicBool = AtomicBool::new(false);

/// From here on no progress bar is shown (`--quiet`).
pub(crate) fn be_quiet() {
    QUIET.store(true, Relaxed);
}

/// A progress bar over `total` units called `what`, unless the user wants none.
pub(crate) fn progress_bar(what: &str, total: u64) -> Progress {
    if QUIET.load(Relaxed) {
        Progress::hidden()
    } else {
        Progress::new(what, total)
    }
}

/// `println!` that returns an error where that one panics, as on a full disk: `say!("{x}")?`.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::output::line(format_args!($($text)*))
    };
}
pub(crate) use say;

/// Prints a line. A reader that went away (`tinyfusion models | head -1`) has read all it wanted: the command
/// goes on without it, since what it writes into files is still wanted.
pub(crate) fn line(text: Arguments<'_>) -> Result<()> {
    print_to(&mut std::io::stdout().lock(), text)
}

fn print_to(out: &mut impl Write, text: Arguments<'_>) -> Result<()> {
    match out
        .write_fmt(format_args!("{text}\n"))
        .and_then(|()| out.flush())
    {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::run(format!("standard output: {e}")))
        }
        _ => Ok(()),
    }
}

/// What a user should know before a long wait, on standard error, unless only errors are wanted.
pub(crate) fn note(text: Arguments<'_>) {
    if !QUIET.load(Relaxed) {
        complain(text);
    }
}

/// A warning, unless only errors are wanted.
pub(crate) fn warn(text: Arguments<'_>) {
    if !QUIET.load(Relaxed) {
        complain(format_args!("warning: {text}"));
    }
}

/// `eprintln!` that does not panic: where standard error is closed there is nobody to tell.
pub(crate) fn complain(text: Arguments<'_>) {
    let _ = std::io::stderr().write_fmt(format_args!("{text}\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken(ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_left_is_no_error_and_a_full_disk_is_one() {
        assert!(print_to(&mut Broken(ErrorKind::BrokenPipe), format_args!("x")).is_ok());
        let error = print_to(&mut Broken(ErrorKind::StorageFull), format_args!("x")).unwrap_err();
        assert!(error.to_string().contains("standard output"), "{error}");
    }
}
