//! Runs that are really killed, and disks that really refuse: the tests run themselves again as a child.
#![allow(clippy::unwrap_used)] // helpers of tests: a panic is a failure
#![cfg(unix)]

mod common;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Problem, assert_same, checkpoints, config};
use tempfile::tempdir;
use tinyfusion_train::FitConfig;

/// Set for the child: the folder to train in.
const FOLDER: &str = "TINYFUSION_TRAIN_TEST_FOLDER";
/// 4 MB of weights: writing a checkpoint of 16 MB takes long enough to be met at it.
const BALLAST: usize = 1 << 20;

fn settings() -> FitConfig {
    FitConfig {
        checkpoint_every: 2,
        ..config(12)
    }
}

/// This test, and nothing else, in another process: the program and its arguments.
fn this_again(test: &str) -> Vec<OsString> {
    let program = env::current_exe().unwrap().into_os_string();
    [program]
        .into_iter()
        .chain(["--exact", test, "--nocapture"].map(OsString::from))
        .collect()
}

fn command(words: &[OsString], folder: &Path) -> Command {
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn slow_training(folder: &OsStr) {
    let mut problem = Problem::new(settings(), BALLAST);
    problem.slow = Duration::from_millis(3);
    problem.fit(Path::new(&folder)).unwrap();
}

/// Waits for `moment` while the child runs. False if the child ended first.
fn meet(child: &mut Child, moment: impl Fn() -> bool) -> bool {
    let patience = Instant::now() + Duration::from_secs(120);
    while !moment() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(
            Instant::now() < patience,
            "the child neither ends nor comes to the moment"
        );
        std::hint::spin_loop();
    }
    true
}

fn kill(mut child: Child) {
    child.kill().unwrap(); // SIGKILL
    let status = child.wait().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(9));
}

fn lines(folder: &Path) -> usize {
    fs::read(folder.join("history.jsonl")).map_or(0, |b| b.iter().filter(|b| **b == b'\n').count())
}

/// What stands in a checkpoint that is being written.
fn half_written(folder: &Path) -> Option<Vec<String>> {
    let entries = fs::read_dir(folder.join("checkpoints")).ok()?;
    let partial = entries
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "partial"))?;
    Some(
        fs::read_dir(partial)
            .ok()?
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect(),
    )
}

#[test]
fn killed_between_checkpoints_again_and_again() {
    if let Some(folder) = env::var_os(FOLDER) {
        return slow_training(&folder);
    }
    let (whole, broken) = (tempdir().unwrap(), tempdir().unwrap());
    Problem::new(settings(), BALLAST).fit(whole.path()).unwrap();
    let me = this_again("killed_between_checkpoints_again_and_again");
    let mut killed = 0;
    for after in [1, 3, 6, 7, 11] {
        let mut child = command(&me, broken.path()).spawn().unwrap();
        // The log may hold lines beyond the checkpoint from the last life: they go when the child resumes.
        if meet(&mut child, || lines(broken.path()) >= after) {
            kill(child);
            killed += 1;
        }
    }
    assert!(killed >= 3, "killed {killed} times");
    Problem::new(settings(), BALLAST)
        .fit(broken.path())
        .unwrap();
    assert_same(whole.path(), broken.path(), "after several kills");
}

#[test]
fn killed_while_a_checkpoint_is_written() {
    if let Some(folder) = env::var_os(FOLDER) {
        return slow_training(&folder);
    }
    let whole = tempdir().unwrap();
    Problem::new(settings(), BALLAST).fit(whole.path()).unwrap();
    let me = this_again("killed_while_a_checkpoint_is_written");

    // From the empty folder to the last file of a checkpoint, of the first one and of a later one.
    let stages: [&[&str]; 4] = [
        &[],
        &["model.safetensors"],
        &["model.safetensors", "ema.safetensors"],
        &[
            "model.safetensors",
            "ema.safetensors",
            "optimizer.safetensors",
        ],
    ];
    let mut met = 0;
    for (after, stage) in [0, 5]
        .into_iter()
        .flat_map(|after| stages.map(|s| (after, s)))
    {
        let what = format!("killed after {after} lines, at {stage:?}");
        // The writer may be quicker than the kill: try until it was met at it.
        for _ in 0..10 {
            let broken = tempdir().unwrap();
            let folder = broken.path();
            let mut child = command(&me, folder).spawn().unwrap();
            let there = || {
                half_written(folder)
                    .is_some_and(|names| stage.iter().all(|s| names.iter().any(|n| n == s)))
            };
            let in_time = meet(&mut child, || lines(folder) >= after && there());
            if !in_time {
                continue;
            }
            kill(child);
            let left = half_written(folder);
            Problem::new(settings(), BALLAST).fit(folder).unwrap();
            assert_same(whole.path(), folder, &what);
            if left.is_some() {
                met += 1;
                break;
            }
        }
    }
    assert!(
        met >= 6,
        "only {met} of 8 kills met a checkpoint half-written"
    );
}

