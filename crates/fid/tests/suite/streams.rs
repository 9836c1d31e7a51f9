//! Statistics of images that stream by: the same bits as of all features at once, whatever the shards.

use tinyfusion_fid::{
    Error, FeatureSet, ImageFeatures, ImageSet, Keep, Npz, Provenance, Sink, StatisticsSums,
    StoredStatistics, Work, extract_into,
};

use crate::golden_file::all_close;
use crate::pictures::{features, folder, net};

fn origin(images: &str) -> Provenance {
    Provenance {
        images_sha256: images.into(),
        weights_sha256: "w".into(),
        weights_content_sha256: String::new(),
        preprocessing: "p".into(),
        size: [8, 8],
        warnings: vec![format!("of {images}")],
    }
}

/// Features of an image that never was.
fn image(index: usize) -> ImageFeatures {
    let values = |columns: usize| {
        let value = |i: usize| ((index * 7919 + i * 104_729 + index * i) % 1009) as f32 / 512.0;
        (0..columns).map(value).collect()
    };
    ImageFeatures {
        pool: values(ImageFeatures::POOL),
        spatial: values(ImageFeatures::SPATIAL),
        logits: values(ImageFeatures::LOGITS),
    }
}

fn set(range: std::ops::Range<usize>, name: &str) -> FeatureSet {
    let mut all = FeatureSet::new(origin(name), Keep::ALL, range.len());
    for index in range {
        all.take(&image(index)).unwrap();
    }
    all
}

fn same(found: &StoredStatistics, expected: &StoredStatistics) {
    assert_eq!(found.pool, expected.pool);
    assert_eq!(found.spatial, expected.spatial);
}

#[test]
fn streamed_statistics_are_those_of_all_features() {
    // More than two blocks, and shards that end within one.
    let whole = StoredStatistics::of(&set(0..2300, "a")).unwrap();
    let mut sums = StatisticsSums::new(true).unwrap();
    sums.begin(&origin("a")).unwrap();
    for index in 0..700 {
        sums.take(&image(index)).unwrap();
    }
    sums.add(&set(700..1900, "b")).unwrap();
    sums.begin(&origin("c")).unwrap();
    for index in 1900..2300 {
        sums.take(&image(index)).unwrap();
    }
    assert_eq!(sums.n(), 2300);
    let found = sums.finish().unwrap();
    same(&found, &whole);
    let provenance = found.provenance.unwrap();
    assert_eq!(provenance.images_sha256, "a+b+c");
    assert_eq!(provenance.warnings, ["of a", "of b", "of c"]);
}

#[test]
fn statistics_of_shards_merge_to_rounding_and_count_exactly() {
    let whole = StoredStatistics::of(&set(0..300, "a")).unwrap();
    let shards = [0..120, 120..121 + 60, 181..300];
    let mut sums = StatisticsSums::new(true).unwrap();
    for (shard, name) in shards.into_iter().zip(["a", "b", "c"]) {
        // Through a file, as it would come from another machine.
        let mut bytes = Vec::new();
        StoredStatistics::of(&set(shard, name))
            .unwrap()
            .write(&mut bytes)
            .unwrap();
        let mut file = Npz::parse(bytes, "shard.npz").unwrap();
        let stored = StoredStatistics::read(&mut file).unwrap().unwrap();
        sums.merge(&stored).unwrap();
    }
    let merged = sums.finish().unwrap();
    assert_eq!(merged.pool.n(), Some(300));
    all_close("mu", merged.pool.mean(), whole.pool.mean(), 1e-12);
    all_close(
        "sigma",
        merged.pool.covariance(),
        whole.pool.covariance(),
        1e-12,
    );
    let [merged, whole] = [merged.spatial, whole.spatial].map(Option::unwrap);
    all_close("sigma_s", merged.covariance(), whole.covariance(), 1e-12);
}

#[test]
fn statistics_that_do_not_belong_together_are_refused() {
    let stored = StoredStatistics::of(&set(0..4, "a")).unwrap();
    let mut others = stored.clone();
    others.provenance.as_mut().unwrap().weights_sha256 = "others".into();
    let mut nameless = stored.clone();
    nameless.provenance = None;
    for (other, words) in [(&others, "different weights"), (&nameless, "which network")] {
        let mut sums = StatisticsSums::new(true).unwrap();
        sums.merge(&stored).unwrap();
        let error = sums.merge(other).unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    // Without a count nothing is merged.
    let mut uncounted = stored.clone();
    let (mean, covariance) = (
        stored.pool.mean().to_vec(),
        stored.pool.covariance().to_vec(),
    );
    uncounted.pool = tinyfusion_fid::Statistics::from_parts(None, mean, covariance).unwrap();
    let mut sums = StatisticsSums::new(true).unwrap();
    let error = sums.merge(&uncounted).unwrap_err().to_string();
    assert!(error.contains("number of rows is unknown"), "{error}");
    // A shard without spatial features leaves the whole without.
    let mut sums = StatisticsSums::new(true).unwrap();
    let mut flat = stored.clone();
    flat.spatial = None;
    sums.merge(&stored).unwrap();
    sums.merge(&flat).unwrap();
    assert!(sums.finish().unwrap().spatial.is_none());
}

/// Through the network, in batches of several sizes.
#[test]
fn the_network_streams_into_the_same_bits() {
    let dir = folder(0..5);
    let expected = StoredStatistics::of(&features(dir.path()).unwrap()).unwrap();
    let images = ImageSet::open(dir.path()).unwrap();
    for batch in [1, 2, 5] {
        let mut sums = StatisticsSums::new(true).unwrap();
        let provenance = Provenance::of(&images, "synthetic").unwrap();
        sums.begin(&provenance).unwrap();
        let work = Work {
            batch: Some(batch),
            ..Work::default()
        };
        assert!(extract_into(net(), &images, &mut sums, &work).unwrap());
        same(&sums.finish().unwrap(), &expected);
    }
    let none = Work {
        batch: Some(0),
        ..Work::default()
    };
    let mut sums = StatisticsSums::new(false).unwrap();
    let error = extract_into(net(), &images, &mut sums, &none).unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
}

/// What was not kept is an error by name, not an empty matrix.
#[test]
fn only_what_is_asked_for_is_kept() {
    let keep = Keep {
        spatial: false,
        logits: false,
    };
    let mut few = FeatureSet::new(origin("a"), keep, 4);
    for index in 0..4 {
        few.take(&image(index)).unwrap();
    }
    assert_eq!(few.pool().unwrap(), set(0..4, "a").pool().unwrap());
    for error in [few.spatial().unwrap_err(), few.logits().unwrap_err()] {
        assert!(error.to_string().contains("were not kept"), "{error}");
    }
    assert!(few.write(&mut Vec::new()).is_err());
    assert!(StoredStatistics::of(&few).unwrap().spatial.is_none());
    let mut joined = set(4..6, "b");
    joined.append(&few).unwrap();
    assert_eq!(joined.len(), 6);
    assert!(joined.spatial().is_err() && joined.pool().unwrap().rows() == 6);
}
