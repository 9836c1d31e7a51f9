//! Both sides of a comparison may be statistics, images or both: what is refused, what is left out and what is warned of.

use std::collections::BTreeMap;

use tinyfusion_fid::{
    Config, Error, FeatureSet, ImageFeatures, ImageSet, Known, KnownSide, Npz, Options, Provenance,
    Side, Statistics, StoredStatistics, Values, Weights, check, compare, file_sha256,
};

use crate::golden_file::close;
use crate::pictures::{against, features, folder, forced};

fn origin(weights: &str) -> Provenance {
    Provenance {
        images_sha256: "i".into(),
        weights_sha256: weights.into(),
        weights_content_sha256: String::new(),
        preprocessing: "p".into(),
        size: [8, 8],
        warnings: Vec::new(),
    }
}

/// Statistics of the unit normal distribution.
fn normal(n: Option<u64>, spatial: bool) -> StoredStatistics {
    let of = |d: usize| {
        let unit = |i: usize| f64::from(u8::from(i.is_multiple_of(d + 1)));
        Statistics::from_parts(n, vec![0.0; d], (0..d * d).map(unit).collect()).unwrap()
    };
    StoredStatistics {
        pool: of(ImageFeatures::POOL),
        spatial: spatial.then(|| of(ImageFeatures::SPATIAL)),
        provenance: None,
        warnings: Vec::new(),
    }
}

fn stored(statistics: &StoredStatistics) -> KnownSide<'_> {
    KnownSide {
        name: "stored",
        statistics: Some(statistics),
        images: Vec::new(),
    }
}

fn images<'a>(provenance: &'a Provenance, count: usize) -> KnownSide<'a> {
    KnownSide {
        name: "images",
        statistics: None,
        images: vec![Known {
            name: "images",
            provenance,
            count,
        }],
    }
}

#[track_caller]
fn has(warnings: &[String], parts: &[&str]) {
    for part in parts {
        assert!(
            warnings.iter().any(|warning| warning.contains(part)),
            "{part}: {warnings:#?}"
        );
    }
}

/// The count that stands in the file is a count like any other.
#[test]
fn too_few_images_behind_stored_statistics_are_refused() {
    let (few, unknown, enough) = (
        normal(Some(999), false),
        normal(None, false),
        normal(Some(50_000), false),
    );
    let here = origin("w");
    let samples = images(&here, 50_000);
    let options = Options::default();
    let error = check(&stored(&few), &samples, &options).unwrap_err();
    assert!(matches!(error, Error::TooFewImages(_)), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("999 images behind the reference statistics, expected at least 1000"),
        "{said}"
    );
    let error = check(&samples, &stored(&few), &options).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("999 images behind the samples'"), "{said}");
    let forced = check(&stored(&few), &samples, &forced()).unwrap();
    has(&forced.warnings, &["FID is over 999 images"]);
    check(&stored(&unknown), &samples, &options).unwrap();
    let found = check(&stored(&enough), &samples, &options).unwrap();
    assert!(!found.warnings.iter().any(|w| w.contains("FID is over")));
    // ADM's 10,000 images taken for the reference of FID.
    let ten = images(&here, 10_000);
    let found = check(&ten, &samples, &options).unwrap();
    has(&found.warnings, &["FID is over 10000 images"]);
}

/// What was warned of when statistics were made is warned of when they are used, on either side.
#[test]
fn warnings_of_stored_statistics_are_passed_on() {
    let mut set = normal(Some(50_000), false);
    let mut with = origin("w");
    with.warnings = vec!["7 of 50000 images are JPEG".into()];
    set.provenance = Some(with);
    set.warnings = vec!["`n` is left aside".into()];
    let here = origin("w");
    let samples = images(&here, 50_000);
    let options = Options::default();
    for (reference, samples) in [(stored(&set), samples.clone()), (samples, stored(&set))] {
        let found = check(&reference, &samples, &options).unwrap();
        has(&found.warnings, &["are JPEG", "`n` is left aside"]);
    }
}

#[test]
fn compare_passes_warnings_on() {
    let dir = folder(0..4);
    let set = features(dir.path()).unwrap();
    let mut statistics = StoredStatistics::of(&set).unwrap();
    statistics.provenance.as_mut().unwrap().warnings = vec!["they were JPEG".into()];
    let found = compare(&statistics.into(), &set.into(), &forced()).unwrap();
    has(&found.metrics.warnings, &["they were JPEG"]);
}

