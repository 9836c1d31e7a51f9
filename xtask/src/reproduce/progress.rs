//! One bar for the whole run, weighted by expected seconds; plain lines where there is no terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use tinyfusion_report::duration;

use super::stage::Outcome;
use super::vocabulary::Stage;

/// What has been done and what is to come, in expected seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Account {
    total: f64,
    /// Expected seconds of the stages that are over, run or skipped.
    over: f64,
    /// Expected and real seconds of the stages that ran.
    ran_expected: f64,
    ran_real: f64,
}

impl Account {
    /// Seconds left, `elapsed` seconds into a stage of `expected`.
    ///
    /// The machine's pace is real over expected seconds so far; a twentieth of the whole counts as
    /// run at the expected pace, so that the first short stages do not throw it about.
    fn left(&self, expected: f64, elapsed: f64) -> f64 {
        let prior = self.total / 20.0;
        let pace = (self.ran_real + prior) / (self.ran_expected + prior).max(1e-9);
        let current = (expected * pace - elapsed).max(0.0);
        let rest = (self.total - self.over - expected).max(0.0);
        current + rest * pace
    }
}

/// Shows the progress of a list of stages.
pub(crate) struct Progress {
    account: Account,
    bar: Option<ProgressBar>,
    number: usize,
    count: usize,
}

impl Progress {
    pub(crate) fn new<'a>(stages: impl Iterator<Item = &'a Stage> + Clone) -> Self {
        let total: f64 = stages.clone().map(|s| s.seconds).sum();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new((total * 1e3) as u64);
            // The template is a constant: it either always parses or never.
            let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style);
            bar
        });
        Self {
            account: Account {
                total,
                ..Account::default()
            },
            bar,
            number: 0,
            count: stages.count(),
        }
    }

    /// A line above the bar.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{line}")),
            None => println!("{line}"),
        }
    }

    /// `stage` starts with this command.
    pub(crate) fn begin(&self, stage: &Stage, command: &str) {
        self.say(&format!(
            "[{}/{}] {}\n$ {command}",
            self.number + 1,
            self.count,
            stage.name
        ));
        self.tick(stage, 0.0);
    }

    /// `elapsed` seconds into `stage`.
    pub(crate) fn tick(&self, stage: &Stage, elapsed: f64) {
        if let Some(bar) = &self.bar {
            let done = self.account.over + elapsed.min(stage.seconds);
            bar.set_position((done * 1e3) as u64);
            bar.set_message(format!(
                "{}  {} left",
                stage.name,
                duration(self.account.left(stage.seconds, elapsed))
            ));
        }
    }

    /// `stage` is over, for the reason given, without a result of this run.
    pub(crate) fn pass(&mut self, stage: &Stage, why: &str) {
        self.number += 1;
        self.account.over += stage.seconds;
        self.say(&format!(
            "[{}/{}] {}: {why}",
            self.number, self.count, stage.name
        ));
    }

    /// `stage` is over.
    pub(crate) fn end(&mut self, stage: &Stage, outcome: Outcome) {
        match outcome {
            Outcome::UpToDate => self.pass(stage, "up to date"),
            Outcome::Ran(seconds) => {
                self.number += 1;
                self.account.over += stage.seconds;
                self.account.ran_expected += stage.seconds;
                self.account.ran_real += seconds;
                let left = duration(self.account.left(0.0, 0.0));
                self.say(&format!("  done in {seconds:.1} s, about {left} left"));
            }
        }
    }

    /// Everything is over.
    pub(crate) fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_the_machines_pace() {
        let fresh = Account {
            total: 100.0,
            ..Account::default()
        };
        assert!((fresh.left(10.0, 0.0) - 100.0).abs() < 1e-9);
        assert!((fresh.left(10.0, 4.0) - 96.0).abs() < 1e-9);
        // Longer than expected: nothing left of this stage, everything of the others.
        assert!((fresh.left(10.0, 40.0) - 90.0).abs() < 1e-9);
        // Half is over and took twice as long: the rest takes nearly twice as long.
        let slow = Account {
            total: 100.0,
            over: 50.0,
            ran_expected: 50.0,
            ran_real: 100.0,
        };
        let left = slow.left(0.0, 0.0);
        assert!((90.0..100.0).contains(&left), "{left}");
        // Skipped stages say nothing about the pace.
        let skipped = Account {
            total: 100.0,
            over: 50.0,
            ..Account::default()
        };
        assert!((skipped.left(0.0, 0.0) - 50.0).abs() < 1e-9);
    }
}
