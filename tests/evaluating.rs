//! `stats` and `evaluate --weights`: Inception on small images, from weights that are a formula.
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use tinyfusion_tests::{Place, inception_tensors};

#[path = "evaluating/statistics.rs"]
mod statistics;

/// A weight file under the network's names. Made once for all processes and runs, for it and the others beside it have
/// 95 MB each: a temporary folder of a process that ends its tests with `exit` would stay.
fn weights() -> &'static str {
    static FILE: OnceLock<String> = OnceLock::new();
    FILE.get_or_init(|| {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = kept.join("inception-by-formula-1");
        if !folder.exists() {
            let place = tempfile::tempdir_in(kept).unwrap();
            write_weights(place.path());
            // Another process may have been first, with the same bytes; this one's then go.
            if std::fs::rename(place.path(), &folder).is_ok() {
                let _ = place.keep();
            }
        }
        folder
            .join("inception.safetensors")
            .to_str()
            .unwrap()
            .to_owned()
    })
}

/// The network, and others under names that the tests know.
fn write_weights(folder: &Path) {
    let save = |tensors: &HashMap<String, Tensor>, name: &str| {
        candle_core::safetensors::save(tensors, folder.join(name)).unwrap();
    };
    let tensors = inception_tensors();
    save(&tensors, "inception.safetensors");
    // The same network in another file: PyTorch's counters are no part of it.
    let mut again = tensors.clone();
    let counter = Tensor::new(&[1i64], &Device::Cpu).unwrap();
    again.insert("Conv2d_1a_3x3.bn.num_batches_tracked".into(), counter);
    save(&again, "again.safetensors");
    // Another network, and half a one.
    let mut other = tensors;
    let bias = (&other["fc.bias"] + 1.0).unwrap();
    other.insert("fc.bias".into(), bias);
    save(&other, "other.safetensors");
    other.remove("Mixed_7c.branch_pool.bn.bias");
    save(&other, "missing.safetensors");
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
    place.ok(&format!("evaluate stats.npz all.npz --weights {weights} --force --metrics fid,sfid --json stats.json"));
    let found = place.json("stats.json");
    for key in ["fid", "sfid"] {
        let (found, whole) = (found[key].as_f64().unwrap(), whole[key].as_f64().unwrap());
        assert!(
            (found - whole).abs() <= 1e-4 * whole,
            "{key}: {found} {whole}"
        );
    }
    assert!(found["precision"].is_null() && found["inception_score"].is_null());
    // Named, it must be there; not named, it is left out and said.
    refused(
        &place,
        2,
        &format!("evaluate stats.npz all.npz --weights {weights} --force --metrics fid,pr"),
        &["no precision and recall: the reference has statistics"],
    );
    place.ok(&format!(
        "evaluate stats.npz all.npz --weights {weights} --force --json all.json"
    ));
    let found = place.json("all.json");
    assert!(found["kid"].is_null() && found["inception_score"].is_f64());
    assert!(
        found["warnings"]
            .to_string()
            .contains("no KID: the reference")
    );
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

/// What `line` says when it fails with `code`: all of `parts`.
#[track_caller]
fn refused(place: &Place, code: i32, line: &str, parts: &[&str]) {
    let error = place.fails(code, line);
    for part in parts {
        assert!(error.contains(part), "{line}\n{part}: {error}");
    }
}

#[test]
fn flags_that_would_do_nothing_are_errors() {
    let place = Place::new();
    let rows = Tensor::new(
        &[[0f32, 1.0], [2.0, 0.5], [1.0, 3.0], [0.0, 4.0]],
        &Device::Cpu,
    );
    Tensor::write_npz(&[("arr_0", &rows.unwrap())], place.path("a.npz")).unwrap();
    for (flags, said) in [
        ("--features --cache kept", "--cache"),
        ("--features --force", "--force"),
        ("--classifier c --cache kept", "--cache"),
        ("--classifier c --force", "--force"),
        ("--features --metrics fid,sfid", "need --weights"),
        ("--classifier c --metrics sfid", "need --weights"),
        ("--features --splits adm", "has no arr_1"),
        ("--features --metrics is", "has no arr_1"),
        (
            "--features --metrics pr --splits adm",
            "--metrics leaves out",
        ),
        ("--features --metrics pr --kid-subset 2", "--kid-subset"),
        ("--features --metrics kid", "its subsets have 1000 rows"),
        (
            "a.npz --features",
            "shards are put together with --weights only",
        ),
        (
            "a.npz --classifier c",
            "shards are put together with --weights only",
        ),
    ] {
        refused(&place, 2, &format!("evaluate a.npz a.npz {flags}"), &[said]);
    }
    assert!(!place.path("kept").exists());
    // Without a name the Inception Score is left out with a warning.
    place.ok("evaluate a.npz a.npz --features --json found.json");
    let found = place.json("found.json");
    let said = found["warnings"].to_string();
    for part in [
        "no Inception Score",
        "KID uses subsets of 4 rows instead of 1000",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    // As much as with --weights; of one subset there is no spread.
    for key in [
        "label",
        "frechet",
        "config",
        "inception_score_std",
        "reference_image_count",
    ] {
        assert!(found.get(key).is_some(), "{key}: {found}");
    }
    assert!(found["kid"].is_f64() && found["kid_std"].is_null());
    place.ok("evaluate a.npz a.npz --features --metrics kid --kid-subset 3 --json found.json");
    let found = place.json("found.json");
    assert_eq!(found["config"]["kid"]["subset_size"], 3);
    assert!(found["kid_std"].is_f64());
}

#[test]
fn a_destination_that_cannot_be_written_is_refused_at_once() {
    let (place, weights) = (Place::new(), weights());
    images(&place, "a.npz", 0..4);
    std::fs::create_dir(place.path("folder")).unwrap();
    let before = place.bytes("a.npz");
    let evaluate = format!("evaluate a.npz a.npz --weights {weights} --force --cache kept --json");
    refused(
        &place,
        1,
        &format!("{evaluate} folder"),
        &["folder: --json: is a folder"],
    );
    refused(
        &place,
        1,
        &format!("{evaluate} nowhere/f.json"),
        &[
            "nowhere/f.json: --json: cannot be written",
            "no folder nowhere",
        ],
    );
    refused(
        &place,
        2,
        &format!("{evaluate} a.npz"),
        &["would write over what is read (a.npz)"],
    );
    let stats = format!("stats a.npz --weights {weights} --cache kept -o");
    refused(
        &place,
        1,
        &format!("{stats} nowhere/f.npz"),
        &["nowhere/f.npz: --out"],
    );
    refused(
        &place,
        2,
        &format!("{stats} a.npz"),
        &["would write over what is read"],
    );
    refused(
        &place,
        1,
        &format!("stats a.npz --weights {weights} --cache a.npz -o s.npz"),
        &["a.npz: --cache: cannot be made a folder"],
    );
    assert!(!place.path("kept").exists() && place.bytes("a.npz") == before);
}

#[test]
fn what_hashes_and_headers_tell_is_refused_before_the_network_runs() {
    let (place, weights) = (Place::new(), weights());
    let other = weights.replace("inception.safetensors", "other.safetensors");
    images(&place, "a.npz", 0..4);
    images(&place, "b.npz", 4..8);
    place.ok(&format!("stats a.npz --weights {weights} -o stats.npz"));
    place.ok(&format!(
        "stats a.npz --weights {weights} -o features.safetensors"
    ));
    let parts = [
        "of different weights",
        "other.safetensors",
        "compute both again",
    ];
    for line in [
        "evaluate stats.npz b.npz --force",
        "evaluate b.npz features.safetensors --force",
        "evaluate features.safetensors b.npz --force",
        "evaluate b.npz b.npz features.safetensors --force",
        "stats b.npz features.safetensors -o s.npz",
    ] {
        refused(
            &place,
            1,
            &format!("{line} --weights {other} --cache kept"),
            &parts,
        );
    }
    // Shards of two sizes, statistics of another size, a covariance that is none, too few rows.
    let square = Tensor::zeros((4, 9, 9, 3), candle_core::DType::U8, &Device::Cpu).unwrap();
    Tensor::write_npz(&[("arr_0", &square)], place.path("square.npz")).unwrap();
    let small = |sigma: [[f64; 2]; 2], name: &str| {
        let mu = Tensor::new(&[0f64, 0.0], &Device::Cpu).unwrap();
        let sigma = Tensor::new(&sigma, &Device::Cpu).unwrap();
        Tensor::write_npz(&[("mu", &mu), ("sigma", &sigma)], place.path(name)).unwrap();
    };
    small([[1.0, 0.0], [0.0, 1.0]], "small.npz");
    small([[1.0, 2.0], [2.0, 1.0]], "none.npz");
    images(&place, "one.npz", 0..1);
    for (line, parts) in [
        (
            "evaluate a.npz b.npz square.npz --force",
            ["b.npz holds images of 10 x 12", "square.npz of 9 x 9"],
        ),
        (
            "evaluate small.npz b.npz --force",
            ["small.npz: `mu` has 2 values", "expected the 2048"],
        ),
        (
            "evaluate none.npz b.npz --force",
            ["none.npz:", "eigenvalue"],
        ),
        ("evaluate a.npz one.npz --force", ["at least 2", "found 1"]),
        (
            "evaluate a.npz b.npz --force --splits torch-fidelity",
            ["at least 10", "found 4"],
        ),
        ("stats one.npz -o s.npz", ["1 image", "expected at least 2"]),
    ] {
        refused(
            &place,
            1,
            &format!("{line} --weights {weights} --cache kept"),
            &parts,
        );
    }
    refused(
        &place,
        2,
        &format!("evaluate a.npz b.npz --weights {weights} --cache kept"),
        &["4 samples, expected at least 1000"],
    );
    assert_eq!(
        std::fs::read_dir(place.path("kept")).unwrap().count(),
        0,
        "the network ran"
    );
    let missing = weights.replace("inception.safetensors", "missing.safetensors");
    refused(
        &place,
        1,
        &format!("evaluate a.npz b.npz --force --weights {missing}"),
        &[
            "missing.safetensors",
            "1 missing: Mixed_7c.branch_pool.bn.bias",
        ],
    );
}

#[test]
fn a_damaged_cache_is_named_with_the_way_out() {
    let (place, weights) = (Place::new(), weights());
    images(&place, "a.npz", 0..4);
    images(&place, "b.npz", 4..8);
    place.ok(&format!(
        "stats a.npz --weights {weights} --cache kept -o a.safetensors"
    ));
    place.ok(&format!("stats b.npz --weights {weights} -o b.safetensors"));
    let kept = std::fs::read_dir(place.path("kept")).unwrap().next();
    let kept = kept.unwrap().unwrap().path();
    let whole = std::fs::read(&kept).unwrap();
    let evaluate = format!("evaluate b.npz a.npz --weights {weights} --force --cache kept");
    let mut not_a_number = whole.clone();
    let end = not_a_number.len();
    not_a_number[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    for (bytes, said) in [
        (whole[..end / 2].to_vec(), "bytes, expected"),
        (Vec::new(), "no header"),
        (not_a_number, "row 3, column 2022 is NaN"),
        (
            place.bytes("b.safetensors"),
            "of other images or weights than its name says",
        ),
    ] {
        std::fs::write(&kept, bytes).unwrap();
        let name = kept.file_name().unwrap().to_str().unwrap();
        refused(
            &place,
            1,
            &evaluate,
            &[name, said, "delete this file of the cache"],
        );
    }
    assert_eq!(
        std::fs::read_dir(place.path("kept")).unwrap().count(),
        1,
        "the network ran"
    );
    std::fs::remove_file(&kept).unwrap();
    place.ok(&evaluate);
}
