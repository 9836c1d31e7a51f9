//! How decoded pixels differ from Pillow's, which torch-fidelity and pytorch-fid read files with.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy exempts only the test functions themselves"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Npz;
use super::folder::Folder;

/// What was seen of one kind of file.
#[derive(Default)]
struct Seen {
    files: usize,
    values: usize,
    /// Values by the size of their difference, in grey levels.
    levels: BTreeMap<u8, usize>,
}

impl Seen {
    fn largest(&self) -> u8 {
        self.levels.last_key_value().map_or(0, |(level, _)| *level)
    }

    /// Share of values that are further off than `level`.
    fn beyond(&self, level: u8) -> f64 {
        let beyond: usize = self.levels.range(level + 1..).map(|(_, n)| n).sum();
        beyond as f64 / self.values as f64
    }

    fn mean(&self) -> f64 {
        let sum: f64 = self
            .levels
            .iter()
            .map(|(&level, &n)| f64::from(level) * n as f64)
            .sum();
        sum / self.values as f64
    }
}

fn compare(folder: &Path) -> BTreeMap<String, Seen> {
    let mut pillow = Npz::open(folder.join("pillow.npz")).unwrap();
    let names: Vec<String> = pillow.names().map(str::to_owned).collect();
    assert!(!names.is_empty());
    let mut kinds: BTreeMap<String, Seen> = BTreeMap::new();
    for name in names {
        let (shape, expected) = pillow.bytes(&name).unwrap();
        // A folder has one size, so each file gets one to itself.
        let alone = tempfile::tempdir().unwrap();
        std::fs::copy(folder.join(&name), alone.path().join(&name)).unwrap();
        let set = Folder::open(alone.path()).unwrap();
        assert_eq!(shape, [set.size()[0], set.size()[1], 3], "{name}");
        let found = set.decode(0).unwrap();
        let kind = name.rsplit_once('-').unwrap().0;
        let seen = kinds.entry(kind.to_owned()).or_default();
        seen.files += 1;
        seen.values += found.len();
        for (a, b) in found.iter().zip(&expected) {
            *seen.levels.entry(a.abs_diff(*b)).or_default() += 1;
        }
    }
    kinds
}

#[test]
fn golden_decode_against_pillow() {
    let folder = std::env::var_os("TINYFUSION_DECODE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/decode"),
        PathBuf::from,
    );
    for (kind, seen) in compare(&folder) {
        println!(
            "{kind}: {} files, {} values: differ {:.3} %, by more than one level {:.4} %, largest {}, mean {:.5}",
            seen.files,
            seen.values,
            100.0 * seen.beyond(0),
            100.0 * seen.beyond(1),
            seen.largest(),
            seen.mean(),
        );
        // As measured on 20 photograph-like images of up to 500 x 500 of each kind (PRECISION.md): JPEG leaves the rounding of
        // the inverse transform and the way colours are enlarged to the decoder, the other formats leave nothing.
        let (largest, mean) = match kind.as_str() {
            "jpeg-grey" => (1, 0.02),
            "jpeg-444-q95" => (3, 0.03),
            _ if kind.starts_with("jpeg-4") => (12, 0.5),
            _ => (0, 0.0),
        };
        assert!(seen.largest() <= largest, "{kind}: {}", seen.largest());
        assert!(seen.mean() <= mean, "{kind}: {}", seen.mean());
    }
}
