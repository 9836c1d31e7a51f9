use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

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

/// A progress bar with the time left, or nothing where nobody watches.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar over `total` units called `what`; hidden unless standard error is a terminal.
    pub fn new(what: &str, total: u64) -> Self {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template(
            "{prefix:>12} {bar:40} {pos}/{len} · {elapsed} · {eta} left · {msg}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_prefix(what.to_string());
        bar.enable_steady_tick(Duration::from_millis(500));
        Self(bar)
    }

    /// No bar.
    pub fn hidden() -> Self {
        Self(ProgressBar::hidden())
    }

    /// `done` units are done.
    pub fn set(&self, done: u64, message: String) {
        self.0.set_position(done);
        self.0.set_message(message);
    }

    /// Starts the estimate of the time left from `done` units, as after a resume.
    pub fn resume_at(&self, done: u64) {
        self.0.set_position(done);
        self.0.reset_eta();
    }

    /// As [`resume_at`](Self::resume_at); the bar goes away with what is returned, also after an error.
    pub(crate) fn running_from(&self, done: u64) -> impl Drop {
        struct Running<'a>(&'a Progress);
        impl Drop for Running<'_> {
            fn drop(&mut self) {
                self.0.finish();
            }
        }
        self.resume_at(done);
        Running(self)
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
