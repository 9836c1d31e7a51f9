//! Readers against `npz/` and `pth/`, and all stages together against `npz/e2e_*`.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tinyfusion_fid::{
    Config, FeatureSet, ImageSet, Inception, Npz, Options, Provenance, Side, Splits,
    StoredStatistics, Weights, compare, extract,
};

use crate::golden_file::{Golden, close, folder};
use crate::synthetic::weights;

fn npz(name: &str) -> PathBuf {
    folder().join("npz").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(npz(name)).unwrap()).unwrap()
}

fn fnv1a(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// Every file of the folder whose name begins so.
fn files(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    all.retain(|p| p.file_name().unwrap().to_string_lossy().starts_with(prefix));
    all.sort();
    assert!(!all.is_empty(), "no file {prefix}* in {}", folder.display());
    all
}

#[test]
fn golden_npz_valid_files_are_read() {
    let expected = json("expected.json");
    let shape: Vec<usize> = serde_json::from_value(expected["arr_0.shape"].clone()).unwrap();
    let (mut of_images, mut of_statistics) = (0, 0);
    for path in files(&folder().join("npz"), "") {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.extension().unwrap() != "npz"
            || name.starts_with("bad_")
            || name.starts_with("e2e_")
        {
            continue;
        }
        let mut file = Npz::open(&path).unwrap();
        if file.has("arr_0") {
            of_images += 1;
            assert_eq!(
                file.image_shape("arr_0").unwrap(),
                (shape[0], [shape[1], shape[2]]),
                "{name}"
            );
            for batch in [1, 4, 100] {
                let mut bytes = Vec::new();
                file.for_each_batch("arr_0", batch, &mut |images| {
                    bytes.extend(images);
                    Ok(())
                })
                .unwrap();
                assert_eq!(
                    fnv1a(&bytes),
                    expected["arr_0.fnv1a64"].as_str().unwrap(),
                    "{name}"
                );
            }
        }
        if file.has("arr_1") {
            let labels: Vec<i64> = serde_json::from_value(expected["labels"].clone()).unwrap();
            assert_eq!(file.integers("arr_1").unwrap().1, labels);
        }
        let Some(found) = StoredStatistics::read(&mut file).unwrap() else {
            assert!(file.has("arr_0"), "{name} holds nothing that is known");
            continue;
        };
        of_statistics += 1;
        let mu: Vec<f64> = serde_json::from_value(expected["mu"].clone()).unwrap();
        assert_eq!(found.pool.mean(), mu, "{name}");
        let trace = |s: &tinyfusion_fid::Statistics| -> f64 {
            s.covariance().iter().step_by(s.columns() + 1).sum()
        };
        let want = |key: &str| expected[key].as_f64().unwrap();
        close(&name, trace(&found.pool), want("sigma_trace"), 1e-12, 0.0);
        if let Some(spatial) = &found.spatial {
            close(&name, trace(spatial), want("sigma_s_trace"), 1e-12, 0.0);
        }
    }
    assert!(of_images > 0 && of_statistics > 0);
}

#[test]
fn golden_npz_malformed_files_are_errors() {
    let parts = [
        ("truncated", "zip"),
        ("dtype_f32", "expected images as uint8"),
        ("huge_shape", "claims"),
        ("short_data", "claims"),
        ("overflow_shape", "claims"),
        ("missing_arr0", "has no array `arr_0`"),
        ("object_dtype", "not unpickled"),
        ("nchw", "channels come last"),
        ("gray", "expected RGB"),
        ("empty", "no image"),
        ("crc", "cannot be read"),
        ("sigma_shape", "expected (D) and (D, D)"),
        ("sigma_nan", "finite"),
        ("not_a_zip", "zip"),
    ];
    for path in files(&folder().join("npz"), "bad_") {
        let name = path.file_stem().unwrap().to_string_lossy()["bad_".len()..].to_owned();
        let outcome = Npz::open(&path).and_then(|mut file| {
            if StoredStatistics::read(&mut file)?.is_none() {
                file.for_each_batch("arr_0", 64, &mut |_| Ok(()))?;
            }
            Ok(())
        });
        if name == "deflate_bomb" {
            outcome.unwrap(); // many equal pixels are no mistake; only a batch of them is ever unpacked
            continue;
        }
        let said = outcome.unwrap_err().to_string();
        assert!(said.contains(path.to_str().unwrap()), "{said}");
        let part = parts.iter().find(|(known, _)| *known == name);
        let (_, part) = part.unwrap_or_else(|| {
            panic!("{name}: a new malformed file; add here what must be said of it: {said}")
        });
        assert!(said.contains(part), "{name}: {said}");
    }
}

#[test]
fn golden_pth_both_formats_are_read() {
    let expected = Weights::read(folder().join("pth/tiny_expected.safetensors"));
    // It holds an integer tensor too, which no network's weights are.
    let said = expected.unwrap_err().to_string();
    assert!(said.contains("integers"), "{said}");
    let golden = Golden::open("pth/tiny_expected.safetensors");
    for path in files(&folder().join("pth"), "tiny_")
        .into_iter()
        .filter(|p| p.extension().unwrap() == "pth")
    {
        let tensors = tinyfusion_fid::read_tensors(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(tensors.len(), golden.names().len(), "{}", path.display());
        for name in golden.names() {
            let (shape, data) = golden.stored(&name);
            let (found_shape, found) = &tensors[&name];
            assert_eq!(
                (found_shape, found),
                (&shape, &data),
                "{} {name}",
                path.display()
            );
        }
    }
}

fn features(net: &Inception, path: &Path) -> FeatureSet {
    let images = ImageSet::open(path).unwrap();
    let provenance = Provenance::of(&images, "synthetic").unwrap();
    extract(net, &images, provenance, &|_| (), &|| false)
        .unwrap()
        .unwrap()
}

#[test]
fn golden_end_to_end() {
    let expected = json("e2e_expected.json");
    let number = |key: &str| expected[key].as_f64().unwrap_or_else(|| panic!("{key}"));
    let net = Inception::new(&weights(expected["weight_seed"].as_u64().unwrap())).unwrap();
    let reference = features(&net, &npz("e2e_ref.npz"));
    let samples = features(&net, &npz("e2e_sample.npz"));
    assert_eq!(reference.len() as u64, expected["n_ref"].as_u64().unwrap());
    let (reference, samples) = (Side::from(reference), Side::from(samples));
    for (key, size) in [("is_split5000", 5000), ("is_split7", 7)] {
        let options = Options {
            config: Config {
                inception_score: Some(Splits::Adm { size }),
                ..Config::default()
            },
            force: true,
            ..Options::default()
        };
        let found = compare(&reference, &samples, &options).unwrap();
        close("FID", found.metrics.fid, number("fid"), 1e-4, 0.0);
        close("sFID", found.sfid.unwrap(), number("sfid"), 1e-4, 0.0);
        close(
            key,
            found.metrics.inception_score.unwrap(),
            number(key),
            1e-5,
            0.0,
        );
        assert_eq!(found.metrics.precision.unwrap(), number("precision"));
        assert_eq!(found.metrics.recall.unwrap(), number("recall"));
    }
}
