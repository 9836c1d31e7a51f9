//! What headers claim is not allocated, and statistics that stream take no more memory for more images. A binary of its
//! own, for its allocator counts.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy exempts only the test functions themselves"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use tinyfusion_fid::{ImageFeatures, Npz, Sink, StatisticsSums, StoredStatistics, read_tensors};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// One measurement at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Counting;

// SAFETY: every call goes to the system's allocator with the arguments it came with; counting touches no memory of it.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), SeqCst) + layout.size();
        PEAK.fetch_max(now, SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that stood in memory at most while `work` ran, beyond those before.
fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.load(SeqCst);
    PEAK.store(before, SeqCst);
    let result = work();
    (result, PEAK.load(SeqCst).saturating_sub(before))
}

/// Every file below `folder` whose name has one of these endings.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|e| endings.contains(&e.to_str().unwrap()))
        })
        .collect();
    all.sort();
    assert!(!all.is_empty(), "{}", folder.display());
    all
}

fn golden(name: &str) -> PathBuf {
    std::env::var_os("TINYFUSION_GOLDEN")
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/golden"),
            PathBuf::from,
        )
        .join(name)
}

/// A buffer of the reader has 1 MiB and unpacking some hundred KiB; one batch of the largest image here is 1 MiB.
const OVERHEAD: usize = 4 << 20;

#[test]
fn no_file_makes_the_npz_reader_allocate_what_it_claims() {
    let _alone = ALONE.lock();
    let mut bombs = 0;
    for path in files(&golden("npz"), &["npz"]) {
        let size = std::fs::metadata(&path).unwrap().len() as usize;
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let mut unpacked = 0usize;
        let (_, peak) = peak(|| -> tinyfusion_fid::Result<()> {
            let mut file = Npz::open(&path)?;
            drop(StoredStatistics::read(&mut file));
            file.for_each_batch("arr_0", 4, &mut |images| {
                unpacked += images.len();
                Ok(())
            })
        });
        bombs += usize::from(unpacked > 100 * size);
        assert!(
            peak <= OVERHEAD + 8 * size,
            "{name}: {peak} bytes for a file of {size} with {unpacked} bytes of images"
        );
    }
    assert!(bombs > 0, "no file unpacks to a hundred times its size");
}

#[test]
fn no_file_makes_the_weight_reader_allocate_what_it_claims() {
    let _alone = ALONE.lock();
    let hostile = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/pth");
    for folder in [golden("pth"), hostile] {
        for path in files(&folder, &["pth", "safetensors"]) {
            let bytes = std::fs::read(&path).unwrap();
            let (_, peak) = peak(|| drop(read_tensors(&bytes)));
            let name = path.display();
            assert!(
                peak <= OVERHEAD + 8 * bytes.len(),
                "{name}: {peak} bytes for a file of {}",
                bytes.len()
            );
        }
    }
}

#[test]
fn streamed_statistics_take_no_more_memory_for_more_images() {
    let _alone = ALONE.lock();
    let mut sums = StatisticsSums::new(false).unwrap();
    let mut image = ImageFeatures {
        pool: vec![0.5; ImageFeatures::POOL],
        spatial: Vec::new(),
        logits: Vec::new(),
    };
    let mut run = |images: usize| {
        let ((), peak) = peak(|| {
            for index in 0..images {
                image.pool[index % ImageFeatures::POOL] += 1.0;
                sums.take(&image).unwrap();
            }
        });
        peak
    };
    let first = run(1024 + 100);
    let then = run(3 * 1024);
    // A block in f64, and what its product packs; the features alone would be 25 MB.
    assert!(then <= first + (1 << 20), "{first}, then {then}");
    assert_eq!(sums.n(), 4 * 1024 + 100);
}
