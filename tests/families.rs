//! SiT and MAR go the way of DiT: learned, cut, distilled, judged and sampled by the same commands.
#![allow(clippy::unwrap_used)] // a test may panic

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;

use candle_core::Tensor;
use tinyfusion_tests::{Place, TINY};

const FAMILIES: [&str; 2] = ["sit", "mar"];

/// A barely trained teacher of the family in `teacher/model`: four blocks, of which a MAR has two in each stage.
fn with_teacher(family: &str) -> Place {
    let place = Place::new();
    place.ok(&format!(
        "pretrain teacher --what {family} --steps 4 {TINY}"
    ));
    place
}

#[test]
fn a_teacher_of_any_family_becomes_a_recovered_student() {
    for family in FAMILIES {
        let place = with_teacher(family);
        let budget = "--steps 4 --batch-size 8";
        place.ok(&format!(
            "learn teacher/model learned --pattern 1:2 {budget}"
        ));
        let kept = place.json("learned/selection.json")["kept"].clone();
        assert_eq!(kept.as_array().unwrap().len(), 2, "{family}");
        place.ok("cut teacher/model cut --selection learned/selection.json");
        place.ok(&format!(
            "distill cut student {budget} --teacher teacher/model --features masked"
        ));
        let config = place.json("student/model/config.json");
        assert_eq!(
            config["architecture"],
            place.json("teacher/model/config.json")["architecture"]
        );
        assert_eq!(config["provenance"]["kept"], kept, "{family}");
        // Judged by the loss of its own process, on the same draws, whole and with blocks skipped.
        let loss = |line: &str| -> f64 {
            let text = place.ok(line);
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["loss"]
                .as_f64()
                .unwrap()
        };
        let skipping = loss("loss teacher/model --selection learned/selection.json --images 16");
        let cut = loss("loss cut --images 16");
        assert!(
            (skipping - cut).abs() < 1e-5 * cut,
            "{family}: {skipping} {cut}"
        );
        let steps = if family == "mar" {
            "--iterations 4 --steps 3"
        } else {
            "--steps 3"
        };
        place.ok(&format!("sample student/model images --count 6 {steps}"));
        assert!(place.path("images/grid.png").is_file());
        place.ok("inspect student/model");
    }
}

#[test]
fn images_do_not_depend_on_their_neighbours() {
    for (family, flags) in [
        ("sit", "--sampler euler --steps 3"),
        ("sit", "--sampler sde-heun --steps 3 --form sigma"),
        ("mar", "--iterations 4 --steps 3"),
    ] {
        let place = with_teacher(family);
        place.ok(&format!(
            "sample teacher/model a --count 6 --batch-size 6 {flags}"
        ));
        place.ok(&format!(
            "sample teacher/model b --count 6 --batch-size 4 {flags}"
        ));
        assert!(
            place.bytes("a/grid.png") == place.bytes("b/grid.png"),
            "{family} {flags}: another batch size gives other images"
        );
        let mode = |name: &str| {
            std::fs::metadata(place.path(name))
                .unwrap()
                .permissions()
                .mode()
        };
        assert_eq!(mode("a/samples.npz"), mode("a/sample.json"));
        let report = place.json("a/sample.json");
        assert!(report["steps"].as_u64().is_some(), "{report}");
    }
}

/// Matrix products of other sizes add in another order, so that a value may round to the next level, now and then.
#[test]
fn samples_of_a_seed_are_the_same_in_any_batch_and_share_up_to_rounding() {
    for (family, flags) in [
        ("dit", "--steps 5"),
        ("sit", "--sampler heun --steps 5"),
        ("mar", "--iterations 4 --steps 5"),
    ] {
        let place = match family {
            "dit" => Place::with_teacher(),
            _ => with_teacher(family),
        };
        let images = |out: &str, rest: &str| -> Vec<u8> {
            place.ok(&format!(
                "sample teacher/model {out} --count 21 {flags} {rest}"
            ));
            let arrays = Tensor::read_npz(place.path(&format!("{out}/samples.npz"))).unwrap();
            let images = arrays
                .into_iter()
                .find(|(name, _)| name == "arr_0")
                .unwrap();
            images.1.flatten_all().unwrap().to_vec1().unwrap()
        };
        let whole = images("whole", "--batch-size 21");
        let other = images("other", "--batch-size 4");
        let shares = [
            images("first", "--share 0/2 --batch-size 7"),
            images("second", "--share 1/2 --batch-size 8"),
        ]
        .concat();
        for found in [other, shares] {
            assert_eq!(found.len(), whole.len(), "{family}");
            let apart = found.iter().zip(&whole).map(|(a, b)| a.abs_diff(*b));
            let apart: Vec<u8> = apart.filter(|levels| *levels > 0).collect();
            assert!(
                apart.iter().all(|levels| *levels == 1),
                "{family}: {apart:?}"
            );
            let most = whole.len() / 1000;
            assert!(
                apart.len() <= most,
                "{family}: {} of {}",
                apart.len(),
                whole.len()
            );
        }
    }
}

