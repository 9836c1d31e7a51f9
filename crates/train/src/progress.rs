use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

/// A request to stop at the next step, shared with a signal handler.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Asks the run to stop.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A progress bar with the time left: on a terminal a bar, elsewhere a line on standard error now and then.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    lines: Option<Lines>,
}

/// Where standard error is a file or a pipe: when its last line was written.
#[derive(Debug)]
struct Lines {
    what: String,
    last: Mutex<Option<Instant>>,
}

/// Before the first line: whoever waits sees soon that something happens.
const FIRST_LINE: Duration = Duration::from_secs(2);
/// Between two lines: a log of hours stays short.
const BETWEEN_LINES: Duration = Duration::from_secs(20);

impl Progress {
    /// A bar over `total` units called `what`.
    pub fn new(what: &str, total: u64) -> Self {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template(
            "{prefix:>12} {bar:40} {pos}/{len} · {elapsed} · {left} · {msg}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("left", |state: &ProgressState, out: &mut dyn fmt::Write| {
            let is_done = Some(state.pos()) == state.len();
            let _ = out.write_str(&left(state.eta(), is_done));
        });
        bar.set_style(style);
        bar.set_prefix(what.to_string());
        bar.enable_steady_tick(Duration::from_millis(500));
        let lines = bar.is_hidden().then(|| Lines {
            what: what.to_string(),
            last: Mutex::new(None),
        });
        Self { bar, lines }
    }

    /// No bar.
    pub fn hidden() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            lines: None,
        }
    }

    /// `done` units are done.
    pub fn set(&self, done: u64, message: String) {
        self.bar.set_position(done);
        if let Some(lines) = &self.lines {
            lines.show(&self.bar, &message);
        }
        self.bar.set_message(message);
    }

    /// Starts the estimate of the time left from `done` units, as after a resume.
    pub fn resume_at(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    /// As [`resume_at`](Self::resume_at); the bar goes away with what is returned, also after an error.
    pub(crate) fn running_from(&self, done: u64) -> impl Drop {
        struct Running<'a>(&'a Progress);
        impl Drop for Running<'_> {
            fn drop(&mut self) {
                self.0.bar.finish();
            }
        }
        self.resume_at(done);
        Running(self)
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Lines {
    fn show(&self, bar: &ProgressBar, message: &str) {
        // A thread that finds another one at it has nothing to add.
        let Ok(mut last) = self.last.try_lock() else {
            return;
        };
        let wait = match *last {
            None => bar.elapsed() < FIRST_LINE,
            Some(last) => last.elapsed() < BETWEEN_LINES,
        };
        if wait {
            return;
        }
        *last = Some(Instant::now());
        let message = if message.is_empty() {
            String::new()
        } else {
            format!(" · {message}")
        };
        // Not `eprintln!`, which panics where standard error is closed.
        let _ = writeln!(
            std::io::stderr(),
            "{} {}/{} · {} · {}{message}",
            self.what,
            bar.position(),
            bar.length().unwrap_or_default(),
            HumanDuration(bar.elapsed()),
            left(bar.eta(), Some(bar.position()) == bar.length()),
        );
    }
}

/// The time left. The bar gives none for work under way while it has no estimate: that takes two units.
fn left(eta: Duration, is_done: bool) -> String {
    match eta.is_zero() && !is_done {
        true => "no estimate yet".into(),
        false => format!("{} left", HumanDuration(eta)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_left_is_said_of_work_that_is_done_alone() {
        assert_eq!(left(Duration::ZERO, false), "no estimate yet");
        assert_eq!(left(Duration::ZERO, true), "0 seconds left");
        assert_eq!(left(Duration::from_secs(120), false), "2 minutes left");
    }
}
