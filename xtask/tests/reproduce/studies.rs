//! The studies: seeds, chains of cuts, and the files that their plots are drawn from.

use std::fs;

use serde_json::Value;

use crate::bench::{Bench, has, succeeded};

#[test]
fn a_recovery_that_fails_ends_its_row_unless_others_need_its_model() {
    let bench = Bench::of("table7");
    let output = bench.run(&[("FAKE_FAIL", "rows/jump-by-d8/recovered --")], &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("1 of 7 rows could not be measured: jump-by-d8/recovery failed"),
        "{said}"
    );
    let results = bench.json("out/results.json");
    let rows = results["rows"].as_array().unwrap();
    let failed = rows.iter().find(|r| r["id"] == "jump-by-d8").unwrap();
    assert_eq!(failed["failed"]["error"], "error: out of luck");
    assert!(failed["calibration_loss"].is_f64() && failed["fid"].is_null());
    bench.calls();
    // The next start goes on in the same folder.
    succeeded(&bench.run(&[], &[]));
    assert_eq!(bench.calls().len(), 4);
    assert_eq!(
        fs::read_to_string(bench.path("out/rows/jump-by-d8/recovered/parts")).unwrap(),
        "part\npart\n"
    );

    let bench = Bench::of("table7");
    let output = bench.run(&[("FAKE_FAIL", "rows/d8-kd/recovered --")], &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("`d8-kd/recovery` failed (exit status: 1)"),
        "{said}"
    );
    assert!(!bench.path("out/results.json").exists());
}

#[test]
fn a_study_is_extended_by_seeds_and_its_chains_are_counted_from_the_teacher() {
    let bench = Bench::of("table7");
    succeeded(&bench.run(&[], &[]));
    let once = bench.calls();
    succeeded(&bench.run(&[], &["--seeds", "2"]));
    let added = bench.calls();
    // Another seed is trained and measured; nothing of the first is done again, nor the dense rows.
    assert!(added.iter().all(|call| !once.contains(call)));
    assert!(
        added.iter().all(|call| call.contains("-seed-1")),
        "{added:?}"
    );
    // inspect, loss, sample, evaluate
    assert_eq!(added.len(), once.len() - 4);

    let results = bench.json("out/results.json");
    assert_eq!(results["study"]["kind"], "table7");
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1 + 2 * 6);
    let row = |id: &str| rows.iter().find(|r| r["id"] == id).unwrap();
    let second = row("halves-seed-1-by-d8");
    for (key, value) in [
        ("group", Value::from("halves-by-d8")),
        ("repetition", 1.into()),
        ("seed", 1.into()),
        ("recovery", "masked-kd".into()),
        ("recovery_label", "taught by 8 blocks".into()),
        ("budget_steps", 900.into()),
        ("samples_seen", 14400.into()),
        ("depth", 4.into()),
    ] {
        assert_eq!(second[key], value, "{key}");
    }
    assert_eq!(second["labels"]["route"], "16→8→4");
    // The second cut keeps blocks 0, 2, 5 and 7 of the eight that the first one kept.
    let eight = row("d8-seed-1-kd")["kept_layers"].as_array().unwrap();
    let of_teacher: Vec<&Value> = [0, 2, 5, 7].iter().map(|i| &eight[*i as usize]).collect();
    assert_eq!(second["kept_layers"], serde_json::json!(of_teacher));
}

#[test]
fn studies_of_speed_and_of_hidden_states_have_what_they_draw() {
    let bench = Bench::of("figure4");
    succeeded(&bench.run(&[], &[]));
    let results = bench.json("out/results.json");
    let row = |id: &str| {
        let rows = results["rows"].as_array().unwrap();
        rows.iter().find(|r| r["id"] == id).unwrap().clone()
    };
    assert_eq!(
        row("depth-4-ft")["kept_layers"],
        serde_json::json!([0, 5, 10, 15])
    );
    // A narrower model has all blocks.
    assert_eq!(row("width-8-ft")["depth"], 16);
    assert_eq!(row("width-8-ft")["criterion"], "width");

    let bench = Bench::of("activations");
    succeeded(&bench.run(&[], &[]));
    let results = bench.json("out/results.json");
    for row in results["rows"].as_array().unwrap() {
        let file = row["traces"]["activations"].as_str().unwrap();
        assert!(bench.path("out").join(file).is_file(), "{file}");
    }
    let bench = Bench::of("figure6");
    succeeded(&bench.run(&[], &[]));
    let results = bench.json("out/results.json");
    let learned = results["rows"].as_array().unwrap().iter().skip(1);
    for row in learned {
        let file = row["traces"]["history"].as_str().unwrap();
        assert!(bench.path("out").join(file).is_file(), "{file}");
    }
}

#[test]
fn a_study_of_two_depths_and_budgets_is_reported_class_by_class() {
    let bench = Bench::of("table1");
    succeeded(&bench.run(&[], &[]));
    let results = bench.json("out/results.json");
    let random = results["random"].as_array().unwrap();
    // Two patterns by two budgets, each with its three masks; then those over all masks, whose two depths are one to the
    // stand-in, which gives every cut model eight blocks.
    let counts: Vec<&Value> = random.iter().map(|r| &r["count"]).collect();
    assert_eq!(counts, [3, 3, 3, 3, 2, 2]);
    let report = bench.path("out/report.md");
    has(
        &report,
        &[
            "| **random 2:4, median of 3, fine-tuned, 200 steps** |",
            "Does the learned mask beat the median random mask?",
        ],
    );
    has(
        &bench.path("out/report.html"),
        &["FID of every method", "Held-out loss of every method"],
    );
}

#[test]
fn recoveries_are_tested_against_the_one_that_the_preset_names() {
    let bench = Bench::of("table5");
    succeeded(&bench.run(&[], &["--seeds", "2"]));
    let heading = "### Tested against the baseline: recovery fine-tuned";
    has(
        &bench.path("out/report.md"),
        &[heading, "Is anything better than the baseline?"],
    );
    for preset in ["table7", "kd-batch"] {
        let presets = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/presets");
        has(
            &std::path::Path::new(presets).join(format!("{preset}.toml")),
            &["against = ["],
        );
    }
}
