//! The driver from end to end, on a stand-in for the binary that writes plausible outputs at once.
#![cfg(unix)]
#![allow(clippy::unwrap_used)] // a test: helpers may fail as loudly as tests

mod bench;
mod studies;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bench::{Bench, has, succeeded};

#[test]
fn a_run_writes_the_report_and_a_second_run_does_nothing() {
    let bench = Bench::new();
    let said = succeeded(&bench.run(&[], &[]));
    let calls = bench.calls();
    // Each printed command is the call that was made.
    let printed = said.lines().filter(|l| l.starts_with("$ ")).count();
    assert_eq!(printed, calls.len());
    assert!(
        said.contains("tinyfusion.sh learn ") && said.contains("about "),
        "{said}"
    );
    let results = bench.json("out/results.json");
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 13);
    for row in rows {
        for key in [
            "kept_layers",
            "depth",
            "parameters",
            "held_out_loss",
            "fid",
            "images_per_second",
            "seed",
            "inception_score",
            "precision",
            "recall",
            "kid",
            "accuracy",
        ] {
            assert!(!row[key].is_null(), "{} has no {key}", row["id"]);
        }
        assert_eq!(
            row["calibration_loss"].is_null(),
            row["criterion"] == "dense",
            "{}",
            row["id"]
        );
        assert!(
            row["sfid"].is_null()
                && row["stages"]["sampling"]["peak_rss_bytes"].as_u64() >= Some(300_000_000)
        );
    }
    let kd = rows.iter().find(|r| r["id"] == "learned-2-4-kd").unwrap();
    assert_eq!(
        kd["kept_layers"],
        serde_json::json!([0, 1, 4, 7, 9, 10, 12, 15])
    );
    assert_eq!(kd["stages"]["recovery"]["seconds"], 12.5);
    assert_eq!(kd["recovery"], "masked-kd");
    assert_eq!(results["random"][0]["count"], 4);
    assert!(results["machine"]["cores"].as_u64() >= Some(1));
    // No less than what the trainings say that they took, resumed or not.
    assert!(results["wall_seconds"].as_f64() >= results["seconds"].as_f64());
    let table = fs::read_to_string(bench.path("out/table.md")).unwrap();
    assert!(said.contains(&table) && said.trim_end().ends_with("/out/table.md"));
    has(
        &bench.path("out/report.md"),
        &[
            "| learned 2:4 (lora), masked KD |",
            "median of 4",
            "## What the numbers show",
        ],
    );
    let page = bench.path("out/report.html");
    has(
        &page,
        &[
            "Decisions: learned 1:2 (lora)",
            "data:image/png;base64,",
            "FID over calibration loss",
            "not on Inception",
        ],
    );
    assert_eq!(
        fs::read_to_string(&page).unwrap().matches("<img ").count(),
        13
    );
    if let Some(keep) = std::env::var_os("KEEP_REPORT") {
        fs::copy(&page, keep).unwrap();
    }

    let again = succeeded(&bench.run(&[], &[]));
    assert_eq!(bench.calls(), Vec::<String>::new());
    assert_eq!(again.matches(": up to date").count(), calls.len());

    // A changed teacher changes everything that reads it, and nothing else is left standing.
    fs::write(bench.path("teacher/model.safetensors"), "other").unwrap();
    succeeded(&bench.run(&[], &[]));
    let redone = bench.calls();
    assert!(redone.iter().any(|c| c.starts_with("learn ")) && !redone.is_empty());

    succeeded(&bench.run(&[], &["--force"]));
    assert_eq!(bench.calls().len(), calls.len());
}

