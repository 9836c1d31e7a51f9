//! One case: files prepared, workers started, steps taken in turn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::flops::Model;
use super::preset::{Contender, Kind};
use super::turns::{self, Rhythm, Timed};
use super::worker::{Last, Worker};
use crate::files::{self, absolute};
use crate::reproduce::{say, strings};

/// Untimed steps of every contender: memory is faulted in, graphs are compiled.
const WARM_UPS: usize = 2;
const PEER: &str = "xtask/python/peer.py";

/// Who measures.
pub(crate) struct Lab {
    pub(crate) binary: PathBuf,
    /// None: only ours takes part.
    pub(crate) python: Option<PathBuf>,
    /// Folder of the run.
    pub(crate) out: PathBuf,
    pub(crate) pause: Duration,
}

/// The sizes of a case; none means those of the model.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) batch: usize,
    pub(crate) threads: usize,
    pub(crate) depth: Option<usize>,
    pub(crate) input_size: Option<usize>,
    /// Pieces of our training step's batch.
    pub(crate) micro_batches: Option<usize>,
}

/// A prepared case; its files are removed when it is dropped (gigabytes, and a command makes them again).
pub(crate) struct Prepared {
    pub(crate) folder: PathBuf,
    /// The command that made it.
    pub(crate) command: String,
    /// None for the probes.
    pub(crate) model: Option<Model>,
    /// Of masked KD.
    pub(crate) student: Option<Model>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Left-over files are in the way of nobody: the next run writes over them.
        files::remove(&self.folder).ok();
    }
}

/// One who takes turns.
pub(crate) struct Entry<'a> {
    /// For messages and the log's name.
    pub(crate) name: String,
    pub(crate) contender: Contender,
    pub(crate) case: &'a Prepared,
}

/// What one who took turns did.
pub(crate) struct Outcome {
    pub(crate) command: String,
    pub(crate) seconds: Vec<f64>,
    pub(crate) last: Last,
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) ready_rss_bytes: Option<u64>,
}

/// What all of them did, and what the machine did beside.
pub(crate) struct Turns {
    pub(crate) outcomes: Vec<Outcome>,
    /// Cores that other programs used, on average over the timed rounds; none where it is not told.
    pub(crate) others: Option<f64>,
}

