use std::fs;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::Loader;

/// A picture with a formula that a Pillow script can repeat.
fn pattern(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        image::Rgb([0, 1, 2].map(|c| (x * 7 + y * 13 + c * 29 + x * y * 3) as u8))
    })
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

fn save(dir: &TempDir, name: &str, picture: &RgbImage) {
    let path = dir.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    picture.save(path).unwrap();
}

/// Two classes: `a` with one picture, `b` with three, one of them deeper; and things to be left out.
fn folder() -> TempDir {
    let dir = TempDir::new().unwrap();
    save(&dir, "b/2.png", &pattern(8, 8));
    save(&dir, "b/10.PNG", &pattern(9, 12));
    save(&dir, "b/deeper/1.webp", &pattern(20, 17));
    save(
        &dir,
        "a/x.jpeg",
        &RgbImage::from_pixel(8, 8, image::Rgb([255, 0, 51])),
    );
    save(&dir, ".hidden/x.png", &pattern(8, 8));
    fs::write(dir.path().join("a/notes.txt"), "no picture").unwrap();
    fs::write(dir.path().join("README"), "no class").unwrap();
    dir
}

fn values(batch: &LatentBatch) -> Vec<f32> {
    batch.x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn center_crop_equals_pillow() {
    // Recorded with Pillow 11.3.0 and guided-diffusion's `center_crop_arr` on the same pattern: FNV-1a
    // of the (H, W, 3) bytes, and the first pixel.
    let cases: [(u32, u32, usize, u64, [u8; 3]); 6] = [
        (53, 37, 16, 0xbf86_fb50_217e_9d9a, [75, 105, 138]),
        (40, 97, 32, 0xe69f_7e63_4ce1_fd46, [143, 174, 137]),
        (20, 23, 32, 0x1407_e51e_20f1_8c41, [13, 42, 71]), // enlarges
        (16, 16, 16, 0xa322_9626_4ad0_c8e5, [0, 29, 58]),
        (131, 259, 24, 0x8d7d_cf8d_0e77_a420, [114, 122, 120]),
        (33, 48, 32, 0xde33_e8c9_13e3_7fdd, [94, 123, 152]),
    ];
    for (width, height, size, checksum, first) in cases {
        let cropped = center_crop(&pattern(width, height), size);
        assert_eq!(cropped.dimensions(), (size as u32, size as u32));
        assert_eq!(
            cropped.get_pixel(0, 0).0,
            first,
            "{width}×{height} → {size}"
        );
        assert_eq!(
            fnv1a(cropped.as_raw()),
            checksum,
            "{width}×{height} → {size}"
        );
    }
}

#[test]
fn classes_and_samples_are_sorted() {
    let dir = folder();
    let source = ImageFolder::open(dir.path(), 8, Augment::Never).unwrap();
    assert_eq!(source.class_names(), ["a", "b"]);
    assert_eq!(
        (source.len(), source.classes(), source.shape()),
        (Some(4), 2, [3, 8, 8])
    );
    let paths: Vec<_> = (0..4)
        .map(|i| {
            source
                .path(i)
                .unwrap()
                .strip_prefix(dir.path())
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(
        paths,
        ["a/x.jpeg", "b/10.PNG", "b/2.png", "b/deeper/1.webp"].map(PathBuf::from)
    );
    assert_eq!(source.path(4), None);
    let batch = source.batch(&[3, 0, 1]).unwrap();
    assert_eq!(batch.y.to_vec1::<u32>().unwrap(), [1, 0, 1]);
    assert_eq!(batch.x.dims(), [3, 3, 8, 8]);
}

#[test]
fn pixels_are_channels_first_in_minus_one_to_one() {
    let dir = folder();
    let source = ImageFolder::open(dir.path(), 8, Augment::Never).unwrap();
    let picture = pattern(8, 8);
    let x = values(&source.batch(&[2]).unwrap());
    for (px, py, rgb) in picture.enumerate_pixels() {
        for c in 0..3 {
            let expected = f32::from(rgb.0[c]) / 127.5 - 1.0;
            let got = x[(c * 8 + py as usize) * 8 + px as usize];
            assert!(
                (got - expected).abs() < 1e-6,
                "channel {c} at {px}, {py}: {got}, expected {expected}"
            );
        }
    }
}

#[test]
fn flips_are_whole_mirrors_decided_by_the_step() {
    let dir = folder();
    let plain = ImageFolder::open(dir.path(), 8, Augment::Never).unwrap();
    let source = Arc::new(ImageFolder::open(dir.path(), 8, Augment::HorizontalFlip).unwrap());
    let mut mirrored = 0;
    for seed in 0..40 {
        let mut rng = StepRng::new(seed, 0, tinyfusion_core::stream::AUGMENT);
        let (got, straight) = (
            source.augmented(&[2], &mut rng).unwrap(),
            plain.batch(&[2]).unwrap(),
        );
        let flipped = straight.x.flip(&[3]).unwrap();
        let is = |x: &Tensor| values(&got) == x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(
            is(&straight.x) != is(&flipped),
            "neither the picture nor its mirror image"
        );
        mirrored += usize::from(is(&flipped));
    }
    assert!((8..=32).contains(&mirrored), "{mirrored} of 40 mirrored");
    assert_eq!(
        values(&source.batch(&[2]).unwrap()),
        values(&plain.batch(&[2]).unwrap())
    );

    let mut whole = Loader::new(source.clone(), 1, 3).unwrap();
    let unbroken: Vec<_> = (0..8).map(|k| values(&whole.batch(k).unwrap())).collect();
    let mut resumed = Loader::new(source, 1, 3).unwrap();
    for (k, expected) in unbroken.iter().enumerate().skip(4) {
        assert_eq!(
            &values(&resumed.batch(k as u64).unwrap()),
            expected,
            "step {k}"
        );
    }
}

#[test]
fn content_decides_about_the_format() {
    let dir = TempDir::new().unwrap();
    save(&dir, "a/x.png", &pattern(8, 8));
    fs::rename(dir.path().join("a/x.png"), dir.path().join("a/x.JPEG")).unwrap();
    let source = ImageFolder::open(dir.path(), 8, Augment::Never).unwrap();
    assert_eq!(values(&source.batch(&[0]).unwrap())[0], -1.0);
}

#[test]
fn errors_name_folder_or_file() {
    let dir = TempDir::new().unwrap();
    let complaint = |path: &Path| {
        let message = ImageFolder::open(path, 8, Augment::Never)
            .unwrap_err()
            .to_string();
        assert!(message.contains(&path.display().to_string()), "{message}");
        message
    };
    assert!(complaint(&dir.path().join("absent")).contains("cannot be read as a folder"));
    assert!(complaint(dir.path()).contains("found no class"));
    fs::create_dir(dir.path().join("empty")).unwrap();
    let message = complaint(dir.path());
    assert!(
        message.contains("empty") && message.contains("has no picture"),
        "{message}"
    );

    fs::write(dir.path().join("empty/broken.png"), "not a picture").unwrap();
    let source = ImageFolder::open(dir.path(), 8, Augment::Never).unwrap();
    let message = source.batch(&[0]).unwrap_err().to_string();
    assert!(
        message.contains("broken.png") && message.contains("cannot be read as a picture"),
        "{message}"
    );
    assert!(
        source
            .batch(&[1])
            .unwrap_err()
            .to_string()
            .contains("sample 1")
    );
    assert!(ImageFolder::open(dir.path(), 0, Augment::Never).is_err());
}

#[test]
fn the_listing_tells_names_and_not_where_they_stand() {
    let (here, there) = (folder(), folder());
    let hash = |dir: &TempDir| {
        let source = ImageFolder::open(dir.path(), 8, Augment::Never).unwrap();
        source.listing_sha256()
    };
    let first = hash(&here);
    assert_eq!(first, hash(&there));
    // Through another spelling of the path, too.
    let spelt = here.path().join("a/..");
    let source = ImageFolder::open(&spelt, 8, Augment::Never).unwrap();
    assert_eq!(first, source.listing_sha256());
    fs::rename(there.path().join("b/2.png"), there.path().join("b/3.png")).unwrap();
    let renamed = hash(&there);
    assert_ne!(first, renamed);
    fs::rename(there.path().join("b"), there.path().join("c")).unwrap();
    assert_ne!(renamed, hash(&there));
}
