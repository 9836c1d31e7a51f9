//! Every criterion chooses for every family, by the same command and into the same files.
#![allow(clippy::unwrap_used)] // a test may panic

use serde_json::Value;
use tinyfusion_tests::{Place, TINY};

/// A barely trained teacher of the family in `teacher/model`: four blocks, of which a MAR has two in each stage.
fn with_teacher(family: &str) -> Place {
    let place = Place::new();
    place.ok(&format!(
        "pretrain teacher --what {family} --steps 4 {TINY}"
    ));
    place
}

fn numbers(value: &Value, key: &str) -> Vec<f64> {
    let all = value.as_array().unwrap().iter();
    all.map(|v| v[key].as_f64().unwrap()).collect()
}

#[test]
fn every_criterion_chooses_for_every_family() {
    for family in ["dit", "sit", "mar"] {
        let place = with_teacher(family);
        for (i, criterion) in [
            "block-influence --samples 40",
            "block-influence --reference --samples 8",
            "flux-lite --samples 8",
            "sensitivity --samples 8",
            "sensitivity-greedy --samples 8",
            "oracle",
            "random",
            "random-search --samples 8 --masks 12 --quantile 0.5",
            "magnitude",
        ]
        .iter()
        .enumerate()
        {
            let pattern = if *criterion == "oracle" {
                ""
            } else {
                "--pattern 1:2"
            };
            let line = format!("score teacher/model s{i} --criterion {criterion} {pattern}");
            place.ok(&line);
            let selection = place.json(&format!("s{i}/selection.json"));
            let scores = place.json(&format!("s{i}/scores.json"));
            assert_eq!(selection["kept"], scores["kept"], "{family}: {line}");
            assert_eq!(
                selection["kept"].as_array().unwrap().len(),
                2,
                "{family}: {line}"
            );
            assert!(criterion.starts_with(selection["criterion"].as_str().unwrap()));
            assert!(selection["source_sha256"].is_string());
            // The same again is the same, bit for bit.
            let text = place.text(&format!("s{i}/scores.json"));
            place.ok(&line);
            assert_eq!(
                text,
                place.text(&format!("s{i}/scores.json")),
                "{family}: {line}"
            );
        }
        // What the loss says of a mask is what the search found, on the same draws.
        let masks = place.json("s7/scores.json")["masks"].clone();
        assert_eq!(
            masks.as_array().unwrap().len(),
            4,
            "{family}: all four masks of 1:2"
        );
        place.ok("cut teacher/model cut --selection s1/selection.json");
    }
}

#[test]
fn blocks_of_the_whole_network_are_ranked() {
    let place = with_teacher("dit");
    place.ok("score teacher/model s --criterion flux-lite --keep 3 --samples 64");
    let scores = place.json("s/scores.json");
    let blocks = &scores["blocks"];
    let (by_block, errors) = (numbers(blocks, "score"), numbers(blocks, "standard_error"));
    assert_eq!((by_block.len(), errors.len()), (4, 4));
    let lowest = (0..4)
        .min_by(|a, b| by_block[*a].total_cmp(&by_block[*b]))
        .unwrap();
    let kept: Vec<usize> = (0..4).filter(|i| *i != lowest).collect();
    assert_eq!(scores["kept"], serde_json::json!(kept));
    assert!(errors.iter().all(|e| *e > 0.0));
    // More samples, a smaller error; half of the blocks without --keep.
    place.ok("score teacher/model more --criterion flux-lite --samples 512");
    let more = numbers(&place.json("more/scores.json")["blocks"], "standard_error");
    assert!(errors.iter().zip(&more).all(|(few, many)| many < few));
    assert_eq!(
        place.json("more/scores.json")["kept"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    // Any three of four.
    place.ok("score teacher/model any --criterion random --keep 3 --seed 5");
    assert_eq!(
        place.json("any/selection.json")["groups"],
        serde_json::json!([{"n": 3, "m": 4}])
    );
}

#[test]
fn the_learned_mask_is_a_criterion_too() {
    let place = with_teacher("dit");
    let line = "score teacher/model s --criterion learned --pattern 2:4 --seed 1";
    place.ok(line);
    let scores = place.json("s/scores.json");
    assert_eq!(scores["criterion"], "learned");
    // Probabilities of a pattern that keeps two.
    let sum: f64 = numbers(&scores["blocks"], "score").iter().sum();
    assert!((sum - 2.0).abs() < 1e-6, "{scores}");
    assert!(scores["samples"].is_null());
    // A finished search is not begun again.
    place.ok(line);
    assert_eq!(scores, place.json("s/scores.json"));
}

#[test]
fn what_a_criterion_cannot_do_is_said() {
    let place = with_teacher("dit");
    for (line, says) in [
        ("oracle --keep 2", "it knows one mask"),
        ("learned --keep 2", "within the groups"),
        ("magnitude --samples 5", "no calibration samples"),
        ("magnitude --seed 5", "nothing is drawn"),
        ("oracle --data few", "no samples are used"),
        ("flux-lite --reference", "block-influence"),
        ("flux-lite --masks 5", "random-search"),
        ("flux-lite --samples 1", "from 2"),
        ("flux-lite --keep 0", "1 to the network's 4"),
        ("flux-lite --keep 5", "1 to the network's 4"),
        ("random-search --masks 0", "from 1"),
        ("random-search --quantile 1.5", "from 0 to 1"),
        ("flux-lite --pattern 1:3", "does not fit"),
        ("flux-lite --samples 99 --data few", "few has"),
    ] {
        image_folder(&place);
        let error = place.fails(2, &format!("score teacher/model out --criterion {line}"));
        assert!(error.contains(says), "{line}: {error}");
        assert!(!place.path("out").exists(), "{line}");
    }
    // What is not there is no mistake of usage, here as in every command.
    let error = place.fails(
        1,
        "score teacher/model out --criterion flux-lite --data nowhere",
    );
    assert!(
        error.contains("nowhere") && !place.path("out").exists(),
        "{error}"
    );
}

/// Two images of one class.
fn image_folder(place: &Place) {
    let folder = place.path("few/a");
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["1.png", "2.png"] {
        let bytes = include_bytes!("../assets/report.png");
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

#[test]
fn hidden_states_are_tallied() {
    for family in ["dit", "mar"] {
        let place = with_teacher(family);
        let said = place.ok("activations teacher/model --images 16 --json a.json");
        assert_eq!(said.lines().count(), 4, "{said}");
        let layers = place.json("a.json")["layers"].clone();
        for layer in layers.as_array().unwrap() {
            assert!(layer["std"].as_f64().unwrap() > 0.0, "{layer}");
            assert_eq!(layer["beyond"][1]["sigma"], 2.0);
        }
        place.fails(2, "activations teacher/model --images 1");
    }
}
