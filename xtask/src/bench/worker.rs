//! A contender: a process that does one step whenever it is asked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::load;

/// A living worker. Dropped before its end it is killed.
pub(crate) struct Worker {
    /// Case and contender, for messages.
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    log: PathBuf,
    /// What it runs on, as it says.
    pub(crate) versions: BTreeMap<String, String>,
    /// Its memory when all was loaded.
    pub(crate) ready_rss_bytes: Option<u64>,
}

/// Said when everything is loaded.
#[derive(Deserialize)]
struct Ready {
    ready: bool,
    #[serde(default)]
    versions: BTreeMap<String, String>,
}

/// The answer to `step`.
#[derive(Deserialize)]
struct Step {
    seconds: f64,
}

/// Said at the end of the input.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Last {
    pub(crate) peak_rss_bytes: u64,
    /// Largest difference from our output, where it can be compared.
    pub(crate) difference: Option<f64>,
    #[serde(flatten)]
    pub(crate) facts: Facts,
}

/// What some workers know beside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Operations of a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) flops: Option<f64>,
    /// Files of the set that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) shards: Option<usize>,
    /// The most of them that were open, or mapped into memory, at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) open_files: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mapped_files: Option<usize>,
}

impl Worker {
    /// Starts `command` and waits until it is ready; its stderr goes to `log`.
    pub(crate) fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let open = || -> std::io::Result<File> {
            fs::create_dir_all(log.parent().unwrap_or(Path::new(".")))?;
            File::create(log)
        };
        let stderr = open().with_context(|| format!("cannot write the log {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("{name}: {command:?} cannot be started"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{name}: no pipes to the process");
        };
        let mut worker = Self {
            name: name.into(),
            child,
            input: Some(input),
            output: BufReader::new(output),
            log: log.into(),
            versions: BTreeMap::new(),
            ready_rss_bytes: None,
        };
        let said: Ready = worker.answer("`ready`")?;
        if !said.ready {
            return Err(worker.failure("said that it is not ready"));
        }
        worker.versions = said.versions;
        worker.ready_rss_bytes = load::resident(worker.child.id());
        Ok(worker)
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// One step: its seconds, by the worker's own clock.
    pub(crate) fn step(&mut self) -> Result<f64> {
        let start = Instant::now();
        let sent = match &mut self.input {
            Some(input) => input.write_all(b"step\n").and_then(|()| input.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        if let Err(error) = sent {
            return Err(self.failure(&format!("does not take its input ({error})")));
        }
        let Step { seconds } = self.answer("the seconds of a step")?;
        let waited = start.elapsed().as_secs_f64();
        // Its clock starts after ours and stops before.
        if seconds > 0.0 && seconds <= waited + 1e-3 {
            Ok(seconds)
        } else {
            Err(self.failure(&format!(
                "says that a step took {seconds} s, of which {waited} s were seen"
            )))
        }
    }

    /// Ends the input, waits for the end of the process.
    pub(crate) fn finish(mut self) -> Result<Last> {
        self.input = None;
        let last = self.answer("its peak memory")?;
        let status = self.child.wait()?;
        if !status.success() {
            return Err(self.failure(&format!("ended with {status}")));
        }
        Ok(last)
    }

    /// One line of JSON.
    fn answer<T: DeserializeOwned>(&mut self, expected: &str) -> Result<T> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Err(error) => Err(self.failure(&format!("cannot be read ({error})"))),
            Ok(0) => {
                let status = self.child.wait()?;
                Err(self.failure(&format!("ended ({status}) before it said {expected}")))
            }
            Ok(_) => serde_json::from_str(&line).map_err(|error| {
                let line = line.trim();
                self.failure(&format!("said `{line}` instead of {expected} ({error})"))
            }),
        }
    }

    fn failure(&self, what: &str) -> anyhow::Error {
        const LINES: usize = 12;
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(LINES)..].join("\n    ");
        anyhow!(
            "{} {what}\n  end of {}:\n    {end}",
            self.name,
            self.log.display()
        )
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Both fail on a process that has ended, which is what is wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[cfg(test)]
#[cfg(unix)] // they run /bin/sh
mod tests {
    use super::*;

    fn start(dir: &tempfile::TempDir, script: &str) -> Result<Worker> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Worker::start("case, ours", &mut command, &dir.path().join("logs/w.log"))
    }

    const GOOD: &str = r#"echo '{"ready": true, "versions": {"torch": "2"}}'
        while read line; do sleep 0.01; echo '{"seconds": 0.005}'; done
        echo '{"peak_rss_bytes": 7, "difference": 1e-6}'"#;

    #[test]
    fn a_worker_answers_step_by_step_and_sums_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut worker = start(&dir, GOOD).unwrap();
        assert_eq!(worker.versions["torch"], "2");
        assert_eq!(worker.step().unwrap(), 0.005);
        assert_eq!(worker.step().unwrap(), 0.005);
        let last = worker.finish().unwrap();
        assert_eq!((last.peak_rss_bytes, last.difference), (7, Some(1e-6)));
        assert_eq!(last.facts, Facts::default());
    }

    #[test]
    fn what_goes_wrong_is_told_with_the_end_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let said = |script: &str, steps: usize| {
            let outcome = start(&dir, script).and_then(|mut w| {
                for _ in 0..steps {
                    w.step()?;
                }
                w.finish().map(|_| ())
            });
            outcome.unwrap_err().to_string()
        };
        let dead = said("echo 'no memory' >&2; exit 3", 0);
        assert!(
            dead.starts_with("case, ours ended (exit status: 3)"),
            "{dead}"
        );
        assert!(dead.ends_with("no memory"), "{dead}");
        assert!(said("echo hello", 0).contains("said `hello` instead of `ready`"));
        let slow = GOOD.replace("0.005", "5");
        assert!(said(&slow, 1).contains("says that a step took 5 s"));
        let bad_end = format!("{GOOD}; exit 4");
        assert!(said(&bad_end, 1).contains("ended with exit status: 4"));
        let silent = r#"echo '{"ready": true}'; read line"#;
        assert!(said(silent, 1).contains("before it said the seconds of a step"));
    }
}