#[test]
fn after_a_failure_the_run_goes_on_where_it_stopped() {
    let bench = Bench::new();
    let whole = bench.run(&[("FAKE_FAIL", "masks/learned-1-2/search --")], &[]);
    assert_eq!(whole.status.code(), Some(1));
    let said = String::from_utf8_lossy(&whole.stderr).into_owned();
    for part in [
        "`learned-1-2/search` failed (exit status: 1)",
        "command: ",
        "tinyfusion.sh learn ",
        "error: out of luck",
    ] {
        assert!(said.contains(part), "{part} is missing in {said}");
    }
    let first = bench.calls();
    assert!(!bench.path("out/results.json").exists());

    succeeded(&bench.run(&[], &[]));
    let second = bench.calls();
    // Only the failed call was made twice, and it continued its own folder.
    assert_eq!(first.last(), second.first());
    assert_eq!(
        fs::read_to_string(bench.path("out/masks/learned-1-2/search/parts")).unwrap(),
        "part\npart\n"
    );
    assert!(
        first[..first.len() - 1]
            .iter()
            .all(|call| !second.contains(call))
    );
    assert_eq!(
        bench.json("out/results.json")["rows"]
            .as_array()
            .unwrap()
            .len(),
        13
    );
}

#[test]
fn a_row_that_diverges_or_cannot_be_measured_leaves_the_report_standing() {
    let bench = Bench::new();
    let env = [
        ("FAKE_NULL", "rows/learned-1-2-ft/loss.json"),
        ("FAKE_FAIL", "rows/oracle-kd/samples --"),
    ];
    let output = bench.run(&env, &[]);
    // The report is there, and the run is not called a success.
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("1 of 13 rows could not be measured: oracle-kd/sampling failed"),
        "{said}"
    );
    let results = bench.json("out/results.json");
    let row = |id: &str| {
        let rows = results["rows"].as_array().unwrap();
        rows.iter().find(|r| r["id"] == id).unwrap().clone()
    };
    let failed = row("oracle-kd");
    assert!(failed["fid"].is_null() && failed["images_per_second"].is_null());
    assert!(failed["held_out_loss"].is_f64());
    assert_eq!(failed["failed"]["error"], "error: out of luck");
    assert!(row("learned-1-2-ft")["held_out_loss"].is_null());
    has(
        &bench.path("out/report.md"),
        &[
            "learned 1:2 (lora), fine-tuned diverged: ",
            "`oracle-kd/sampling` failed: error: out of luck.",
            "| diverged | diverged |",
        ],
    );
    let calls = bench.calls();
    assert!(!calls.iter().any(|c| c.contains("oracle-kd/scores.json")));
    // The next start tries what failed again, and only that.
    succeeded(&bench.run(&[], &[]));
    let again = bench.calls();
    assert_eq!(again.len(), 2, "{again:?}");
    assert!(bench.path("out/rows/oracle-kd/scores.json").exists());
}

#[test]
fn other_settings_begin_a_stage_afresh() {
    let bench = Bench::new();
    bench.run(&[("FAKE_FAIL", "rows/learned-2-4-kd/recovered --")], &[]);
    let preset = fs::read_to_string(bench.path("preset.toml")).unwrap();
    fs::write(
        bench.path("preset.toml"),
        preset.replace("alpha-kd = 0.9", "alpha-kd = 0.5"),
    )
    .unwrap();
    bench.calls();
    succeeded(&bench.run(&[], &[]));
    let calls = bench.calls();
    // The three distilled rows, from recovery on; their searches and the other rows stand.
    let verbs = |verb: &str| calls.iter().filter(|c| c.starts_with(verb)).count();
    assert_eq!(
        (
            verbs("distill"),
            verbs("learn"),
            verbs("score"),
            verbs("cut")
        ),
        (3, 0, 0, 0)
    );
    assert_eq!(
        fs::read_to_string(bench.path("out/rows/learned-2-4-kd/recovered/parts")).unwrap(),
        "part\n"
    );
}

