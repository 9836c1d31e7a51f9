//! Running one stage: its stamp decides whether it is skipped, resumed or begun afresh.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tinyfusion_report::Machine;

use super::vocabulary::{Leftover, Stage};
use crate::files;

/// How often Ctrl-C (or SIGTERM, or a hang-up) has come.
static INTERRUPTS: AtomicUsize = AtomicUsize::new(0);

/// The run was stopped from outside; nothing is broken.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted; the same command resumes where it stopped")
    }
}

impl std::error::Error for Interrupted {}

/// A stage ended with an error of its own: it was neither interrupted nor killed.
#[derive(Debug)]
pub(crate) struct Failed {
    /// All that is to be said.
    text: String,
    /// The end of its log alone.
    pub(crate) tail: String,
    /// The binary did not take the command as it stands.
    pub(crate) refused: bool,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failed {}

/// From here on Ctrl-C is passed on to the stage that runs, and waited for.
pub(crate) fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        INTERRUPTS.fetch_add(1, Ordering::SeqCst);
    })
    .context("Ctrl-C cannot be caught")
}

/// What all stages of a run share.
#[derive(Clone)]
pub(crate) struct Driver {
    /// The binary, as it is written in the printed commands.
    pub(crate) binary: PathBuf,
    /// SHA-256 of the binary.
    pub(crate) binary_sha256: String,
    /// Where the run takes place, and what the binary was built from, as it was when the run began.
    pub(crate) machine: Machine,
    /// Folder of the run; stamps and logs stand in it.
    pub(crate) out: PathBuf,
}

/// What is recorded of a stage, before it starts and after it succeeded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// SHA-256 over arguments, inputs and binary.
    key: String,
    /// The command, to be pasted.
    pub(crate) command: String,
    state: State,
    /// Process of a started stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    /// Wall seconds, over resumed parts where the command counts them.
    #[serde(default)]
    pub(crate) seconds: Option<f64>,
    /// Wall seconds of this driver over all its starts of the stage, its own work before and after included.
    #[serde(default)]
    pub(crate) wall_seconds: Option<f64>,
    /// Largest resident memory in bytes.
    #[serde(default)]
    pub(crate) peak_rss_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Started,
    Done,
}

/// What the binary writes into every folder it fills.
#[derive(Deserialize)]
struct Resources {
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

/// What happened to a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Outcome {
    /// Its stamp matched.
    UpToDate,
    /// It ran for so many seconds just now.
    Ran(f64),
}

impl Driver {
    /// `tinyfusion` alone would be looked up in PATH.
    pub(super) fn absolute_binary(&self) -> PathBuf {
        std::path::absolute(&self.binary).unwrap_or_else(|_| self.binary.clone())
    }

    /// The command of `stage`, so that it can be pasted at the repository's root.
    pub(crate) fn command(&self, stage: &Stage) -> String {
        let mut words = vec![quote(&self.binary.display().to_string())];
        words.extend(stage.args.iter().map(|a| quote(a)));
        if let Some(file) = &stage.capture {
            words.extend([">".to_string(), quote(&file.display().to_string())]);
        }
        words.join(" ")
    }

    fn file(&self, kind: &str, stage: &str, ending: &str) -> PathBuf {
        self.out
            .join(kind)
            .join(format!("{}.{ending}", stage.replace('/', ".")))
    }

    /// The stamp of a stage, if there is a readable one.
    pub(crate) fn stamp(&self, stage: &str) -> Option<Stamp> {
        files::read_json(&self.file("stamps", stage, "json")).ok()
    }

    fn key(&self, stage: &Stage) -> Result<String> {
        let mut text = format!("binary {}\n", self.binary_sha256);
        for arg in &stage.args {
            text += &format!("arg {arg:?}\n");
        }
        for input in &stage.inputs {
            // What is on the hub is pinned by the lock, whose name is among the arguments.
            let Some(file) = files::local(input) else {
                continue;
            };
            let hash =
                files::hash_path(&file).with_context(|| format!("an input of `{}`", stage.name))?;
            text += &format!("input {:?} {hash}\n", input.display());
        }
        Ok(files::hash_text(&text))
    }

