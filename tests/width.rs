//! Cut in width: a narrow model loads, draws, learns from its dense teacher and is cut in depth like any other.
#![allow(clippy::unwrap_used)] // a test may panic

use tinyfusion_tests::{Place, TINY, partials};

/// Few images and timesteps: the numbers do not matter here.
const QUICK: &str = "--samples 8 --stride 100";

fn loss(place: &Place, model: &str) -> f64 {
    let text = place.ok(&format!("loss {model} --images 16"));
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    found["loss"].as_f64().unwrap()
}

#[test]
fn a_narrow_model_goes_through_every_command() {
    let place = Place::with_teacher();
    let printed = place.ok(&format!("narrow teacher/model narrow --ratio 0.5 {QUICK}"));
    assert!(printed.contains("ratio 0.5"), "{printed}");
    let (dense, config) = (
        place.json("teacher/model/config.json"),
        place.json("narrow/config.json"),
    );
    assert!(dense["model"].get("widths").is_none());
    assert_eq!(config["model"]["hidden_size"], 16);
    let one = serde_json::json!({"heads": 1, "hidden": 32});
    assert_eq!(
        config["model"]["widths"],
        serde_json::json!([one, one, one, one])
    );
    assert_eq!(
        config["provenance"]["narrowed"],
        serde_json::json!({"ratio": 0.5, "importance": "taylor"})
    );
    assert_eq!(
        config["provenance"]["parent_sha256"],
        dense["weights"]["sha256"]
    );

    // Of every layer the best half is kept, and why is on record.
    let report = place.json("narrow/importance.json");
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 8);
    for layer in layers {
        let score = |k: u64| layer["scores"][k as usize].as_f64().unwrap();
        let kept: Vec<u64> = layer["kept"]
            .as_array()
            .unwrap()
            .iter()
            .map(|k| k.as_u64().unwrap())
            .collect();
        let count = layer["scores"].as_array().unwrap().len() as u64;
        assert_eq!(kept.len() as u64 * 2, count);
        let least = kept.iter().map(|&k| score(k)).fold(f64::INFINITY, f64::min);
        let removed = (0..count).filter(|k| !kept.contains(k)).map(score);
        assert!(least >= removed.fold(0.0, f64::max), "{layer}");
        assert!(least > 0.0);
    }
    let taylor = &report["taylor"];
    let losses = taylor["losses"].as_array().unwrap().len() as u64;
    let timesteps = taylor["timesteps"].as_u64().unwrap();
    assert!(
        timesteps >= 1 && (timesteps..=timesteps + 1).contains(&losses),
        "{taylor}"
    );
    assert_eq!(
        (&taylor["samples"], &taylor["threshold"]),
        (&8.into(), &0.05.into())
    );

    // Recovered by its dense teacher, block by block, with no flag that says so.
    let before = loss(&place, "narrow");
    place.ok("distill narrow student --teacher teacher/model --features masked --steps 30 --batch-size 8 --lr 3e-3");
    let settings = place.text("student/config.toml").replace([' ', '\n'], "");
    assert!(
        settings.contains("layers=[[0,0,],[1,1,],[2,2,],[3,3,],]")
            || settings.contains("layers=[[0,0],[1,1],[2,2],[3,3]]"),
        "{settings}"
    );
    let after = loss(&place, "student/model");
    assert!(
        after < before,
        "recovery lowers the held-out loss: {before} to {after}"
    );
    let shown = place.ok("inspect student/model");
    assert!(
        shown.contains("narrowed    50.0 %") && shown.contains("taylor"),
        "{shown}"
    );
    assert_eq!(shown.matches("narrowed    ").count(), 1, "{shown}");
    place.ok("sample student/model images --count 4 --steps 3");

    // And cut in depth: the widths of the kept blocks go along.
    place.ok("learn student/model learned --pattern 1:2 --steps 3 --batch-size 8");
    place.ok("score student/model oracle --criterion oracle");
    place.ok("cut student/model cut --selection oracle/selection.json");
    assert_eq!(
        place.json("cut/config.json")["model"]["widths"],
        serde_json::json!([one, one])
    );
    place.ok("loss cut --images 16");
    place.ok("distill cut shallow --teacher teacher/model --steps 2 --batch-size 8");
    assert_eq!(
        partials(place.path("").as_path()),
        Vec::<std::path::PathBuf>::new()
    );
}

