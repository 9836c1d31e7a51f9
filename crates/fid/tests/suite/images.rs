//! Images in, numbers out: guards, shards, caches, and what must not change a result.

use std::collections::BTreeMap;

use tempfile::TempDir;
use tinyfusion_fid::{
    Config, FeatureSet, ImageSet, Inception, Keep, KidConfig, Npz, Options, Provenance, Side,
    Statistics, StoredStatistics, Values, Weights, Work, compare, extract, extract_into,
};

use crate::golden_file::close;
use crate::pictures::{against, features, folder, forced, net, picture};
use crate::synthetic::tensors;

#[test]
fn a_set_against_itself_is_at_no_distance() {
    let dir = folder(0..12);
    let set = features(dir.path()).unwrap();
    let found = against(&set, &set);
    let scale = found.metrics.frechet.trace_first;
    assert!(
        found.metrics.fid.abs() <= 1e-8 * scale,
        "{} of {scale}",
        found.metrics.fid
    );
    assert!(found.sfid.unwrap().abs() <= 1e-8, "{:?}", found.sfid);
    assert_eq!(
        (found.metrics.precision, found.metrics.recall),
        (Some(1.0), Some(1.0))
    );
}

/// Features are the same to the bit; the distances are products and decompositions whose sums the number of threads may
/// divide otherwise, so of them 1e-10 (relative) is demanded.
#[test]
fn threads_and_batches_change_no_result() {
    let (dir, other) = (folder(0..11), folder(20..33));
    let images = ImageSet::open(dir.path()).unwrap();
    let reference = features(other.path()).unwrap();
    let run = |batch: usize| {
        let provenance = Provenance::of(&images, "synthetic").unwrap();
        let mut set = FeatureSet::new(provenance, Keep::ALL, 0);
        let work = Work {
            batch: Some(batch),
            ..Work::default()
        };
        assert!(extract_into(net(), &images, &mut set, &work).unwrap());
        set
    };
    let options = Options {
        config: Config {
            kid: Some(KidConfig {
                subset_size: 5,
                ..KidConfig::default()
            }),
            ..Config::default()
        },
        ..forced()
    };
    let judged = |set: &FeatureSet| {
        let found = compare(&reference.clone().into(), &set.clone().into(), &options).unwrap();
        let m = found.metrics;
        [
            m.fid,
            found.sfid.unwrap(),
            m.inception_score.unwrap(),
            m.precision.unwrap(),
            m.recall.unwrap(),
            m.kid.unwrap(),
            m.kid_std.unwrap(),
        ]
    };
    let whole = features(dir.path()).unwrap();
    let expected = judged(&whole);
    for (threads, batch) in [(1, 1), (1, 4), (2, 3), (2, 11), (3, 4), (3, 100)] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let found = run(batch);
            assert_eq!(found, whole, "{threads} threads, batches of {batch}");
            for (metric, (found, expected)) in judged(&found).iter().zip(expected).enumerate() {
                let what = format!("metric {metric}, {threads} threads, batches of {batch}");
                close(&what, *found, expected, 1e-10, 0.0);
            }
        });
    }
    let one = net().features(picture(4, [20, 16]).as_raw(), [16, 20]);
    assert_eq!(one.pool, whole.pool().unwrap().row(4));
    assert_eq!(one.spatial, whole.spatial().unwrap().row(4));
    assert_eq!(one.logits, whole.logits().unwrap().row(4));
}

#[test]
fn shards_are_the_whole_bit_for_bit() {
    let (whole, reference) = (folder(0..11), folder(20..31));
    let (first, second) = (folder(0..4), folder(4..11));
    let reference = features(reference.path()).unwrap();
    let whole = against(&reference, &features(whole.path()).unwrap());
    // Through files, as they would come from two machines.
    let place = TempDir::new().unwrap();
    let mut shards = [first.path(), second.path()].map(|path| {
        let file = place.path().join("shard.safetensors");
        let set = features(path).unwrap();
        set.write(&mut std::fs::File::create(&file).unwrap())
            .unwrap();
        let read = FeatureSet::read(&file).unwrap();
        assert_eq!(read, set);
        read
    });
    let [joined, last] = &mut shards;
    joined.append(last).unwrap();
    let merged = against(&reference, joined);
    assert_eq!(merged.metrics.fid.to_bits(), whole.metrics.fid.to_bits());
    assert_eq!(
        merged.sfid.unwrap().to_bits(),
        whole.sfid.unwrap().to_bits()
    );
    assert_eq!(merged.metrics, whole.metrics);
    // Other weights do not mix.
    last.provenance.weights_sha256 = "others".into();
    let error = joined.append(last).unwrap_err().to_string();
    assert!(
        error.contains("different weights (`synthetic` and `others`)"),
        "{error}"
    );
}

