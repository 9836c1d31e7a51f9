//! Folders of images: what is found in them, what is refused and what is warned of.

use std::path::{Path, PathBuf};

use image::{DynamicImage, GrayImage, ImageBuffer, Rgb, RgbImage, RgbaImage};
use tempfile::TempDir;
use tinyfusion_fid::ImageSet;

use crate::pictures::{features, folder, picture};

#[track_caller]
fn said(path: &Path) -> String {
    ImageSet::open(path).unwrap_err().to_string()
}

#[track_caller]
fn warned(path: &Path, parts: &[&str]) -> ImageSet {
    let set = ImageSet::open(path).unwrap();
    let warnings = set.warnings();
    for part in parts {
        assert!(
            warnings.iter().any(|warning| warning.contains(part)),
            "{part}: {warnings:#?}"
        );
    }
    set
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
    let said = &set.provenance.warnings;
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(
        said[0].contains("1 of 3 images are not 8-bit RGB but grey (such as"),
        "{said:?}"
    );
    assert!(
        said[0].contains("a.png") && said[1].contains("b.png"),
        "{said:?}"
    );
    assert!(
        said[1].contains("1 of 3 images are not 8-bit RGB but transparent"),
        "{said:?}"
    );
    let pool = set.pool().unwrap();
    assert_eq!((pool.row(0), pool.row(1)), (pool.row(2), pool.row(2)));
}

/// 16-bit colours are no grey images and have no transparency.
#[test]
fn images_of_more_bits_are_named_as_such() {
    let dir = TempDir::new().unwrap();
    let deep: ImageBuffer<Rgb<u16>, Vec<u16>> = ImageBuffer::from_pixel(8, 8, Rgb([9, 900, 9000]));
    DynamicImage::ImageRgb16(deep)
        .save(dir.path().join("a.png"))
        .unwrap();
    let set = warned(
        dir.path(),
        &["1 of 1 images are not 8-bit RGB but of more bits"],
    );
    assert_eq!(set.warnings().len(), 1, "{:?}", set.warnings());
}

#[test]
fn lossy_webp_is_warned_of_and_lossless_is_not() {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/decode");
    for (name, lossy) in [("webp-lossy-0.webp", true), ("webp-lossless-0.webp", false)] {
        let dir = TempDir::new().unwrap();
        std::fs::copy(from.join(name), dir.path().join(name)).unwrap();
        let set = ImageSet::open(dir.path()).unwrap();
        let warnings = set.warnings();
        let found = warnings
            .iter()
            .any(|w| w.contains("are lossy WebP (such as"));
        assert_eq!(found, lossy, "{name}: {warnings:?}");
    }
}

/// A link to a folder above it, or beside it, adds no image a second time.
#[cfg(unix)]
#[test]
fn links_in_a_circle_end() {
    let dir = folder(0..2);
    std::os::unix::fs::symlink(".", dir.path().join("again")).unwrap();
    let set = warned(
        dir.path(),
        &["1 folders are linked more than once (such as", "again)"],
    );
    assert_eq!(set.len(), 2);
    let (deep, other) = (dir.path().join("x/y"), TempDir::new().unwrap());
    std::fs::create_dir_all(&deep).unwrap();
    picture(7, [20, 16]).save(deep.join("c.png")).unwrap();
    std::os::unix::fs::symlink(dir.path(), deep.join("up")).unwrap();
    // A link out of the folder is followed, once.
    picture(8, [20, 16])
        .save(other.path().join("d.png"))
        .unwrap();
    std::os::unix::fs::symlink(other.path(), dir.path().join("out")).unwrap();
    assert_eq!(ImageSet::open(dir.path()).unwrap().len(), 4);
}

#[test]
fn pictures_of_other_formats_are_not_passed_over_in_silence() {
    let dir = folder(0..2);
    for name in ["a.bmp", "b.GIF", "c.tiff"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    std::fs::write(dir.path().join("notes.txt"), "").unwrap();
    let set = warned(
        dir.path(),
        &["3 pictures in other formats (such as", "a.bmp"],
    );
    assert_eq!(set.len(), 2);
    let only = TempDir::new().unwrap();
    std::fs::write(only.path().join("x.tif"), "").unwrap();
    let error = said(only.path());
    assert!(error.contains("1 pictures in other formats"), "{error}");
}

/// `samples.npz` is what is meant only where `tinyfusion sample` has written it.
#[test]
fn samples_beside_pictures() {
    let golden = crate::golden_file::folder().join("npz/adm_stored.npz");
    let (dir, lone) = (folder(0..2), TempDir::new().unwrap());
    let place = |dir: &TempDir| -> PathBuf { dir.path().join("samples.npz") };
    std::fs::copy(&golden, place(&dir)).unwrap();
    std::fs::copy(&golden, place(&lone)).unwrap();
    let npz = ImageSet::open(&golden).unwrap().len();
    assert_ne!(npz, 2);
    let words = ["the 2 images of the folder are taken, not the samples.npz"];
    assert_eq!(warned(dir.path(), &words).len(), 2);
    let words = ["no sample.json lies beside samples.npz"];
    assert_eq!(warned(lone.path(), &words).len(), npz);
    std::fs::write(dir.path().join("sample.json"), "{}").unwrap();
    let set = ImageSet::open(dir.path()).unwrap();
    assert_eq!((set.len(), set.warnings().len()), (npz, 0));
    assert_eq!(set.path(), place(&dir));
}
