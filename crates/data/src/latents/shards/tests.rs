use tempfile::TempDir;
use tinyfusion_core::stream;

use super::*;

const SHAPE: [usize; 3] = [2, 1, 3];

fn index(images: u64) -> LatentIndex {
    LatentIndex {
        flips: true,
        scale: 0.5,
        dtype: LatentType::F32,
        shard_images: 4,
        ..LatentIndex::new(LatentContent::Moments, SHAPE, 5, images)
    }
}

/// Rows `from..from + b` of moments with flips: image i has the mean i (mirrored: −i) and log σ² = −2 (0).
fn rows_of(index: &LatentIndex, from: usize, b: usize) -> LatentBatch {
    let [v, h, w] = index.row_shape();
    let plane = SHAPE.iter().product::<usize>();
    let x: Vec<f32> = (from..from + b)
        .flat_map(|i| {
            let parts = [i as f32, -2.0, -(i as f32), 0.0];
            parts.into_iter().flat_map(move |value| vec![value; plane])
        })
        .collect();
    let y: Vec<u32> = (from..from + b).map(|i| i as u32 % 5).collect();
    LatentBatch {
        x: Tensor::from_vec(x, (b, v, h, w), &Device::Cpu).unwrap(),
        y: Tensor::from_vec(y, b, &Device::Cpu).unwrap(),
    }
}

fn written(dir: &TempDir, images: u64, batch: usize) -> PathBuf {
    let (folder, index) = (dir.path().join("latents"), index(images));
    let mut writer = ShardWriter::open(&folder, &index).unwrap();
    for from in (0..images as usize).step_by(batch) {
        let b = batch.min(images as usize - from);
        writer.push(&rows_of(&index, from, b)).unwrap();
    }
    writer.finish().unwrap();
    folder
}

fn values(batch: &LatentBatch) -> Vec<Vec<f32>> {
    batch.x.flatten_from(1).unwrap().to_vec2().unwrap()
}

#[test]
fn means_and_labels_come_out_of_every_shard() {
    // Batches that cross the ends of shards, and those that do not, write the same.
    for batch in [3, 4, 10] {
        let dir = TempDir::new().unwrap();
        let latents = ShardedLatents::open(written(&dir, 10, batch)).unwrap();
        assert_eq!(
            (latents.len(), latents.classes(), latents.shape()),
            (Some(10), 5, SHAPE)
        );
        assert_eq!(
            latents
                .index()
                .shards
                .iter()
                .map(|s| s.images)
                .collect::<Vec<_>>(),
            [4, 4, 2]
        );
        let got = latents.batch(&[9, 0, 4, 3]).unwrap();
        assert_eq!(got.x.dims(), [4, 2, 1, 3]);
        assert_eq!(got.y.to_vec1::<u32>().unwrap(), [4, 0, 4, 3]);
        for (row, i) in values(&got).iter().zip([9.0f32, 0.0, 4.0, 3.0]) {
            assert_eq!(row, &vec![i * 0.5; 6], "the mean, scaled");
        }
        assert!(
            latents
                .batch(&[10])
                .unwrap_err()
                .to_string()
                .contains("sample 10")
        );
    }
}

#[test]
fn a_step_draws_from_the_posterior_and_mirrors_half() {
    let dir = TempDir::new().unwrap();
    let latents = ShardedLatents::open(written(&dir, 10, 10)).unwrap();
    let indices = vec![7u64; 4000];
    let draw = |step| {
        let mut rng = StepRng::new(1, step, stream::AUGMENT);
        values(&latents.augmented(&indices, &mut rng).unwrap())
    };
    let first = draw(0);
    assert_eq!(first, draw(0), "the same step draws the same");
    assert_ne!(first, draw(1));
    // Of image 7, at scale 0.5: mean 3.5 and σ = e⁻¹/2; mirrored −3.5 and σ = 1/2.
    for (sign, sigma) in [(1.0f64, 0.5 * (-1.0f64).exp()), (-1.0, 0.5)] {
        let of: Vec<f64> = first
            .iter()
            .filter(|row| f64::from(row[0]) * sign > 0.0)
            .flatten()
            .map(|v| f64::from(*v))
            .collect();
        let n = of.len() as f64;
        let share = n / (first.len() * 6) as f64;
        assert!((share - 0.5).abs() < 0.04, "{share} are mirrored so");
        let mean = of.iter().sum::<f64>() / n;
        let std = (of.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
        assert!(
            (mean - 3.5 * sign).abs() < 5.0 * sigma / n.sqrt(),
            "mean {mean}"
        );
        assert!(
            (std / sigma - 1.0).abs() < 0.04,
            "σ {std}, expected {sigma}"
        );
    }
}

#[test]
fn stored_samples_are_taken_as_they_are() {
    let dir = TempDir::new().unwrap();
    let index = LatentIndex {
        scale: 0.5,
        ..LatentIndex::new(LatentContent::Samples, SHAPE, 5, 2)
    };
    assert_eq!(index.row_shape(), SHAPE);
    let mut writer = ShardWriter::open(dir.path(), &index).unwrap();
    let x = Tensor::new(
        &[1f32, 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12.],
        &Device::Cpu,
    )
    .unwrap();
    let batch = LatentBatch {
        x: x.reshape((2, 2, 1, 3)).unwrap(),
        y: Tensor::new(&[0u32, 4], &Device::Cpu).unwrap(),
    };
    writer.push(&batch).unwrap();
    writer.finish().unwrap();
    let latents = ShardedLatents::open(dir.path()).unwrap();
    let mut rng = StepRng::new(0, 0, stream::AUGMENT);
    let got = latents.augmented(&[1, 0], &mut rng).unwrap();
    assert_eq!(
        values(&got),
        [
            vec![7f32, 8., 9., 10., 11., 12.],
            vec![1., 2., 3., 4., 5., 6.]
        ]
    );
}

#[test]
fn an_interrupted_set_goes_on_behind_its_last_whole_shard() {
    let dir = TempDir::new().unwrap();
    let (folder, index) = (dir.path().join("latents"), index(10));
    let mut writer = ShardWriter::open(&folder, &index).unwrap();
    writer.push(&rows_of(&index, 0, 6)).unwrap();
    drop(writer); // two images of the second shard are lost with it
    let message = ShardedLatents::open(&folder).unwrap_err().to_string();
    assert!(message.contains("has 4 of 10 images"), "{message}");
    let mut writer = ShardWriter::open(&folder, &index).unwrap();
    assert_eq!(writer.written(), 4);
    writer.push(&rows_of(&index, 4, 6)).unwrap();
    assert!(writer.push(&rows_of(&index, 0, 1)).is_err(), "it has all");
    writer.finish().unwrap();
    let other = TempDir::new().unwrap();
    let whole = written(&other, 10, 10);
    for entry in fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(
            fs::read(whole.join(&name)).unwrap() == fs::read(folder.join(&name)).unwrap(),
            "{name:?} differs"
        );
    }
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        4,
        "an index and three shards"
    );
}

