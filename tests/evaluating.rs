//! `stats` and `evaluate --weights`: Inception on small images, from weights that are a formula.
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::HashMap;
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use tinyfusion::fid::Inception;
use tinyfusion_tests::Place;

/// A weight file under the network's names; made once, for it has 95 MB.
fn weights() -> &'static str {
    static FILE: OnceLock<(Place, String)> = OnceLock::new();
    let (_, path) = FILE.get_or_init(|| {
        let place = Place::new();
        let tensors: HashMap<String, Tensor> = Inception::tensors()
            .into_iter()
            .map(|(name, shape)| {
                let count: usize = shape.iter().product();
                let width = (shape[1..].iter().product::<usize>() as f32).sqrt();
                let wave = |i: usize| {
                    (((i * 7919 + name.len()) % 10_007) as f32 / 10_007.0 - 0.5) / width * 4.0
                };
                let variance = name.ends_with("running_var");
                let values: Vec<f32> = (0..count)
                    .map(|i| if variance { 1.0 } else { wave(i) })
                    .collect();
                (
                    name.clone(),
                    Tensor::from_vec(values, shape, &Device::Cpu).unwrap(),
                )
            })
            .collect();
        let path = place.path("inception.safetensors");
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let text = path.to_str().unwrap().to_owned();
        (place, text)
    });
    path
}

/// Writes `arr_0` (count, 12, 10, 3).
fn images(place: &Place, name: &str, seeds: std::ops::Range<usize>) {
    let count = seeds.len();
    let pixels: Vec<u8> = seeds
        .flat_map(|seed| {
            (0..12 * 10 * 3).map(move |i| ((i * (seed * 2 + 7) + seed * seed) % 253) as u8)
        })
        .collect();
    let images = Tensor::from_vec(pixels, (count, 12, 10, 3), &Device::Cpu).unwrap();
    Tensor::write_npz(&[("arr_0", &images)], place.path(name)).unwrap();
}

#[test]
fn statistics_shards_and_caches_agree() {
    let (place, weights) = (Place::new(), weights());
    images(&place, "ref.npz", 20..32);
    images(&place, "all.npz", 0..9);
    images(&place, "0.npz", 0..4);
    images(&place, "1.npz", 4..9);

    place.ok(&format!(
        "evaluate ref.npz all.npz --weights {weights} --force --cache kept --json whole.json"
    ));
    let whole = place.json("whole.json");
    for key in [
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
        "kid",
    ] {
        assert!(whole[key].is_f64(), "{key}: {whole}");
    }
    assert_eq!(whole["sample_count"], 9);
    assert_eq!(whole["weights_sha256"].as_str().unwrap().len(), 64);
    assert!(whole["weights_known_as"].is_null());
    let said = whole["warnings"].to_string();
    for part in [
        "none of the known public files",
        "9 samples; published FIDs are of 50000",
        "rank-deficient",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(std::fs::read_dir(place.path("kept")).unwrap().count(), 2);

    // Again from the cache, and from shards of which one is a feature file: the same numbers, bit for bit.
    place.ok(&format!(
        "evaluate ref.npz all.npz --weights {weights} --force --cache kept --json again.json"
    ));
    assert_eq!(place.json("again.json"), whole);
    place.ok(&format!("stats 0.npz --weights {weights} -o 0.safetensors"));
    place.ok(&format!(
        "evaluate ref.npz 0.safetensors 1.npz --weights {weights} --force --json shards.json"
    ));
    let shards = place.json("shards.json");
    for key in [
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
        "kid",
    ] {
        assert_eq!(shards[key], whole[key], "{key}");
    }
    // One thread counts as two do.
    let alone = place
        .command(&format!(
            "evaluate ref.npz all.npz --weights {weights} --force --json alone.json"
        ))
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .unwrap();
    assert!(alone.status.success());
    let difference =
        place.json("alone.json")["fid"].as_f64().unwrap() - whole["fid"].as_f64().unwrap();
    assert!(difference.abs() <= 1e-10 * whole["fid"].as_f64().unwrap());

    // Statistics alone: FID and sFID, no precision.
    place.ok(&format!("stats ref.npz --weights {weights} -o stats.npz"));
    place.ok(&format!("evaluate stats.npz all.npz --weights {weights} --force --metrics fid,sfid,pr --json stats.json"));
    let found = place.json("stats.json");
    for key in ["fid", "sfid"] {
        let (found, whole) = (found[key].as_f64().unwrap(), whole[key].as_f64().unwrap());
        assert!(
            (found - whole).abs() <= 1e-4 * whole,
            "{key}: {found} {whole}"
        );
    }
    assert!(found["precision"].is_null() && found["inception_score"].is_null());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (place, weights) = (Place::new(), weights());
    images(&place, "few.npz", 0..5);
    let error = place.fails(2, &format!("evaluate few.npz few.npz --weights {weights}"));
    assert!(
        error.contains("5 samples, expected at least 1000"),
        "{error}"
    );
    place.fails(2, "evaluate few.npz few.npz");
    place.fails(
        2,
        &format!("evaluate few.npz few.npz --weights {weights} --classifier c"),
    );
    place.fails(2, "evaluate few.npz few.npz few.npz --features");
    let error = place.fails(
        2,
        &format!("stats few.npz --weights {weights} -o stats.json"),
    );
    assert!(error.contains("ends in .npz"), "{error}");
    let error = place.fails(1, "evaluate few.npz few.npz --weights few.npz --force");
    assert!(error.contains("few.npz: not a weight file"), "{error}");
    std::fs::create_dir(place.path("empty")).unwrap();
    let error = place.fails(
        1,
        &format!("evaluate few.npz empty --weights {weights} --force"),
    );
    assert!(error.contains("empty: has no image"), "{error}");
}