#[test]
fn killed_while_the_old_checkpoint_is_removed() {
    if let Some(folder) = env::var_os(FOLDER) {
        return slow_training(&folder);
    }
    let whole = tempdir().unwrap();
    Problem::new(settings(), BALLAST).fit(whole.path()).unwrap();
    let me = this_again("killed_while_the_old_checkpoint_is_removed");
    for _ in 0..4 {
        let broken = tempdir().unwrap();
        let folder = broken.path();
        let mut child = command(&me, folder).spawn().unwrap();
        let both = || {
            let names = fs::read_dir(folder.join("checkpoints"));
            let whole = |name: &str| name.starts_with("step-") && !name.ends_with(".partial");
            names.is_ok_and(|n| {
                n.flatten()
                    .filter(|e| e.file_name().to_str().is_some_and(whole))
                    .count()
                    == 2
            })
        };
        if meet(&mut child, both) {
            kill(child);
        }
        Problem::new(settings(), BALLAST).fit(folder).unwrap();
        assert_same(whole.path(), folder, "killed with two checkpoints");
    }
}

/// As the disk is full, so is the largest size of a file: the write fails in the middle. (As root neither
/// permissions nor quotas bind, this limit does.)
#[test]
fn a_checkpoint_that_does_not_fit_leaves_the_last_one_whole() {
    const WEIGHTS: usize = 100_000; // 400 kB: model and averages 400 kB each, moments 800 kB
    if let Some(folder) = env::var_os(FOLDER) {
        let folder = Path::new(&folder);
        let error = Problem::new(settings(), WEIGHTS).fit(folder).unwrap_err();
        fs::write(folder.with_extension("error"), error.to_string()).unwrap();
        return;
    }
    let test = "a_checkpoint_that_does_not_fit_leaves_the_last_one_whole";
    let whole = tempdir().unwrap();
    Problem::new(settings(), WEIGHTS).fit(whole.path()).unwrap();

    for (first, file, blocks) in [
        (true, "model", 600),
        (false, "model", 600),
        (false, "optimizer", 1200),
    ] {
        let base = tempdir().unwrap();
        let folder = base.path().join("run");
        if !first {
            // Checkpoints of steps 2, 4 and 5.
            common::interrupted_at(
                Problem::new(settings(), WEIGHTS)
                    .stopping_at(4)
                    .fit(&folder),
            );
        }
        // With the signal ignored, a write beyond the limit (in blocks of 512 bytes) is an error.
        let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let shell = ["sh", "-c", &limited, "sh"].map(OsString::from);
        let words: Vec<OsString> = shell.into_iter().chain(this_again(test)).collect();
        let status = command(&words, &folder).status().unwrap();
        assert!(
            status.success(),
            "{status}: the child expects an error and did not get it"
        );

        let error = fs::read_to_string(folder.with_extension("error")).unwrap();
        let (failed, last) = if first { (2, None) } else { (6, Some(5)) };
        let place = folder.join(format!("checkpoints/step-{failed:06}"));
        assert!(
            error.starts_with(&format!("{}: ", place.display())),
            "{error}"
        );
        assert!(
            error.contains("could not be written") && error.contains("File too large"),
            "{error}"
        );
        assert!(error.contains(&format!("{file}.safetensors")), "{error}");
        match last {
            Some(step) => assert!(
                error.contains(&format!("checkpoint of step {step} is whole")),
                "{error}"
            ),
            None => assert!(error.contains("there is none before it"), "{error}"),
        }
        let stand: Vec<String> = last.iter().map(|s| format!("step-{s:06}")).collect();
        assert_eq!(checkpoints(&folder), stand);

        // With room again, the same command ends as if nothing had been.
        Problem::new(settings(), WEIGHTS).fit(&folder).unwrap();
        assert_same(whole.path(), &folder, "after a full disk");
    }
}

#[test]
fn two_processes_do_not_train_in_one_folder() {
    if let Some(folder) = env::var_os(FOLDER) {
        let mut problem = Problem::new(settings(), 0);
        problem.slow = Duration::from_secs(60);
        problem.fit(Path::new(&folder)).unwrap();
        return;
    }
    let base = tempdir().unwrap();
    let folder = base.path();
    // A left-over that the child removes once it holds the folder.
    fs::create_dir_all(folder.join("checkpoints/step-000002.partial")).unwrap();
    let me = this_again("two_processes_do_not_train_in_one_folder");
    let mut child = command(&me, folder).spawn().unwrap();
    assert!(
        meet(&mut child, || half_written(folder).is_none()),
        "the child ended"
    );
    let error = Problem::new(settings(), 0)
        .fit(folder)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("another process trains in this folder"),
        "{error}"
    );
    kill(child);
    Problem::new(settings(), 0).fit(folder).unwrap();
}