/// ADM reads statistics from either file. Of samples without images there are FID and sFID.
#[test]
fn samples_may_be_statistics() {
    let (dir, other) = (folder(0..6), folder(20..29));
    let (samples, reference) = (
        features(dir.path()).unwrap(),
        features(other.path()).unwrap(),
    );
    let whole = against(&reference, &samples);
    let statistics = StoredStatistics::of(&samples).unwrap();
    let only = Side::from(statistics.clone());
    let reference = Side::from(reference);
    let found = compare(&reference, &only, &forced()).unwrap();
    let (m, expected) = (&found.metrics, &whole.metrics);
    close("FID", m.fid, expected.fid, 1e-8, 0.0);
    close("sFID", found.sfid.unwrap(), whole.sfid.unwrap(), 1e-8, 0.0);
    assert_eq!(m.n_samples, Some(6));
    assert_eq!(
        (m.inception_score, m.precision, m.kid, m.n_sample_features),
        (None, None, None, 0)
    );
    let no = [
        "no Inception Score: the samples have statistics but no images",
        "no precision and recall: the samples",
        "no KID: the samples",
    ];
    has(&m.warnings, &no);
    // With both, the distance is of the statistics and the rest of the images.
    let mut moved = normal(Some(6), true);
    moved.provenance = statistics.provenance;
    let both = Side {
        statistics: Some(moved),
        features: Some(samples),
    };
    let mixed = compare(&reference, &both, &forced()).unwrap();
    assert!((mixed.metrics.fid - expected.fid).abs() > 1.0);
    assert_eq!(mixed.metrics.precision, expected.precision);
    assert_eq!(mixed.metrics.inception_score, expected.inception_score);
}