#[test]
fn statistics_written_and_read_are_the_same() {
    let dir = folder(0..6);
    let set = features(dir.path()).unwrap();
    let stored = StoredStatistics::of(&set).unwrap();
    let mut bytes = Vec::new();
    stored.write(&mut bytes).unwrap();
    let read = StoredStatistics::read(&mut Npz::parse(bytes, "x.npz").unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(read.pool, stored.pool);
    assert_eq!(read.spatial, stored.spatial);
    assert_eq!(read.provenance.as_ref(), Some(&set.provenance));
    assert_eq!(read.pool.n(), Some(6));

    let found = compare(&read.into(), &set.into(), &forced()).unwrap();
    assert!(found.metrics.fid.abs() < 1e-8 * found.metrics.frechet.trace_first);
    assert_eq!(found.metrics.precision, None);
    assert!(
        found
            .metrics
            .warnings
            .iter()
            .any(|w| w.contains("no precision")),
        "{:?}",
        found.metrics.warnings
    );
}

#[test]
fn two_gaussians_in_closed_form() {
    // Diagonal: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2.
    let diagonal = |values: &[f64]| {
        let d = values.len();
        (0..d * d)
            .map(|i| if i % (d + 1) == 0 { values[i / d] } else { 0.0 })
            .collect::<Vec<_>>()
    };
    let of = |mean: &[f64], variances: &[f64]| {
        let statistics =
            Statistics::from_parts(Some(9), mean.to_vec(), diagonal(variances)).unwrap();
        tinyfusion_fid::Gaussian::from_statistics(&statistics).unwrap()
    };
    let (a, b) = (of(&[0.0, 1.0], &[4.0, 9.0]), of(&[3.0, 1.0], &[1.0, 16.0]));
    let found = tinyfusion_fid::frechet_distance(&a, &b).unwrap().distance;
    close("closed form", found, 9.0 + 1.0 + 1.0, 1e-14, 0.0);
}

#[test]
fn guards_refuse_and_warn() {
    let (few, other) = (folder(0..4), TempDir::new().unwrap());
    for seed in 0..4 {
        picture(seed, [16, 16])
            .save(other.path().join(format!("{seed}.jpg")))
            .unwrap();
    }
    let (few, other) = (
        features(few.path()).unwrap(),
        features(other.path()).unwrap(),
    );
    let found = against(&few, &other);
    let (mut reference, other) = (Side::from(few.clone()), Side::from(other));
    let error = compare(&reference, &other, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("4 samples, expected at least 1000"),
        "{error}"
    );
    for part in [
        "4 samples; published FIDs are of 50000",
        "4 of 4 images are JPEG",
        "20 x 16, the samples 16 x 16",
        "rank-deficient",
    ] {
        let warnings = &found.metrics.warnings;
        assert!(
            warnings.iter().any(|w| w.contains(part)),
            "{part}: {warnings:#?}"
        );
    }
    // Statistics of another network: by their size, or by what they say.
    let small = Statistics::from_parts(Some(9), vec![0.0; 2], vec![1.0, 0.0, 0.0, 1.0]).unwrap();
    reference.statistics = Some(StoredStatistics {
        pool: small,
        spatial: None,
        provenance: None,
        warnings: Vec::new(),
    });
    let error = compare(&reference, &other, &forced())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`mu` has 2 values, expected the 2048"),
        "{error}"
    );
    let mut stored = StoredStatistics::of(&few).unwrap();
    stored.provenance.as_mut().unwrap().preprocessing = "bicubic".into();
    reference.statistics = Some(stored);
    let error = compare(&reference, &other, &forced())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("different preprocessing (`bicubic`"),
        "{error}"
    );
    let only = Options {
        config: Config {
            inception_score: None,
            precision_recall: None,
            kid: None,
        },
        sfid: false,
        ..forced()
    };
    reference.statistics = None;
    let found = compare(&reference, &other, &only).unwrap();
    assert_eq!(
        (found.sfid, found.metrics.inception_score, found.metrics.kid),
        (None, None, None)
    );
}

#[test]
fn weights_of_another_network_are_refused() {
    type Tensors = BTreeMap<String, Values<f32>>;
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut all = tensors(0);
        change(&mut all);
        Weights::from_tensors(all, "w.pth")
            .and_then(|w| Inception::new(&w))
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let missing = refused(&|all| {
        all.remove("Mixed_6d.branch7x7dbl_5.bn.running_var");
    });
    assert!(
        missing.contains("w.pth: not the weights")
            && missing.contains("1 missing: Mixed_6d.branch7x7dbl_5.bn.running_var"),
        "{missing}"
    );
    let shaped = refused(&|all| {
        all.insert(
            "fc.weight".into(),
            (vec![1000, 2048], vec![0.0; 1000 * 2048]),
        );
        all.insert("AuxLogits.fc.bias".into(), (vec![1], vec![0.0]));
    });
    assert!(
        shaped.contains("fc.weight is [1000, 2048], expected [1008, 2048]")
            && shaped.contains("1 unexpected: AuxLogits.fc.bias"),
        "{shaped}"
    );
    let value = |key: &'static str, v: f32| refused(&move |all| all.get_mut(key).unwrap().1[0] = v);
    assert!(value("fc.bias", f32::NAN).contains("`fc.bias` [1008] holds NaN at position 0"));
    assert!(value("Conv2d_1a_3x3.bn.running_var", -1.0).contains("the variance -1 at position 0"));
}

#[test]
fn a_stopped_extraction_keeps_nothing() {
    let dir = folder(0..3);
    let images = ImageSet::open(dir.path()).unwrap();
    let provenance = Provenance::of(&images, "x").unwrap();
    assert_eq!(
        extract(net(), &images, provenance, &|_| (), &|| true).unwrap(),
        None
    );
}
