//! A golden file: tensors by name, cases found in the file itself, so that files with other sizes and
//! seeds run through the same tests.
//!
//! A reader of its own beside `tinyfusion_testing::Golden`: that one reads tensors of candle, which this crate
//! and its tests do without, and has one tolerance, that of f32 networks; here every f64 value states its own.

use std::{collections::HashMap, path::PathBuf};

use safetensors::{Dtype, SafeTensors};
use tinyfusion_fid::FeatureMatrix;

/// The folder of golden files.
pub(crate) fn folder() -> PathBuf {
    std::env::var_os("TINYFUSION_GOLDEN").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/golden")),
        PathBuf::from,
    )
}

pub(crate) struct Golden {
    bytes: Vec<u8>,
    pub(crate) metadata: HashMap<String, String>,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let path = folder().join(name);
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap_or_default();
        Self { bytes, metadata }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.tensors().tensor(key).is_ok()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let tensors = self.tensors();
        let names = tensors.names();
        names.into_iter().map(str::to_owned).collect()
    }

    /// Shape and bytes.
    pub(crate) fn stored(&self, key: &str) -> (Vec<usize>, Vec<u8>) {
        let tensors = self.tensors();
        let tensor = tensors.tensor(key).unwrap();
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    /// The names before `suffix`, sorted; never none, so that a renamed file cannot pass unseen.
    pub(crate) fn cases_with(&self, suffix: &str) -> Vec<String> {
        let mut cases: Vec<String> = self
            .tensors()
            .names()
            .iter()
            .filter_map(|name| name.strip_suffix(suffix).map(str::to_owned))
            .collect();
        cases.sort();
        assert!(!cases.is_empty(), "no tensor is named *{suffix}");
        cases
    }

    fn raw<const BYTES: usize>(&self, key: &str, dtype: Dtype) -> (Vec<[u8; BYTES]>, Vec<usize>) {
        let tensors = self.tensors();
        let tensor = tensors
            .tensor(key)
            .unwrap_or_else(|error| panic!("{key}: {error}"));
        assert_eq!(tensor.dtype(), dtype, "{key}");
        let values = tensor
            .data()
            .chunks_exact(BYTES)
            .map(|bytes| bytes.try_into().unwrap())
            .collect();
        (values, tensor.shape().to_vec())
    }

    pub(crate) fn f64s(&self, key: &str) -> Vec<f64> {
        self.raw(key, Dtype::F64)
            .0
            .into_iter()
            .map(f64::from_le_bytes)
            .collect()
    }

    pub(crate) fn f32s(&self, key: &str) -> Vec<f32> {
        self.raw(key, Dtype::F32)
            .0
            .into_iter()
            .map(f32::from_le_bytes)
            .collect()
    }

    pub(crate) fn bytes_of(&self, key: &str) -> Vec<u8> {
        self.raw::<1>(key, Dtype::U8)
            .0
            .into_iter()
            .flatten()
            .collect()
    }

    /// The one value of a tensor.
    pub(crate) fn f64(&self, key: &str) -> f64 {
        let values = self.f64s(key);
        assert_eq!(values.len(), 1, "{key}");
        values[0]
    }

    /// Indices, by rows of the last dimension.
    pub(crate) fn indices(&self, key: &str) -> Vec<Vec<usize>> {
        let (values, shape) = self.raw(key, Dtype::I64);
        let values: Vec<usize> = values
            .into_iter()
            .map(|bytes| usize::try_from(i64::from_le_bytes(bytes)).unwrap())
            .collect();
        values
            .chunks_exact(*shape.last().unwrap())
            .map(<[usize]>::to_vec)
            .collect()
    }

    pub(crate) fn flags(&self, key: &str) -> Vec<bool> {
        self.raw::<1>(key, Dtype::U8)
            .0
            .into_iter()
            .map(|[byte]| byte != 0)
            .collect()
    }

    pub(crate) fn matrix(&self, key: &str) -> Matrix {
        let (values, shape) = self.raw(key, Dtype::F32);
        assert_eq!(shape.len(), 2, "{key}");
        Matrix {
            values: values.into_iter().map(f32::from_le_bytes).collect(),
            rows: shape[0],
            columns: shape[1],
        }
    }
}

#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) values: Vec<f32>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl Matrix {
    pub(crate) fn view(&self) -> FeatureMatrix<'_> {
        FeatureMatrix::new(&self.values, self.rows, self.columns).unwrap()
    }
}

/// Says how far off `what` is: with `--no-capture` the numbers of PRECISION.md. `scale` is what it is relative to.
#[track_caller]
fn measured(what: &str, error: f64, scale: f64) {
    let at = std::panic::Location::caller();
    let file = at.file().rsplit('/').next().unwrap_or_default();
    let relative = if error == 0.0 { 0.0 } else { error / scale };
    println!(
        "measured {file}:{} {what}: off by {error:.1e}, relative {relative:.1e}",
        at.line()
    );
}

/// |found − expected| <= absolute + relative·|expected|.
#[track_caller]
pub(crate) fn close(what: &str, found: f64, expected: f64, relative: f64, absolute: f64) {
    let error = (found - expected).abs();
    measured(what, error, expected.abs());
    assert!(
        error <= absolute + relative * expected.abs(),
        "{what}: found {found:e}, expected {expected:e}, off by {error:e}"
    );
}

/// [`close`] for every entry, relative to the largest.
#[track_caller]
pub(crate) fn all_close(what: &str, found: &[f64], expected: &[f64], relative: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected
        .iter()
        .fold(0.0f64, |largest, value| largest.max(value.abs()));
    let errors = || found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    measured(what, errors().fold(0.0, f64::max), largest);
    for (i, error) in errors().enumerate() {
        assert!(
            error <= relative * largest,
            "{what}[{i}]: found {:e}, expected {:e}, off by {error:e}",
            found[i],
            expected[i]
        );
    }
}