    /// Runs `stage` unless its stamp matches; `begin` is told the command when it starts, `tick`
    /// the seconds since then.
    pub(crate) fn run(
        &self,
        stage: &Stage,
        begin: impl FnOnce(&str),
        tick: impl Fn(f64),
    ) -> Result<Outcome> {
        let entered = Instant::now();
        let key = self.key(stage)?;
        let stamp_file = self.file("stamps", &stage.name, "json");
        let old = self.stamp(&stage.name);
        let same = old.as_ref().is_some_and(|s| s.key == key);
        let made = stage.outputs.iter().all(|o| o.exists());
        if same && made && old.as_ref().is_some_and(|s| s.state == State::Done) {
            return Ok(Outcome::UpToDate);
        }
        if let Some(pid) = old
            .as_ref()
            .and_then(|s| s.pid)
            .filter(|&pid| still_runs(pid, stage))
        {
            bail!(
                "`{}` still runs from an earlier start as process {pid}; wait for it or end it (kill {pid})",
                stage.name
            );
        }
        let resume = same && stage.leftover != Leftover::Remove;
        if !resume
            && stage.leftover == Leftover::Precious
            && stage.folder.as_ref().is_some_and(|f| f.exists())
        {
            bail!("{}", precious(stage, old.as_ref(), &self.command(stage)));
        }
        if !resume {
            // What other settings left behind must not be continued, nor taken for a result.
            wipe(stage)?;
        }
        for parent in stage
            .outputs
            .iter()
            .chain(&stage.folder)
            .filter_map(|p| p.parent())
        {
            // The binary makes its own OUT; only what surrounds it is made here.
            if stage
                .folder
                .as_deref()
                .is_none_or(|f| !parent.starts_with(f))
            {
                fs::create_dir_all(parent)
                    .with_context(|| format!("cannot make {}", parent.display()))?;
            }
        }
        let command = self.command(stage);
        begin(&command);
        let log = self.file("logs", &stage.name, "log");
        let earlier = old.filter(|_| resume).and_then(|s| s.wall_seconds);
        let wall = || Some(earlier.unwrap_or(0.0) + entered.elapsed().as_secs_f64());
        let started = Instant::now();
        let mut child = self.spawn(stage, &command, &log, resume)?;
        let mut stamp = Stamp {
            key,
            command,
            state: State::Started,
            pid: Some(child.id()),
            seconds: None,
            wall_seconds: earlier,
            peak_rss_bytes: None,
        };
        files::write_json(&stamp_file, &stamp)?;
        let (status, peak) = wait(&mut child, started, tick)?;
        let seconds = started.elapsed().as_secs_f64();
        stamp.pid = None;
        stamp.wall_seconds = wall();
        if !status.success() {
            files::write_json(&stamp_file, &stamp)?;
            if INTERRUPTS.load(Ordering::SeqCst) > 0 || status.code() == Some(130) {
                return Err(Interrupted.into());
            }
            let failed = failure(stage, &stamp.command, status, &log);
            if status.code().is_none() {
                // Killed, for example for its memory: that says nothing about the method.
                bail!("{failed}");
            }
            return Err(failed.into());
        }
        if let Some(file) = &stage.capture {
            fs::rename(partial(file), file)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        if let Some(missing) = stage.outputs.iter().find(|o| !o.exists()) {
            bail!(
                "`{}` ended well but did not write {}\n  command: {}",
                stage.name,
                missing.display(),
                stamp.command
            );
        }
        let told: Option<Resources> = stage
            .folder
            .as_ref()
            .and_then(|f| files::read_json(&f.join("resources.json")).ok());
        stamp.state = State::Done;
        stamp.seconds = Some(told.as_ref().map_or(seconds, |r| r.seconds));
        stamp.wall_seconds = wall();
        stamp.peak_rss_bytes = peak.max(told.and_then(|r| r.peak_rss_bytes));
        files::write_json(&stamp_file, &stamp)?;
        Ok(Outcome::Ran(seconds))
    }

    /// Removes what an earlier start of `stage` left, and its stamp: it has no result in this run.
    pub(crate) fn forget(&self, stage: &Stage) -> Result<()> {
        wipe(stage)?;
        files::remove(&self.file("stamps", &stage.name, "json"))
    }

    fn spawn(&self, stage: &Stage, command: &str, log: &Path, append: bool) -> Result<Child> {
        if INTERRUPTS.load(Ordering::SeqCst) > 0 {
            return Err(Interrupted.into());
        }
        let open = || -> std::io::Result<(File, Stdio)> {
            fs::create_dir_all(log.parent().unwrap_or(Path::new(".")))?;
            let mut log = File::options()
                .create(true)
                .write(true)
                .append(append)
                .truncate(!append)
                .open(log)?;
            writeln!(log, "$ {command}")?;
            let stdout = match &stage.capture {
                Some(file) => File::create(partial(file))?,
                None => log.try_clone()?,
            };
            Ok((log, stdout.into()))
        };
        let (log, stdout) =
            open().with_context(|| format!("cannot write the log {}", log.display()))?;
        let mut process = Command::new(self.absolute_binary());
        process
            .args(&stage.args)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(log);
        // A group of its own: Ctrl-C reaches the stage once, through `wait`, and not twice.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut process, 0);
        process
            .spawn()
            .with_context(|| format!("{} cannot be started", self.binary.display()))
    }
}

fn wipe(stage: &Stage) -> Result<()> {
    if stage.leftover == Leftover::Shared {
        return Ok(());
    }
    let paths = stage.outputs.iter().chain(&stage.folder);
    paths
        .chain(&stage.capture)
        .try_for_each(|path| files::remove(path))
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Waits for the end, passes interrupts on, watches the memory.
fn wait(
    child: &mut Child,
    started: Instant,
    tick: impl Fn(f64),
) -> Result<(ExitStatus, Option<u64>)> {
    let (mut told, mut peak) = (0, None);
    loop {
        peak = peak.max(peak_rss(child.id()));
        if let Some(status) = child.try_wait()? {
            return Ok((status, peak));
        }
        let interrupts = INTERRUPTS.load(Ordering::SeqCst);
        if interrupts > told {
            told = interrupts;
            if told > 2 {
                child.kill()?;
            } else {
                eprintln!(
                    "\nstopping: the stage writes a checkpoint first (twice more to end it at once)"
                );
                interrupt(child);
            }
        }
        tick(started.elapsed().as_secs_f64());
        // Short stages are not kept waiting, long ones not disturbed.
        let millis = if started.elapsed() < Duration::from_millis(500) {
            5
        } else {
            50
        };
        std::thread::sleep(Duration::from_millis(millis));
    }
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    // An error says that it has just ended, which the loop sees next.
    rustix::process::kill_process(
        rustix::process::Pid::from_child(child),
        rustix::process::Signal::INT,
    )
    .ok();
}

#[cfg(not(unix))]
fn interrupt(_: &Child) {} // the console tells every process

/// Largest resident memory of a living process, where /proc tells it.
pub(super) fn peak_rss(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()?
            * 1024,
    )
}

/// Whether process `pid` is this stage's, left over from a driver that was killed.
fn still_runs(pid: u32, stage: &Stage) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let args = stage.args.join("\0");
    String::from_utf8_lossy(&line)
        .trim_end_matches('\0')
        .ends_with(&args)
}