#[test]
fn every_sampler_of_a_sit_draws() {
    let place = with_teacher("sit");
    for (i, flags) in [
        "--sampler heun --steps 2 --cfg 1",
        "--sampler dopri5 --atol 1e-2 --rtol 1e-2",
        "--sampler sde-euler --steps 4 --form increasing-decreasing --last-step tweedie",
        "--sampler sde-euler --steps 4 --form linear --form-norm 0.5 --last-step euler --last-step-size 0.1",
        "--sampler sde-euler --steps 4 --form decreasing --last-step none",
    ]
    .iter()
    .enumerate()
    {
        place.ok(&format!("sample teacher/model out{i} --count 2 {flags}"));
    }
}

#[test]
fn a_resumed_run_is_the_unbroken_one() {
    for family in FAMILIES {
        let place = with_teacher(family);
        if family == "mar" {
            // The embedded one has no dropout; here it is to be resumed, too.
            let mut config = place.json("teacher/model/config.json");
            config["model"]["attn_dropout"] = 0.1.into();
            config["model"]["proj_dropout"] = 0.1.into();
            std::fs::write(place.path("teacher/model/config.json"), config.to_string()).unwrap();
        }
        let line =
            "learn teacher/model OUT --pattern 1:2 --steps 150 --batch-size 8 --checkpoint-every 1";
        place.ok(&line.replace("OUT", "whole"));
        let mut child = place.start(&line.replace("OUT", "broken"));
        // Killed as soon as there is something to resume from.
        let begun = std::time::Instant::now();
        while !place.path("broken/history.jsonl").exists() && begun.elapsed().as_secs() < 60 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        child.kill().unwrap();
        assert_eq!(
            child.wait().unwrap().signal(),
            Some(9),
            "{family}: it was still running"
        );
        place.ok(&line.replace("OUT", "broken"));
        assert_eq!(
            place.text("whole/history.jsonl"),
            place.text("broken/history.jsonl"),
            "{family}"
        );
        let last = "checkpoints/step-000150/model.safetensors";
        assert!(
            place.bytes(&format!("whole/{last}")) == place.bytes(&format!("broken/{last}")),
            "{family}: other weights"
        );
    }
}

