//! One bar over all cases, weighted by their expected seconds; nothing where there is no terminal.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use tinyfusion_report::duration;

/// How far the benchmark is.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
    /// Expected seconds of everything, and of what is over.
    total: f64,
    over: f64,
    /// The case that runs.
    name: String,
    expected: f64,
}

impl Progress {
    /// For work of `total` expected seconds.
    pub(crate) fn new(total: f64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new((total * 1e3) as u64);
            // The template is a constant: it either always parses or never.
            let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style);
            bar
        });
        Self {
            bar,
            start: Instant::now(),
            total,
            over: 0.0,
            name: String::new(),
            expected: 0.0,
        }
    }

    /// A line above the bar.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }

    /// `name` starts.
    pub(crate) fn begin(&mut self, name: &str, expected: f64) {
        self.name = name.into();
        self.expected = expected;
        self.say(&format!("==> {name}"));
        self.tick(0.0);
    }

    /// `share` of the case that runs is over.
    pub(crate) fn tick(&self, share: f64) {
        if let Some(bar) = &self.bar {
            let done = self.over + self.expected * share;
            let left = left(done, self.total, self.start.elapsed().as_secs_f64());
            bar.set_position((done * 1e3) as u64);
            bar.set_message(format!("{}  {} left", self.name, duration(left)));
        }
    }

    /// The case that ran is over.
    pub(crate) fn end(&mut self) {
        self.over += self.expected;
        self.expected = 0.0;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Seconds left after `elapsed`, where `done` of `total` expected ones are over: at the pace so far,
/// in which a twentieth of the whole counts as run at the expected pace.
fn left(done: f64, total: f64, elapsed: f64) -> f64 {
    let prior = total / 20.0;
    let pace = (elapsed + prior) / (done + prior).max(1e-9);
    (total - done).max(0.0) * pace
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_the_pace() {
        assert!((left(0.0, 100.0, 0.0) - 100.0).abs() < 1e-9);
        // Half is over and took twice as long: so nearly does the rest.
        let slow = left(50.0, 100.0, 100.0);
        assert!((90.0..100.0).contains(&slow), "{slow}");
        assert_eq!(left(100.0, 100.0, 70.0), 0.0);
    }
}