#[test]
fn every_family_is_narrowed_and_nothing_removed_is_the_same_model() {
    for what in ["dit", "sit", "mar"] {
        let place = Place::new();
        let flags = if what == "dit" {
            String::new()
        } else {
            format!("--what {what}")
        };
        place.ok(&format!("pretrain teacher --steps 4 {TINY} {flags}"));
        place.ok(&format!("narrow teacher/model narrow --ratio 0.3 {QUICK}"));
        place.ok("inspect narrow");
        loss(&place, "narrow");
        place.ok("distill narrow student --teacher teacher/model --steps 2 --batch-size 8");
        place.ok("narrow teacher/model whole --ratio 0 --importance magnitude");
        assert!(
            place.bytes("whole/model.safetensors")
                == place.bytes("teacher/model/model.safetensors"),
            "{what}"
        );
        let of = |model: &str| place.json(&format!("{model}/config.json"))["model"].clone();
        assert_eq!(of("whole"), of("teacher/model"), "{what}");
    }
}

#[test]
fn a_width_is_found_for_the_size_of_a_shallow_model() {
    let place = Place::with_teacher();
    place.ok("cut teacher/model cut --keep 0,1,2");
    let line = "narrow teacher/model OUT --importance random --seed 1 BUDGET";
    let narrow =
        |out: &str, budget: &str| place.ok(&line.replace("OUT", out).replace("BUDGET", budget));
    narrow("a", "--parameters-of cut");
    let parameters = |model: &str| {
        place.json(&format!("{model}/config.json"))["weights"]["parameters"]
            .as_u64()
            .unwrap()
    };
    narrow("b", &format!("--parameters {}", parameters("cut")));
    assert!(place.bytes("a/model.safetensors") == place.bytes("b/model.safetensors"));
    // A head of every block is 16·4·8 + 3·8 values, a channel 33.
    let (wanted, found) = (parameters("cut"), parameters("a"));
    assert!(
        wanted.abs_diff(found) <= 4 * (16 * 4 * 8 + 24),
        "{wanted} {found}"
    );
    // A narrow model can be narrowed further.
    narrow("c", "--ratio 0.5");
    place.ok("narrow c d --ratio 0.5 --importance magnitude");
    assert_eq!(
        place.json("d/config.json")["model"]["widths"][0]["hidden"],
        16
    );
    let error = place.fails(
        2,
        "narrow teacher/model e --importance magnitude --parameters 10",
    );
    assert!(
        error.contains("parameters") && error.contains("10 were asked"),
        "{error}"
    );
    assert!(!place.path("e").exists());
}

#[test]
fn the_same_seed_gives_the_same_scores() {
    let place = Place::with_teacher();
    for (out, seed) in [("a", 3), ("b", 3), ("c", 4)] {
        place.ok(&format!(
            "narrow teacher/model {out} --ratio 0.25 --seed {seed} {QUICK}"
        ));
    }
    let report = |out: &str| place.text(&format!("{out}/importance.json"));
    assert_eq!(report("a"), report("b"));
    assert_ne!(report("a"), report("c"));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let place = Place::with_teacher();
    for (flags, says) in [
        ("--ratio 1", "less than 1"),
        ("--ratio 1.0", "less than 1"),
        ("--ratio -0.1", "at least 0"),
        ("--ratio nan", "finite"),
        ("", "--ratio"),
        ("--ratio 0.5 --parameters 9", "cannot be used with"),
        ("--ratio 0.5 --threshold 2", "threshold"),
        ("--ratio 0.5 --stride 0", "stride"),
        ("--ratio 0.5 --samples 0", "samples"),
        ("--ratio 0.5 --batch-size 0", "batch-size"),
        (
            "--ratio 0.5 --importance magnitude --samples 4",
            "magnitude",
        ),
        ("--ratio 0.5 --importance random --data shapes", "random"),
        ("--ratio 0.5 --importance magnitude --seed 1", "seed"),
    ] {
        let error = place.fails(2, &format!("narrow teacher/model out {flags}"));
        assert!(error.contains(says), "{flags}: {error}");
        assert!(!place.path("out").exists(), "{flags}");
    }
    let error = place.fails(
        2,
        "narrow teacher/model teacher/model --ratio 0.5 --importance random",
    );
    assert!(error.contains("exists"), "{error}");
    // A config of other widths than the weights have, and one that describes no network.
    place.ok("narrow teacher/model narrow --ratio 0.5 --importance random");
    let file = place.path("narrow/config.json");
    let good = place.json("narrow/config.json");
    for (heads, says) in [(2, "expected"), (0, "widths[1].heads is 0"), (3, "1..=2")] {
        let mut config = good.clone();
        config["model"]["widths"][1]["heads"] = heads.into();
        std::fs::write(&file, config.to_string()).unwrap();
        let error = place.fails(1, "loss narrow --images 8");
        assert!(error.contains(says), "{heads}: {error}");
    }
    // Weights that are not finite are refused when they are loaded.
    let mut bytes = place.bytes("teacher/model/model.safetensors");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(place.path("teacher/model/model.safetensors"), bytes).unwrap();
    let error = place.fails(1, "narrow teacher/model out --ratio 0.5");
    assert!(error.contains("model.safetensors"), "{error}");
    assert!(!place.path("out").exists());
}