fn precious(stage: &Stage, old: Option<&Stamp>, new: &str) -> String {
    format!(
        "`{}`: {} holds a run of other settings, which is not removed by itself\n  then: {}\n  now:  {new}\n  \
         Remove that folder to begin again, or choose another one with --out.",
        stage.name,
        stage.folder.as_deref().unwrap_or(Path::new("")).display(),
        old.map_or("no stamp says which", |s| &s.command),
    )
}

fn failure(stage: &Stage, command: &str, status: ExitStatus, log: &Path) -> Failed {
    const LINES: usize = 20;
    /// The binary's exit code for a command that is not right.
    const USAGE: i32 = 2;
    /// As much as fits into a report.
    const FEW: usize = 3;
    let text = fs::read_to_string(log).unwrap_or_default();
    // The log's first line is the command, which is said anyway.
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with("$ ")).collect();
    let last = |n: usize, between: &str| lines[lines.len().saturating_sub(n)..].join(between);
    Failed {
        text: format!(
            "`{}` failed ({status})\n  command: {command}\n  end of {}:\n    {}\n  \
             The same command goes on from here: finished stages are not repeated.",
            stage.name,
            log.display(),
            last(LINES, "\n    "),
        ),
        tail: last(FEW, "\n"),
        refused: status.code() == Some(USAGE),
    }
}

/// Quotes a word for a POSIX shell, if it needs quotes.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
#[cfg(unix)] // they run /bin/sh
mod tests;