impl Lab {
    /// Writes weights, inputs and settings of a case.
    pub(crate) fn prepare(&self, name: &str, setting: &Setting) -> Result<Prepared> {
        let folder = self.out.join("cases").join(slug(name));
        files::remove(&folder)?;
        let args = setting.args(&folder);
        let mut prepared = Prepared {
            command: format!("{} {}", say(&self.binary), args.join(" ")),
            folder,
            model: None,
            student: None,
        };
        let output = Command::new(absolute(&self.binary))
            .args(&args)
            .output()
            .with_context(|| format!("{} cannot be started", self.binary.display()))?;
        if !output.status.success() {
            bail!(
                "`{}` failed ({})\n{}",
                prepared.command,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        if !matches!(setting.kind, Kind::Matmul | Kind::Copy) {
            prepared.model = Some(Model::read(&prepared.folder.join("model"))?);
        }
        if setting.kind == Kind::MaskedKd {
            prepared.student = Some(Model::read(&prepared.folder.join("student"))?);
        }
        Ok(prepared)
    }

    /// The contenders of a case that can take part.
    pub(crate) fn present(&self, contenders: &[Contender]) -> Vec<Contender> {
        let here = |c: &&Contender| self.python.is_some() || !c.is_python();
        contenders.iter().filter(here).copied().collect()
    }

    /// Starts all, lets them step in turn, so that a machine that drifts hurts all alike.
    pub(crate) fn alternate(
        &self,
        entries: &[Entry<'_>],
        rounds: usize,
        tick: impl Fn(f64),
    ) -> Result<Turns> {
        let mut workers = Vec::with_capacity(entries.len());
        let mut lines = Vec::with_capacity(entries.len());
        for entry in entries {
            let (mut command, line) = self.command(entry.contender, &entry.case.folder)?;
            let log = self
                .out
                .join("logs")
                .join(format!("{}.log", slug(&entry.name)));
            let worker = Worker::start(&entry.name, &mut command, &log)
                .with_context(|| format!("command: {line}"))?;
            workers.push(worker);
            lines.push(line);
        }
        let rhythm = Rhythm {
            warm_ups: WARM_UPS,
            rounds,
            pause: self.pause,
        };
        let Timed { seconds, others } = turns::take(&mut workers, rhythm, tick)?;
        let mut outcomes = Vec::with_capacity(entries.len());
        for ((worker, command), seconds) in workers.into_iter().zip(lines).zip(seconds) {
            outcomes.push(Outcome {
                command,
                seconds,
                versions: worker.versions.clone(),
                ready_rss_bytes: worker.ready_rss_bytes,
                last: worker.finish()?,
            });
        }
        Ok(Turns { outcomes, others })
    }

    /// The process of a contender, and its command to be pasted.
    fn command(&self, contender: Contender, folder: &Path) -> Result<(Command, String)> {
        let (program, args) = match (contender, &self.python) {
            (Contender::Ours | Contender::Half, _) => {
                (&self.binary, strings(&["bench", "worker", &say(folder)]))
            }
            (Contender::Eager, Some(python)) => (python, strings(&[PEER, &say(folder)])),
            (Contender::Compile, Some(python)) => {
                (python, strings(&[PEER, &say(folder), "--compile"]))
            }
            (_, None) => bail!("{} needs the Python environment", contender.name()),
        };
        let line = format!("{} {}", say(program), args.join(" "));
        let mut command = Command::new(absolute(program));
        command.args(args);
        if contender.is_python() {
            // What Python leaves behind stays out of the sources and under the build folder.
            command.env("PYTHONDONTWRITEBYTECODE", "1").env(
                "TORCHINDUCTOR_CACHE_DIR",
                absolute(Path::new("target/bench-inductor")),
            );
        }
        Ok((command, line))
    }
}

impl Setting {
    fn args(&self, folder: &Path) -> Vec<String> {
        let mut args = strings(&[
            "bench",
            "prepare",
            &say(folder),
            "--kind",
            self.kind.word(),
            "--model",
            &self.model,
            "--batch",
            &self.batch.to_string(),
            "--threads",
            &self.threads.to_string(),
        ]);
        for (flag, value) in [
            ("--depth", self.depth),
            ("--input-size", self.input_size),
            ("--micro-batches", self.micro_batches),
        ] {
            if let Some(value) = value {
                args.extend([flag.to_string(), value.to_string()]);
            }
        }
        args
    }
}

/// A name as a file's: `learn, LoRA, DiT-S/2` as `learn-lora-dit-s-2`.
pub(crate) fn slug(name: &str) -> String {
    let words = name
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|w| !w.is_empty());
    words
        .map(str::to_ascii_lowercase)
        .collect::<Vec<_>>()
        .join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_of_a_case_names_every_size() {
        let mut setting = Setting {
            kind: Kind::FineTune,
            model: "DiT-S/2".into(),
            batch: 8,
            threads: 2,
            depth: None,
            input_size: None,
            micro_batches: None,
        };
        let line = |s: &Setting| s.args(Path::new("runs/x")).join(" ");
        let plain = "bench prepare runs/x --kind fine-tune --model DiT-S/2 --batch 8 --threads 2";
        assert_eq!(line(&setting), plain);
        setting.depth = Some(6);
        setting.input_size = Some(16);
        assert_eq!(line(&setting), format!("{plain} --depth 6 --input-size 16"));
    }

    #[test]
    fn names_become_file_names() {
        assert_eq!(slug("learn, LoRA, DiT-S/2"), "learn-lora-dit-s-2");
    }

    #[cfg(unix)]
    #[test]
    fn contenders_take_turns_and_warm_ups_are_not_counted() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("fake");
        let calls = dir.path().join("calls");
        // `prepare` notes the folder's model; every step notes whose it is.
        let script = format!(
            "#!/bin/sh\nif [ $2 = prepare ]; then mkdir -p \"$3\"; exit; fi\n\
             echo '{{\"ready\": true}}'\n\
             while read line; do basename \"$3\" >>'{}'; sleep 0.01; echo '{{\"seconds\": 0.002}}'; done\n\
             echo '{{\"peak_rss_bytes\": 1}}'\n",
            calls.display()
        );
        std::fs::write(&binary, script).unwrap();
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
        let lab = Lab {
            binary,
            python: None,
            out: dir.path().join("out"),
            pause: Duration::ZERO,
        };
        assert_eq!(
            lab.present(&[Contender::Ours, Contender::Eager]),
            [Contender::Ours]
        );
        let setting = Setting {
            kind: Kind::Matmul,
            model: "DiT-S/2".into(),
            batch: 1,
            threads: 1,
            depth: None,
            input_size: None,
            micro_batches: None,
        };
        let cases = ["a", "b"].map(|name| lab.prepare(name, &setting).unwrap());
        let entries: Vec<Entry<'_>> = cases
            .iter()
            .map(|case| Entry {
                name: format!("test, {}", case.folder.display()),
                contender: Contender::Ours,
                case,
            })
            .collect();
        let turns = lab
            .alternate(&entries, 3, |share| assert!(share <= 1.0))
            .unwrap();
        assert!(turns.outcomes.iter().all(|o| o.seconds == [0.002; 3]));
        let said = std::fs::read_to_string(calls).unwrap();
        assert_eq!(said.lines().collect::<Vec<_>>(), ["a", "b"].repeat(5));
        let folder = cases[0].folder.clone();
        drop(cases);
        assert!(!folder.exists());
    }
}