#[test]
fn what_a_family_does_not_know_is_refused() {
    let (sit, mar, dit) = (
        with_teacher("sit"),
        with_teacher("mar"),
        Place::with_teacher(),
    );
    for (place, flags, says) in [
        (&sit, "--sampler ddim", "not sampled with ddim"),
        (&sit, "--eta 0.5", "eta"),
        (&sit, "--sampler euler --atol 1e-3", "atol"),
        (&sit, "--sampler heun --form sigma", "form"),
        (&sit, "--sampler dopri5 --steps 9", "steps"),
        (&sit, "--iterations 4", "iterations"),
        (&sit, "--sampler sde-euler --steps 1", "num_steps"),
        (&mar, "--sampler euler", "sampler"),
        (&mar, "--clip true", "clip"),
        (&mar, "--cfg-channels all", "cfg-channels"),
        (
            &sit,
            "--sampler sde-euler --last-step none --last-step-size 0.1",
            "last-step-size",
        ),
        (&mar, "--temperature -1", "temperature"),
        (&mar, "--iterations 0", "num_iter"),
        (&dit, "--sampler heun", "not sampled with heun"),
        (&dit, "--temperature 0.9", "temperature"),
        (&dit, "--last-step mean", "last-step"),
    ] {
        let error = place.fails(2, &format!("sample teacher/model out --count 2 {flags}"));
        assert!(error.contains(says), "{flags}: {error}");
        assert!(!place.path("out").exists(), "{flags}");
    }
    // A group never crosses the bridge, and no stage is left without blocks.
    let error = mar.fails(2, "learn teacher/model out --pattern 2:4 --steps 1");
    assert!(error.contains("stage"), "{error}");
    let error = mar.fails(2, "cut teacher/model out --keep 0,1");
    assert!(error.contains("decoder"), "{error}");
    let error = mar.fails(2, "cut teacher/model out --keep 1,2 --pattern 2:4");
    assert!(error.contains("stage"), "{error}");
    mar.ok("cut teacher/model both --keep 1,2");
    let groups = mar.json("both/selection.json")["groups"].clone();
    assert_eq!(
        groups,
        serde_json::json!([{"n": 1, "m": 2}, {"n": 1, "m": 2}])
    );
    let crossing = mar.json("both/selection.json");
    let mut crossing = crossing.clone();
    crossing["groups"] = serde_json::json!([{"n": 2, "m": 4}]);
    std::fs::write(mar.path("crossing.json"), crossing.to_string()).unwrap();
    for line in [
        "cut teacher/model out --selection crossing.json",
        "loss teacher/model --selection crossing.json --images 8",
        "distill both out --selection crossing.json --teacher teacher/model --steps 1",
    ] {
        let error = mar.fails(2, line);
        assert!(
            error.contains("stage") && error.contains("crossing.json"),
            "{error}"
        );
        assert!(!mar.path("out").exists(), "{line}");
    }
    // A student is taught by its own kind, which draws the same.
    let teacher = mar.path("teacher/model");
    let line = format!(
        "distill teacher/model out --teacher {} --features none --steps 1",
        teacher.display()
    );
    let error = sit.fails(1, &line);
    assert!(error.contains("MAR") && error.contains("SiT"), "{error}");
}

#[test]
fn a_dit_can_become_a_sit() {
    let place = Place::with_teacher();
    let flags = "--steps 2 --batch-size 8 --depth 4 --hidden-size 16 --num-heads 2 --patch-size 8";
    place.ok(&format!(
        "pretrain sit --what sit --from teacher/model {flags}"
    ));
    let config = place.json("sit/model/config.json");
    assert_eq!(config["architecture"], "SiT");
    assert!(config["provenance"]["parent_sha256"].is_string());
    let error = place.fails(
        1,
        &format!("pretrain mar --what mar --from teacher/model {flags}"),
    );
    assert!(error.contains("missing"), "{error}");
    assert!(!place.path("mar").exists());
    place.fails(
        2,
        "pretrain c --what classifier --from teacher/model --steps 1",
    );
}

#[test]
fn a_teacher_that_cannot_teach_is_refused_before_the_run() {
    let place = with_teacher("mar");
    let other = "--depth 4 --num-heads 2 --batch-size 8 --steps 1";
    place.ok(&format!(
        "pretrain patches --what mar --hidden-size 16 --patch-size 4 {other}"
    ));
    place.ok(&format!(
        "pretrain wide --what mar --hidden-size 32 --patch-size 8 {other}"
    ));
    for teacher in ["patches", "wide"] {
        let error = place.fails(
            2,
            &format!(
                "distill teacher/model out --teacher {teacher}/model --features none --steps 1"
            ),
        );
        assert!(error.contains("cannot teach"), "{error}");
        assert!(!place.path("out").exists());
    }
}

#[test]
fn a_key_that_no_family_knows_is_named() {
    let place = with_teacher("sit");
    let file = place.path("teacher/model/config.json");
    let mut config = place.json("teacher/model/config.json");
    let process = config["interpolant"].take();
    config.as_object_mut().unwrap().remove("interpolant");
    config["interpolent"] = process;
    std::fs::write(&file, config.to_string()).unwrap();
    for line in ["inspect teacher/model", "loss teacher/model --images 8"] {
        let error = place.fails(1, line);
        assert!(
            error.contains("`interpolent`") && error.contains("interpolant,"),
            "{error}"
        );
    }
}
