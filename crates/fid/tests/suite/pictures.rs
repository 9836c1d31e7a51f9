//! Small pictures and their features.

use std::path::Path;
use std::sync::OnceLock;

use image::RgbImage;
use tempfile::TempDir;
use tinyfusion_fid::{
    Comparison, FeatureSet, ImageSet, Inception, Options, Provenance, compare, extract,
};

use crate::synthetic::weights;

pub(crate) fn net() -> &'static Inception {
    static NET: OnceLock<Inception> = OnceLock::new();
    NET.get_or_init(|| Inception::new(&weights(1)).unwrap())
}

pub(crate) fn picture(seed: usize, size: [u32; 2]) -> RgbImage {
    RgbImage::from_fn(size[0], size[1], |x, y| {
        let (x, y) = (x as usize, y as usize);
        image::Rgb(
            [0, 1, 2]
                .map(|c| ((x * (7 + seed) + y * 13 + c * 29 + x * y * (seed + 3)) % 251) as u8),
        )
    })
}

pub(crate) fn folder(seeds: std::ops::Range<usize>) -> TempDir {
    let dir = TempDir::new().unwrap();
    for seed in seeds {
        picture(seed, [20, 16])
            .save(dir.path().join(format!("{seed:03}.png")))
            .unwrap();
    }
    dir
}

pub(crate) fn features(path: &Path) -> tinyfusion_fid::Result<FeatureSet> {
    let images = ImageSet::open(path)?;
    let provenance = Provenance::of(&images, "synthetic")?;
    Ok(extract(net(), &images, provenance, &|_| (), &|| false)?.unwrap())
}

pub(crate) fn forced() -> Options {
    Options {
        force: true,
        ..Options::default()
    }
}

pub(crate) fn against(reference: &FeatureSet, samples: &FeatureSet) -> Comparison {
    let (reference, samples) = (reference.clone().into(), samples.clone().into());
    compare(&reference, &samples, &forced()).unwrap()
}
