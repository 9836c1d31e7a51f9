use std::cell::Cell;

use super::*;

/// A driver of `/bin/sh` and a stage that copies its input behind a line of its own.
fn sketch(dir: &Path, word: &str) -> (Driver, Stage) {
    let driver = Driver {
        binary: "/bin/sh".into(),
        binary_sha256: "b".into(),
        machine: crate::machine::of_here("b", false),
        out: dir.join("out"),
    };
    let (input, folder) = (dir.join("in"), dir.join("out/stage"));
    let script = format!(
        "mkdir -p '{0}' && echo {word} >> '{0}/o' && cat '{1}' >> '{0}/o'",
        folder.display(),
        input.display()
    );
    let stage = Stage {
        name: "a/copy".into(),
        args: vec!["-c".into(), script],
        inputs: vec![input],
        outputs: vec![folder.join("o")],
        folder: Some(folder),
        leftover: Leftover::Resume,
        capture: None,
        seconds: 1.0,
    };
    (driver, stage)
}

fn ran(driver: &Driver, stage: &Stage) -> bool {
    let begun = Cell::new(false);
    let outcome = driver.run(stage, |_| begun.set(true), |_| {}).unwrap();
    assert_eq!(begun.get(), matches!(outcome, Outcome::Ran(_)));
    begun.get()
}

#[test]
fn a_stage_is_skipped_until_command_input_binary_or_output_change() {
    let dir = tempfile::tempdir().unwrap();
    let (mut driver, stage) = sketch(dir.path(), "one");
    fs::write(dir.path().join("in"), "x").unwrap();
    assert!(ran(&driver, &stage));
    assert!(!ran(&driver, &stage));
    fs::write(dir.path().join("in"), "y").unwrap();
    assert!(ran(&driver, &stage));
    assert!(!ran(&driver, &stage));
    let (_, other) = sketch(dir.path(), "two");
    assert!(ran(&driver, &other));
    // Wiped, not continued: only the second command's line stands there.
    assert_eq!(fs::read_to_string(&other.outputs[0]).unwrap(), "two\ny");
    driver.binary_sha256 = "c".into();
    assert!(ran(&driver, &other));
    fs::remove_file(&other.outputs[0]).unwrap();
    assert!(ran(&driver, &other));
    assert!(!ran(&driver, &other));
}

#[test]
fn a_failed_stage_is_continued_if_it_can_and_begun_afresh_if_not() {
    for leftover in [Leftover::Resume, Leftover::Remove] {
        let dir = tempfile::tempdir().unwrap();
        let (driver, mut stage) = sketch(dir.path(), "part");
        stage.leftover = leftover;
        stage.args[1] += &format!(" && test -e '{}/go'", dir.path().display());
        fs::write(dir.path().join("in"), "x\n").unwrap();
        let error = driver.run(&stage, |_| {}, |_| {}).unwrap_err().to_string();
        assert!(
            error.contains("`a/copy` failed (exit status: 1)") && error.contains("/bin/sh -c '"),
            "{error}"
        );
        fs::write(dir.path().join("go"), "").unwrap();
        assert!(ran(&driver, &stage));
        let expected = if leftover == Leftover::Resume {
            "part\nx\npart\nx\n"
        } else {
            "part\nx\n"
        };
        assert_eq!(fs::read_to_string(&stage.outputs[0]).unwrap(), expected);
        assert!(!ran(&driver, &stage));
    }
}

#[test]
fn hours_of_training_are_not_removed_by_other_settings() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, mut stage) = sketch(dir.path(), "one");
    stage.leftover = Leftover::Precious;
    fs::write(dir.path().join("in"), "x").unwrap();
    assert!(ran(&driver, &stage));
    assert!(!ran(&driver, &stage));
    let (_, mut other) = sketch(dir.path(), "two");
    other.leftover = Leftover::Precious;
    let error = driver.run(&other, |_| {}, |_| {}).unwrap_err().to_string();
    assert!(
        error.contains("other settings")
            && error.contains("echo one")
            && error.contains("echo two"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&stage.outputs[0]).unwrap(), "one\nx");
}

#[test]
fn a_failure_shows_the_end_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, mut stage) = sketch(dir.path(), "x");
    fs::write(dir.path().join("in"), "x").unwrap();
    stage.args[1] = "seq 1 50; echo why >&2; exit 3".into();
    let error = driver.run(&stage, |_| {}, |_| {}).unwrap_err().to_string();
    assert!(
        error.contains("exit status: 3") && error.contains("\n    50\n    why\n"),
        "{error}"
    );
    assert!(!error.contains("\n    30\n"), "{error}");
    stage.args[1] = "true".into();
    let error = driver.run(&stage, |_| {}, |_| {}).unwrap_err().to_string();
    assert!(error.contains("did not write"), "{error}");
}

#[test]
fn captured_output_and_told_resources_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, mut stage) = sketch(dir.path(), "x");
    fs::write(dir.path().join("in"), "x").unwrap();
    let told = r#"{"seconds": 7.5, "peak_rss_bytes": 99000000000, "threads": 2}"#;
    stage.args[1] += &format!(
        "; echo '{told}' > '{}/resources.json'; echo out",
        stage.folder.as_ref().unwrap().display()
    );
    let file = dir.path().join("out/captured");
    stage.capture = Some(file.clone());
    assert!(ran(&driver, &stage));
    assert_eq!(fs::read_to_string(file).unwrap(), "out\n");
    let stamp = driver.stamp("a/copy").unwrap();
    assert_eq!(
        (stamp.seconds, stamp.peak_rss_bytes),
        (Some(7.5), Some(99_000_000_000))
    );
}

#[test]
fn a_process_left_over_is_not_run_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut stage) = sketch(dir.path(), "x");
    stage.args = vec!["-c".into(), "read line; true".into()];
    let mut child = Command::new("/bin/sh")
        .args(&stage.args)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // The system fills in the command line a little after the start.
    let begun = Instant::now();
    while !still_runs(child.id(), &stage) {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "its command line was not found"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    stage.args[1] = "read other; true".into();
    assert!(!still_runs(child.id(), &stage));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn words_are_quoted_for_the_shell() {
    assert_eq!(quote("--lr=5e-4"), "--lr=5e-4");
    assert_eq!(quote("a b"), "'a b'");
    assert_eq!(quote("it's"), "'it'\\''s'");
    assert_eq!(quote(""), "''");
}