#[test]
fn other_settings_are_not_mixed() {
    let dir = TempDir::new().unwrap();
    let folder = written(&dir, 10, 10);
    let mut other = index(10);
    other.scale = 0.25;
    other.origin.insert("vae".into(), "abc".into());
    let message = ShardWriter::open(&folder, &other).unwrap_err().to_string();
    assert!(
        message.contains("scale 0.5") && message.contains("scale 0.25"),
        "{message}"
    );
    assert!(
        message.contains("abc") && !message.contains("flips"),
        "{message}"
    );
    let short = ShardWriter::open(dir.path().join("new"), &index(10)).unwrap();
    let message = short.finish().unwrap_err().to_string();
    assert!(
        message.contains("announced with 10 images, but got 0"),
        "{message}"
    );
}

#[test]
fn a_folder_that_is_not_what_its_index_says_is_refused() {
    let dir = TempDir::new().unwrap();
    let folder = written(&dir, 10, 10);
    let path = folder.join(INDEX_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let refused = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        ShardedLatents::open(&folder).unwrap_err().to_string()
    };
    for (from, to, says) in [
        (
            "\"flips\": true",
            "\"flips\": false",
            "but latents.json says 4 of [4, 1, 3]",
        ),
        (
            "shard-00001.safetensors",
            "../shard-00001.safetensors",
            "a file name",
        ),
        (
            "shard-00001.safetensors",
            "shard-00007.safetensors",
            "shard-00007",
        ),
        ("\"images\": 10", "\"images\": 11", "10 of 11 images"),
        (
            "\"images\": 10",
            "\"images\": 5",
            "more images in its shards",
        ),
        ("\"scale\": 0.5", "\"scale\": 0.0", "has the scale 0"),
        (
            "tinyfusion-latents/1",
            "tinyfusion-latents/2",
            "expected `tinyfusion-latents/1`",
        ),
        ("\"classes\": 5", "\"classes\": 3", "label"),
        ("\"flips\": true", "\"flaps\": true", "flaps"),
    ] {
        let message = refused(from, to);
        assert!(message.contains(says), "{from} → {to}: {message}");
    }
    fs::write(&path, &text).unwrap();
    let shard = folder.join("shard-00002.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 4]).unwrap();
    let message = ShardedLatents::open(&folder).unwrap_err().to_string();
    assert!(
        message.contains("shard-00002") && message.contains("truncated"),
        "{message}"
    );
}

#[test]
fn a_damaged_shard_is_found_and_written_again() {
    let dir = TempDir::new().unwrap();
    let folder = written(&dir, 10, 10);
    let (cut, gone) = (
        folder.join("shard-00001.safetensors"),
        folder.join("shard-00002.safetensors"),
    );
    let whole = [fs::read(&cut).unwrap(), fs::read(&gone).unwrap()];
    assert!(
        ShardWriter::open(&folder, &index(10))
            .unwrap()
            .damaged()
            .is_empty()
    );
    fs::write(&cut, &whole[0][..whole[0].len() - 4]).unwrap();
    fs::remove_file(&gone).unwrap();
    let writer = ShardWriter::open(&folder, &index(10)).unwrap();
    let damaged = writer.damaged();
    let images: Vec<_> = damaged.iter().map(|d| d.images.clone()).collect();
    assert_eq!(images, [4..8, 8..10]);
    assert!(damaged[0].error.to_string().contains("shard-00001"));
    for damage in &damaged {
        let (from, to) = (damage.images.start as usize, damage.images.end as usize);
        let mut shard = writer.again(damage).unwrap();
        shard.push(&rows_of(&index(10), from, to - from)).unwrap();
        shard.finish().unwrap();
    }
    assert!(writer.damaged().is_empty());
    assert!([fs::read(&cut).unwrap(), fs::read(&gone).unwrap()] == whole);
}
