//! A batch from shards takes as many allocations as it has parts, not as it has images.

#![allow(clippy::unwrap_used)] // a test may panic

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor};
use tinyfusion_core::LatentBatch;
use tinyfusion_data::{
    LatentContent, LatentIndex, Loader, NpyLatents, ShardWriter, ShardedLatents, Source,
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it is.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps what `GlobalAlloc` asks of it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above; the memory came from `System`.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SHAPE: [usize; 3] = [4, 4, 4];
const FEW: usize = 64;
const MANY: usize = 2048;
/// Between batches of [`FEW`] and of [`MANY`]: threads that share a longer list split it some times more, and each part has a scratch.
const SLACK: u64 = 150;

fn shards(dir: &tempfile::TempDir, content: LatentContent) -> ShardedLatents {
    let images = 2 * MANY;
    let index = LatentIndex {
        flips: true,
        shard_images: 512,
        ..LatentIndex::new(content, SHAPE, 10, images as u64)
    };
    let [v, h, w] = index.row_shape();
    let batch = LatentBatch {
        x: Tensor::zeros((images, v, h, w), candle_core::DType::F32, &Device::Cpu).unwrap(),
        y: Tensor::zeros(images, candle_core::DType::U32, &Device::Cpu).unwrap(),
    };
    let mut writer = ShardWriter::open(dir.path(), &index).unwrap();
    writer.push(&batch).unwrap();
    writer.finish().unwrap();
    ShardedLatents::open(dir.path()).unwrap()
}

/// The least allocations of a batch; other threads of the test program may add some.
fn of_a_batch(source: &Arc<dyn Source>, size: usize) -> u64 {
    let mut loader = Loader::new(source.clone(), 0, size).unwrap();
    // The first draws the epoch's order and begins the threads.
    loader.batch(0).unwrap();
    let counts = (1..6).map(|step| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        loader.batch(step % 2).unwrap();
        ALLOCATIONS.load(Ordering::Relaxed) - before
    });
    counts.min().unwrap()
}

fn npy(path: &std::path::Path, kind: &str, shape: &str, bytes: &[u8]) {
    let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut text = b"\x93NUMPY\x01\x00".to_vec();
    text.extend((header.len() as u16).to_le_bytes());
    text.extend(header.as_bytes());
    text.extend(bytes);
    std::fs::write(path, text).unwrap();
}

/// A source that opens two files for every image, as a control: the counter sees what it is for.
fn a_file_for_every_image(dir: &tempfile::TempDir) -> NpyLatents {
    let [features, labels] = ["a_features", "a_labels"].map(|name| dir.path().join(name));
    for folder in [&features, &labels] {
        std::fs::create_dir(folder).unwrap();
    }
    for i in 0..MANY {
        let name = format!("{i}.npy");
        npy(&features.join(&name), "<f4", "(1, 1, 1, 1)", &[0; 4]);
        npy(&labels.join(&name), "<i8", "(1,)", &[0; 8]);
    }
    NpyLatents::open(dir.path(), 1).unwrap()
}

// One test: a second one would allocate beside it.
#[test]
fn allocations_of_a_batch_do_not_grow_with_its_images() {
    for content in [LatentContent::Moments, LatentContent::Samples] {
        let dir = tempfile::tempdir().unwrap();
        let source: Arc<dyn Source> = Arc::new(shards(&dir, content));
        let [few, many] = [FEW, MANY].map(|size| of_a_batch(&source, size));
        assert!(
            many <= few + SLACK,
            "{content:?}: {few} allocations for {FEW} images, {many} for {MANY}"
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let source: Arc<dyn Source> = Arc::new(a_file_for_every_image(&dir));
    let many = of_a_batch(&source, MANY);
    assert!(many > MANY as u64, "{many} for {MANY} images");
}
