//! A set of shards holds one file for each shard and opens none while it is read.
#![allow(clippy::unwrap_used)] // a test may panic
#![cfg(target_os = "linux")] // the kernel's lists of what a process holds

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tinyfusion_core::LatentBatch;
use tinyfusion_data::{LatentContent, LatentIndex, Loader, ShardWriter, ShardedLatents};

const SHAPE: [usize; 3] = [4, 2, 2];
const SHARD: u64 = 16;

fn set(folder: &Path, images: u64) {
    let index = LatentIndex {
        flips: true,
        shard_images: SHARD,
        ..LatentIndex::new(LatentContent::Moments, SHAPE, 10, images)
    };
    let [v, h, w] = index.row_shape();
    let b = images as usize;
    let x: Vec<f32> = (0..b * v * h * w).map(|i| (i % 97) as f32 / 97.0).collect();
    let y: Vec<u32> = (0..b as u32).map(|i| i % 10).collect();
    let mut writer = ShardWriter::open(folder, &index).unwrap();
    let batch = LatentBatch {
        x: Tensor::from_vec(x, (b, v, h, w), &Device::Cpu).unwrap(),
        y: Tensor::from_vec(y, b, &Device::Cpu).unwrap(),
    };
    writer.push(&batch).unwrap();
    writer.finish().unwrap();
}

/// Files under `folder` that are open, one entry for every descriptor.
fn open(folder: &Path) -> Vec<PathBuf> {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let targets = links.filter_map(|link| fs::read_link(link.path()).ok());
    targets.filter(|path| path.starts_with(folder)).collect()
}

/// Files under `folder` that are mapped into memory: those hold a file without a descriptor.
fn mapped(folder: &Path) -> BTreeSet<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps
        .lines()
        .filter_map(|line| line.split_once('/').map(|(_, p)| p));
    let paths = paths.map(|path| format!("/{}", path.trim_end_matches(" (deleted)")));
    paths.filter(|p| Path::new(p).starts_with(folder)).collect()
}

#[test]
fn a_shard_is_one_file_at_most_and_no_batch_opens_another() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap().join("latents");
    let shards = 9;
    set(&folder, shards * SHARD - 3);
    let latents = ShardedLatents::open(&folder).unwrap();
    assert_eq!(latents.index().shards.len() as u64, shards);
    let mut loader = Loader::new(Arc::new(latents), 0, 64).unwrap();
    let count = || {
        let (open, mapped) = (open(&folder), mapped(&folder));
        assert!(open.len() as u64 <= shards, "{open:?}");
        assert_eq!(mapped.len() as u64, shards, "{mapped:?}");
    };
    count();
    let rows = |loader: &mut Loader, step| {
        let batch = loader.batch(step).unwrap();
        batch.x.flatten_from(1).unwrap().to_vec2::<f32>().unwrap()
    };
    // Two epochs and more: every shard, every image.
    let before: Vec<_> = (0..5).map(|step| rows(&mut loader, step)).collect();
    count();
    // Whoever opens a file for an image fails now.
    fs::remove_dir_all(&folder).unwrap();
    for (step, before) in before.iter().enumerate() {
        assert_eq!(&rows(&mut loader, step as u64), before);
    }
    count();
}