/// A metric that was named is there or an error.
#[test]
fn a_named_metric_that_cannot_be_is_an_error() {
    let (flat, full) = (normal(Some(50_000), false), normal(Some(50_000), true));
    let here = origin("w");
    let only = |sfid: bool, change: &dyn Fn(&mut Config)| {
        let mut config = Config {
            inception_score: None,
            precision_recall: None,
            kid: None,
        };
        change(&mut config);
        Options {
            sfid,
            config,
            named: true,
            ..Options::default()
        }
    };
    let all = Config::default();
    let samples = images(&here, 50_000);
    let small = images(&here, 999);
    let precision = only(false, &|c| c.precision_recall = all.precision_recall);
    let kid = only(false, &|c| c.kid = all.kid);
    let score = only(false, &|c| c.inception_score = all.inception_score);
    let few = Options {
        force: true,
        ..kid.clone()
    };
    let flat_side = stored(&flat);
    for (reference, samples, options, words) in [
        (
            &flat_side,
            &samples,
            &only(true, &|_| ()),
            "no sFID: the reference statistics have no mu_s",
        ),
        (
            &samples,
            &flat_side,
            &only(true, &|_| ()),
            "no sFID: the samples' statistics have no mu_s",
        ),
        (
            &stored(&full),
            &samples,
            &precision,
            "no precision and recall: the reference",
        ),
        (&stored(&full), &samples, &kid, "no KID: the reference"),
        (&samples, &stored(&full), &score, "no Inception Score"),
        (
            &samples,
            &small,
            &few,
            "no KID: its subsets have 1000 rows, and one side has only 999",
        ),
    ] {
        let error = check(reference, samples, options).unwrap_err();
        assert!(matches!(error, Error::Impossible(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        // Not named, it is left out and said.
        let options = Options {
            named: false,
            ..options.clone()
        };
        let found = check(reference, samples, &options).unwrap();
        assert_ne!(found.options, options);
    }
    check(&stored(&full), &samples, &only(true, &|_| ())).unwrap();
}

/// The container is not the network.
#[test]
fn weights_are_known_by_their_values() {
    type Tensors = BTreeMap<String, Values<f32>>;
    let tensors = || {
        let values = |n: usize| (0..n).map(|i| i as f32 / 7.0).collect::<Vec<_>>();
        BTreeMap::from([
            ("a.weight".to_owned(), (vec![2, 3], values(6))),
            ("b.bias".to_owned(), (vec![4], values(4))),
        ])
    };
    let hash = |change: &dyn Fn(&mut Tensors)| {
        let mut all = tensors();
        change(&mut all);
        let weights = Weights::from_tensors(all, "x").unwrap();
        weights.content_sha256().to_owned()
    };
    let whole = hash(&|_| ());
    assert_eq!(whole.len(), 64);
    assert_eq!(whole, hash(&|_| ()));
    let others = [
        hash(&|all| all.get_mut("b.bias").unwrap().1[3] = 9.0),
        hash(&|all| all.get_mut("a.weight").unwrap().0 = vec![3, 2]),
        hash(&|all| {
            let a = all.remove("a.weight").unwrap();
            all.insert("a.weighs".into(), a);
        }),
    ];
    assert!(others.iter().all(|other| *other != whole));
    // Two containers of the same tensors: two files, one content.
    let golden = crate::golden_file::folder().join("pth");
    let read = |name: &str| {
        let bytes = std::fs::read(golden.join(name)).unwrap();
        let floats = tinyfusion_fid::read_tensors(&bytes)
            .unwrap()
            .into_iter()
            .filter(|(_, (shape, data))| data.len() == 4 * shape.iter().product::<usize>())
            .map(|(name, (shape, data))| {
                let values = data.chunks_exact(4);
                let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                (name, (shape, values.collect()))
            })
            .collect();
        Weights::from_tensors(floats, name).unwrap()
    };
    let (legacy, zip) = (read("tiny_legacy.pth"), read("tiny_zip.pth"));
    assert_eq!(legacy.content_sha256(), zip.content_sha256());

    let (mut a, mut b) = (origin("pth"), origin("safetensors"));
    assert!(!a.same_weights(&b));
    assert_ne!(a.cache_key(), b.cache_key());
    (a.weights_content_sha256, b.weights_content_sha256) = (whole.clone(), whole);
    assert!(a.same_weights(&b));
    assert_eq!(a.cache_key(), b.cache_key());
    check(
        &images(&a, 50_000),
        &images(&b, 50_000),
        &Options::default(),
    )
    .unwrap();
    b.weights_content_sha256 = "other".into();
    assert!(!a.same_weights(&b));
    let error = check(
        &images(&a, 50_000),
        &images(&b, 50_000),
        &Options::default(),
    );
    assert!(error.unwrap_err().to_string().contains("different weights"));
    // A file from before this hash was noted.
    let old = r#"{"images_sha256":"i","weights_sha256":"w","preprocessing":"p","size":[8,8],"warnings":[]}"#;
    let old: Provenance = serde_json::from_str(old).unwrap();
    assert_eq!(old, origin("w"));
}

/// An unknown origin: whose statistics compare, and the file's own hash.
#[test]
fn statistics_of_others_are_named_and_hashed() {
    let here = origin("w");
    let foreign = normal(Some(50_000), true);
    let found = check(
        &stored(&foreign),
        &images(&here, 50_000),
        &Options::default(),
    )
    .unwrap();
    has(
        &found.warnings,
        &["only those of ADM, torch-fidelity or `tinyfusion stats` compare (pytorch-fid,"],
    );
    let path = crate::golden_file::folder().join("npz/stats_only.npz");
    let hash = file_sha256(&path).unwrap();
    assert_eq!(hash.len(), 64);
    assert!(file_sha256("/nowhere.npz").is_err());
    // Of an `.npz` the hash of the images is that of the file.
    let images = crate::golden_file::folder().join("npz/adm_stored.npz");
    let set = ImageSet::open(&images).unwrap();
    assert_eq!(set.sha256().unwrap(), file_sha256(&images).unwrap());
}

#[test]
fn a_side_of_nothing_is_refused() {
    let here = origin("w");
    let none = KnownSide {
        name: "none.npz",
        statistics: None,
        images: Vec::new(),
    };
    for (a, b) in [
        (none.clone(), images(&here, 2000)),
        (images(&here, 2000), none),
    ] {
        let error = check(&a, &b, &Options::default()).unwrap_err().to_string();
        assert!(error.contains("none.npz: neither"), "{error}");
    }
    let path = crate::golden_file::folder().join("npz/adm_stored.npz");
    assert!(
        StoredStatistics::read(&mut Npz::open(path).unwrap())
            .unwrap()
            .is_none()
    );
    assert!(FeatureSet::read("/nowhere.safetensors").is_err());
}
