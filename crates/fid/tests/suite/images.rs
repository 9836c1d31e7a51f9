//! Images in, numbers out: guards, shards, caches, and what must not change a result.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use image::{DynamicImage, GrayImage, RgbImage, RgbaImage};
use tempfile::TempDir;
use tinyfusion_fid::{
    Comparison, Config, FeatureSet, ImageSet, Inception, Npz, Options, Provenance, ReferenceSet,
    Statistics, StoredStatistics, Values, Weights, compare, extract,
};

use crate::golden_file::close;
use crate::synthetic::{tensors, weights};

fn net() -> &'static Inception {
    static NET: OnceLock<Inception> = OnceLock::new();
    NET.get_or_init(|| Inception::new(&weights(1)).unwrap())
}

fn picture(seed: usize, size: [u32; 2]) -> RgbImage {
    RgbImage::from_fn(size[0], size[1], |x, y| {
        let (x, y) = (x as usize, y as usize);
        image::Rgb(
            [0, 1, 2]
                .map(|c| ((x * (7 + seed) + y * 13 + c * 29 + x * y * (seed + 3)) % 251) as u8),
        )
    })
}

fn folder(seeds: std::ops::Range<usize>) -> TempDir {
    let dir = TempDir::new().unwrap();
    for seed in seeds {
        picture(seed, [20, 16])
            .save(dir.path().join(format!("{seed:03}.png")))
            .unwrap();
    }
    dir
}

fn features(path: &Path) -> tinyfusion_fid::Result<FeatureSet> {
    let images = ImageSet::open(path)?;
    let provenance = Provenance::of(&images, "synthetic")?;
    Ok(extract(net(), &images, provenance, &|_| (), &|| false)?.unwrap())
}

fn forced() -> Options {
    Options {
        force: true,
        ..Options::default()
    }
}

fn against(reference: &FeatureSet, samples: &FeatureSet) -> Comparison {
    let reference = ReferenceSet {
        statistics: None,
        features: Some(reference.clone()),
    };
    compare(&reference, samples, &forced()).unwrap()
}

#[track_caller]
fn said(path: &Path) -> String {
    ImageSet::open(path).unwrap_err().to_string()
}

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

#[test]
fn threads_and_batches_change_no_bit() {
    let dir = folder(0..7);
    let whole = features(dir.path()).unwrap();
    let alone = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    let three = rayon::ThreadPoolBuilder::new()
        .num_threads(3)
        .build()
        .unwrap();
    assert_eq!(alone.install(|| features(dir.path()).unwrap()), whole);
    assert_eq!(three.install(|| features(dir.path()).unwrap()), whole);
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

    let reference = ReferenceSet {
        statistics: Some(read),
        features: None,
    };
    let found = compare(&reference, &set, &forced()).unwrap();
    assert!(found.metrics.fid.abs() < 1e-5 * found.metrics.frechet.trace_first);
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
    let mut reference = ReferenceSet {
        statistics: None,
        features: Some(few.clone()),
    };
    let error = compare(&reference, &other, &Options::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("4 samples, expected at least 1000"),
        "{error}"
    );
    let found = against(&few, &other);
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
        force: true,
    };
    reference.statistics = None;
    let found = compare(&reference, &other, &only).unwrap();
    assert_eq!(
        (found.sfid, found.metrics.inception_score, found.metrics.kid),
        (None, None, None)
    );
}

#[test]
fn folders_that_are_no_set_are_errors() {
    let dir = TempDir::new().unwrap();
    assert!(said(dir.path()).contains("has no image (png, jpg, jpeg, webp)"));
    std::fs::create_dir(dir.path().join("deeper")).unwrap();
    picture(1, [20, 16])
        .save(dir.path().join("deeper/a.png"))
        .unwrap();
    picture(2, [20, 16])
        .save(dir.path().join("b.webp"))
        .unwrap();
    assert_eq!(ImageSet::open(dir.path()).unwrap().len(), 2);
    picture(3, [16, 20]).save(dir.path().join("c.png")).unwrap();
    let error = said(dir.path());
    assert!(
        error.contains("images of 2 sizes: 2 of 20 x 16") && error.contains("1 of 16 x 20"),
        "{error}"
    );
    std::fs::remove_file(dir.path().join("c.png")).unwrap();
    std::fs::write(dir.path().join("d.png"), b"no picture").unwrap();
    std::fs::write(dir.path().join("e.jpg"), b"").unwrap();
    let error = said(dir.path());
    assert!(
        error.contains("2 images cannot be read")
            && error.contains("d.png:")
            && error.contains("e.jpg:"),
        "{error}"
    );
    assert!(said(Path::new("/nowhere.npz")).starts_with("/nowhere.npz: cannot be opened"));
}

#[test]
fn files_that_break_off_are_listed() {
    let dir = folder(0..5);
    for name in ["001.png", "003.png"] {
        let path = dir.path().join(name);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    }
    let error = features(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("2 images cannot be read")
            && error.contains("001.png")
            && error.contains("003.png"),
        "{error}"
    );
}

#[test]
fn grey_and_transparent_images_are_converted_and_named() {
    let dir = TempDir::new().unwrap();
    GrayImage::from_pixel(8, 8, image::Luma([9]))
        .save(dir.path().join("a.png"))
        .unwrap();
    RgbaImage::from_pixel(8, 8, image::Rgba([9, 9, 9, 0]))
        .save(dir.path().join("b.png"))
        .unwrap();
    DynamicImage::from(RgbImage::from_pixel(8, 8, image::Rgb([9, 9, 9])))
        .save(dir.path().join("c.png"))
        .unwrap();
    let set = features(dir.path()).unwrap();
    assert!(
        set.provenance.warnings[0].contains("2 of 3 images are not 8-bit RGB"),
        "{:?}",
        set.provenance.warnings
    );
    let pool = set.pool().unwrap();
    assert_eq!((pool.row(0), pool.row(1)), (pool.row(2), pool.row(2)));
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