#[test]
fn an_interrupt_reaches_the_stage_and_the_next_start_resumes_it() {
    let bench = Bench::new();
    let mut child = bench
        .command(&[("FAKE_HANG", "masks/learned-1-2/search --")], &[])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !bench.path("calls.hanging").exists() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the stage was not reached"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = Command::new("sh")
        .args(["-c", &format!("kill -INT {}", child.id())])
        .status()
        .unwrap();
    assert!(told.success());
    let ended = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(
            ended.elapsed() < Duration::from_secs(20),
            "the interrupt was not heard"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&output.stderr).contains("the same command resumes"));
    let log = bench.path("out/logs/learned-1-2.search.log");
    has(&log, &["checkpoint written"]);
    succeeded(&bench.run(&[], &[]));
    assert_eq!(
        fs::read_to_string(bench.path("out/masks/learned-1-2/search/parts")).unwrap(),
        "part\npart\n"
    );
}

#[test]
fn parts_run_one_after_another_and_share_a_report() {
    let bench = Bench::new();
    let tiny = fs::read_to_string(bench.path("preset.toml")).unwrap();
    fs::create_dir(bench.path("sit")).unwrap();
    fs::write(bench.path("sit/model.safetensors"), "sit").unwrap();
    let config = r#"{"architecture":"SiT","depth":16}"#;
    fs::write(bench.path("sit/config.json"), config).unwrap();
    fs::write(bench.path("one.toml"), &tiny).unwrap();
    let (teacher, sit) = (bench.path("teacher"), bench.path("sit"));
    let other = tiny.replace(&teacher.display().to_string(), &sit.display().to_string());
    fs::write(bench.path("two.toml"), other).unwrap();
    let whole = "title = \"both\"\nparts = [\"one\", \"two\"]";
    fs::write(bench.path("preset.toml"), whole).unwrap();

    // A row of the first part that fails does not stop the second.
    let output = bench.run(&[("FAKE_FAIL", "out/one/rows/oracle-kd/samples --")], &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("1 of 26 rows could not be measured: one/oracle-kd/sampling failed")
            && said.contains("out/one/logs)"),
        "{said}"
    );
    bench.calls();
    let said = succeeded(&bench.run(&[], &[]));
    assert_eq!(bench.calls().len(), 2);
    // One count over the stages of all parts.
    let count = said.lines().filter(|l| l.starts_with('[')).count();
    assert!(said.contains(&format!("[{count}/{count}] ")), "{said}");
    for part in ["one", "two"] {
        assert!(said.contains(&format!("== {part}\n")), "{said}");
        let rows = bench.json(&format!("out/{part}/results.json"));
        assert_eq!(rows["rows"].as_array().unwrap().len(), 13);
    }
    let results = bench.json("out/results.json");
    assert_eq!(results["parts"][1]["family"], "SiT");
    has(
        &bench.path("out/report.md"),
        &["# tinyfusion: both", "## DiT, teacher ", "## SiT, teacher "],
    );
    let page = fs::read_to_string(bench.path("out/report.html")).unwrap();
    assert_eq!(page.matches("<img ").count(), 26);
    let table = fs::read_to_string(bench.path("out/table.md")).unwrap();
    assert!(said.contains(&table));

    succeeded(&bench.run(&[], &["--force"]));
    assert_eq!(bench.calls().len(), count);
}

#[test]
fn what_is_missing_is_said_before_anything_runs() {
    let bench = Bench::new();
    fs::remove_file(bench.path("classifier/config.json")).unwrap();
    let output = bench.run(&[], &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("missing:")
            && said.contains("classifier/config.json")
            && said.contains("cargo xtask pretrain"),
        "{said}"
    );
    assert_eq!(bench.calls(), Vec::<String>::new());
}

#[test]
fn a_dry_run_prints_everything_and_does_nothing() {
    let bench = Bench::new();
    fs::remove_file(bench.path("classifier/config.json")).unwrap();
    let said = succeeded(&bench.run(&[], &["--dry-run"]));
    for part in [
        "/recovery: about ",
        "$ ",
        "== Downloads\n\nnone",
        "== Estimate",
        "expect on two cores",
        "== Missing",
        "classifier/config.json",
    ] {
        assert!(said.contains(part), "{part} is missing in\n{said}");
    }
    assert_eq!(bench.calls(), Vec::<String>::new());
    assert!(!bench.path("out").exists());
}
