//! Statistics on either side, and what follows the numbers: hashes and warnings.

use candle_core::Tensor;
use tinyfusion_tests::Place;

use super::{images, refused, weights};

/// Statistics of shards, made apart, are put together; and samples may be statistics as the reference may.
#[test]
fn statistics_of_shards_are_put_together() {
    let (place, weights) = (Place::new(), weights());
    images(&place, "ref.npz", 20..25);
    images(&place, "all.npz", 0..5);
    images(&place, "0.npz", 0..2);
    images(&place, "1.npz", 2..5);
    for name in ["all", "0", "1"] {
        place.ok(&format!(
            "stats {name}.npz --weights {weights} -o s{name}.npz"
        ));
    }
    let said = place.ok(&format!(
        "stats s0.npz s1.npz --weights {weights} -o both.npz"
    ));
    assert!(said.contains("\"count\": 5"), "{said}");
    // One command over both shards gives the bits of the whole.
    place.ok(&format!(
        "stats 0.npz 1.npz --weights {weights} -o streamed.npz"
    ));
    let arrays = |name: &str| {
        Tensor::read_npz_by_name(place.path(name), &["mu", "sigma", "mu_s", "sigma_s"]).unwrap()
    };
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let means = arrays("sall.npz");
    for (i, ((whole, streamed), merged)) in arrays("sall.npz")
        .iter()
        .zip(&arrays("streamed.npz"))
        .zip(&arrays("both.npz"))
        .enumerate()
    {
        let whole = values(whole);
        assert_eq!(whole, values(streamed));
        let most = |v: &[f64]| v.iter().fold(0f64, |m, v| m.max(v.abs()));
        // A covariance is put together from the features' squares, and carries their rounding.
        let squares = if i % 2 == 1 {
            most(&values(&means[i - 1])).powi(2)
        } else {
            0.0
        };
        let scale = most(&whole) + squares;
        for (a, b) in whole.iter().zip(values(merged)) {
            assert!((a - b).abs() <= 1e-12 * scale, "{a} {b}");
        }
    }
    // As samples: by one file, by two, and as the images that they are of.
    let evaluate = |samples: &str, json: &str| {
        place.ok(&format!("evaluate ref.npz {samples} --weights {weights} --force --metrics fid,sfid --json {json}"));
        place.json(json)
    };
    let whole = evaluate("all.npz", "w.json");
    for (samples, json) in [("sall.npz", "a.json"), ("s0.npz s1.npz", "b.json")] {
        let found = evaluate(samples, json);
        for key in ["fid", "sfid"] {
            let (found, whole) = (found[key].as_f64().unwrap(), whole[key].as_f64().unwrap());
            assert!(
                (found - whole).abs() <= 1e-6 * whole,
                "{key}: {found} {whole}"
            );
        }
        assert_eq!(found["sample_count"], 5);
        assert_eq!(found["samples_sha256"][0].as_str().unwrap().len(), 64);
    }
    for (line, said) in [
        (
            "evaluate ref.npz sall.npz --force --metrics is",
            "no Inception Score",
        ),
        (
            "evaluate ref.npz s0.npz 1.npz --force",
            "put them together first",
        ),
        ("stats s0.npz -o f.safetensors", "no features to keep"),
        (
            "evaluate s0.npz all.npz --metrics fid",
            "5 samples, expected at least 1000",
        ),
    ] {
        refused(&place, 2, &format!("{line} --weights {weights}"), &[said]);
    }
}

/// What is known of a reference file and of weights: hashes, and warnings of the images that they were made of.
#[test]
fn hashes_and_warnings_follow_the_numbers() {
    let (place, weights) = (Place::new(), weights());
    std::fs::create_dir(place.path("jpegs")).unwrap();
    let jpeg = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/fid/tests/decode/jpeg-grey-0.jpeg"
    );
    for name in ["a", "b", "c", "d"] {
        std::fs::copy(jpeg, place.path(&format!("jpegs/{name}.jpg"))).unwrap();
    }
    images(&place, "a.npz", 0..4);
    place.ok(&format!("stats jpegs --weights {weights} -o ref.npz"));
    let evaluate = "evaluate ref.npz a.npz --force --metrics fid --cache kept --json f.json";
    place.ok(&format!("{evaluate} --weights {weights}"));
    let found = place.json("f.json");
    assert!(
        found["warnings"]
            .to_string()
            .contains("4 of 4 images are JPEG"),
        "{found}"
    );
    let hash = tinyfusion::fid::file_sha256(place.path("ref.npz")).unwrap();
    assert_eq!(found["reference_sha256"], hash);
    // The same values in another file are the same network, for the reference and for the cache.
    let again = weights.replace("inception.safetensors", "again.safetensors");
    place.ok(&format!("{evaluate} --weights {again}"));
    let other = place.json("f.json");
    assert_ne!(other["weights_sha256"], found["weights_sha256"]);
    assert_eq!(
        other["weights_content_sha256"],
        found["weights_content_sha256"]
    );
    assert_eq!(other["fid"], found["fid"]);
    assert_eq!(std::fs::read_dir(place.path("kept")).unwrap().count(), 1);

    // Features of the cache are warned of as the images lie now.
    let stats = format!("stats jpegs --weights {weights} --cache kept -o f.safetensors");
    place.ok(&stats);
    assert_eq!(std::fs::read_dir(place.path("kept")).unwrap().count(), 2);
    std::fs::write(place.path("jpegs/late.gif"), "").unwrap();
    let said = place.ok(&stats);
    assert!(said.contains("1 pictures in other formats"), "{said}");
}
