#![doc = include_str!("../README.md")]

pub mod hub_server;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

/// The folder of golden files.
pub fn folder() -> PathBuf {
    std::env::var_os("TINYFUSION_GOLDEN").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/golden")),
        PathBuf::from,
    )
}

/// One golden file.
pub struct Golden {
    name: String,
    tensors: std::collections::HashMap<String, Tensor>,
    /// Sizes and settings that the reference ran with.
    pub config: Value,
    /// Every metadata entry as text.
    pub metadata: BTreeMap<String, String>,
    noise: Value,
}

impl Golden {
    /// Opens `name` in the golden folder; a missing file fails the test.
    ///
    /// # Panics
    /// When the file is missing or malformed.
    pub fn open(name: &str) -> Self {
        let path = folder().join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let metadata: BTreeMap<String, String> = header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        let json = |key: &str| {
            metadata.get(key).map_or(Value::Null, |text| {
                serde_json::from_str(text)
                    .unwrap_or_else(|e| panic!("{}: {key}: {e}", path.display()))
            })
        };
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (config, noise) = (json("config"), json("f32_vs_f64"));
        Self {
            name: name.to_string(),
            tensors,
            config,
            metadata,
            noise,
        }
    }

    /// The tensor called `key` as stored.
    ///
    /// # Panics
    /// When there is none.
    pub fn tensor(&self, key: &str) -> Tensor {
        self.get(key)
            .unwrap_or_else(|| panic!("{} has no tensor `{key}`", self.name))
    }

    /// The tensor called `key`, if the file has it.
    pub fn get(&self, key: &str) -> Option<Tensor> {
        self.tensors.get(key).cloned()
    }

    /// Names of all tensors that start with `prefix`, in order.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let mut names: Vec<String> = self
            .tensors
            .keys()
            .filter(|k| k.starts_with(prefix))
            .cloned()
            .collect();
        names.sort();
        names
    }

    /// The tensors whose names start with `prefix`, that prefix removed.
    pub fn strip(&self, prefix: &str) -> Vec<(String, Tensor)> {
        self.names(prefix)
            .into_iter()
            .map(|n| (n[prefix.len()..].to_string(), self.tensor(&n)))
            .collect()
    }

    /// Integer tensor as u32, for indices.
    ///
    /// # Panics
    /// When there is none.
    pub fn ids(&self, key: &str) -> Vec<u32> {
        let flat = self
            .tensor(key)
            .to_dtype(DType::I64)
            .and_then(|t| t.flatten_all()?.to_vec1::<i64>());
        flat.unwrap_or_else(|e| panic!("`{key}`: {e}"))
            .into_iter()
            .map(|v| v as u32)
            .collect()
    }

    /// A config number.
    ///
    /// # Panics
    /// When the path is missing or not a number.
    pub fn number(&self, path: &str) -> f64 {
        let pointer = format!("/{}", path.replace('.', "/"));
        self.config
            .pointer(&pointer)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("{}: config has no number `{path}`", self.name))
    }

    /// A config size.
    pub fn size(&self, path: &str) -> usize {
        self.number(path) as usize
    }

    /// 1e-5 of the largest recorded value plus 20 times the recorded f32 noise.
    ///
    /// # Panics
    /// When the tensor is missing or holds a value that is not finite, which would allow anything.
    pub fn tolerance(&self, key: &str) -> f64 {
        let largest = largest(flat(&self.tensor(key)));
        assert!(
            largest.is_finite(),
            "{}: {key} holds values that are not finite",
            self.name
        );
        let noise = self
            .noise
            .get(key)
            .and_then(|n| n.get(0))
            .and_then(Value::as_f64)
            .unwrap_or(0.0);
        1e-5 * largest + 20.0 * noise
    }

    /// A config text.
    ///
    /// # Panics
    /// When the path is missing or not a text.
    pub fn text(&self, path: &str) -> &str {
        let pointer = format!("/{}", path.replace('.', "/"));
        self.config
            .pointer(&pointer)
            .and_then(Value::as_str)
            .unwrap_or_else(|| panic!("{}: config has no text `{path}`", self.name))
    }

    /// A table of f64, flattened.
    ///
    /// # Panics
    /// When there is none of that type.
    pub fn table(&self, key: &str) -> Vec<f64> {
        let table = self.tensor(key);
        assert_eq!(table.dtype(), DType::F64, "{}: {key}", self.name);
        flat(&table)
    }

    /// Asserts that `got` equals the recorded f64 table `key`, entry by entry, to 1e-12 of the entry.
    ///
    /// # Panics
    /// When it does not.
    pub fn close_table(&self, key: &str, got: &[f64]) {
        let want = self.table(key);
        assert_eq!(got.len(), want.len(), "{}: {key}", self.name);
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!(
                (g - w).abs() <= 1e-12 * w.abs(),
                "{}: {key}[{i}]: {g} instead of {w}",
                self.name
            );
        }
    }

    /// Asserts that `got` equals the recorded tensor `key` within [`tolerance`](Self::tolerance).
    ///
    /// # Panics
    /// When it does not.
    pub fn close(&self, key: &str, got: &Tensor) {
        self.close_within(key, got, self.tolerance(key));
    }

    /// As [`close`](Self::close) with a tolerance that the golden README states for this tensor.
    ///
    /// # Panics
    /// When the tensors differ by more.
    pub fn close_within(&self, key: &str, got: &Tensor, tolerance: f64) {
        let want = self.tensor(key);
        assert_eq!(
            got.elem_count(),
            want.elem_count(),
            "{key}: shape {:?}, recorded {:?}",
            got.dims(),
            want.dims()
        );
        let (g, w) = (flat(got), flat(&want));
        let mut differences = g.iter().zip(&w).map(|(a, b)| (a - b).abs());
        let worst = largest(differences.clone());
        let at = differences
            .position(|d| d == worst || d.is_nan())
            .unwrap_or(0);
        assert!(
            worst <= tolerance,
            "{}: {key}[{at}]: {} instead of {} (off by {worst:.3e}, allowed {tolerance:.3e})",
            self.name,
            g[at],
            w[at]
        );
    }
}

/// All values in f64.
///
/// # Panics
/// When the tensor cannot be read.
pub fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .and_then(|t| t.flatten_all()?.to_vec1())
        .expect("a readable tensor")
}

/// The largest absolute value, 0 of nothing, and not a number if any value is: `f64::max` alone passes
/// over what is not a number.
pub fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |max, v| {
        if v.is_nan() || v.abs() > max {
            v.abs()
        } else {
            max
        }
    })
}

/// The largest absolute difference of two tensors of one size; not a number if any difference is.
///
/// # Panics
/// When the sizes differ.
pub fn max_diff(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.elem_count(), b.elem_count());
    largest(flat(a).into_iter().zip(flat(b)).map(|(x, y)| x - y))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f64]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_difference_that_is_not_a_number_stays() {
        let good = row(&[1.0, 2.0, 3.0]);
        for at in 0..3 {
            let mut values = [1.0, 2.0, 3.0];
            values[at] = f64::NAN;
            let bad = row(&values);
            for (a, b) in [(&good, &bad), (&bad, &good), (&bad, &bad)] {
                assert!(max_diff(a, b).is_nan(), "at {at}");
            }
        }
        assert_eq!(max_diff(&good, &row(&[1.0, 4.5, 2.0])), 2.5);
        assert_eq!(largest([]), 0.0);
    }

    fn golden(values: &[f64]) -> Golden {
        Golden {
            name: "made".into(),
            tensors: [("a".to_string(), row(values))].into(),
            config: Value::Null,
            metadata: BTreeMap::new(),
            noise: Value::Null,
        }
    }

    fn panics(run: impl Fn() + std::panic::UnwindSafe) -> bool {
        std::panic::catch_unwind(run).is_err()
    }

    #[test]
    fn close_refuses_other_values_and_what_is_not_finite() {
        let values = [1.0, 2.0, 3.0];
        golden(&values).close("a", &row(&values));
        golden(&values).close_table("a", &values);
        for other in [2.001, f64::NAN, f64::INFINITY] {
            for at in 0..3 {
                let mut got = values;
                got[at] = other;
                assert!(panics(move || golden(&values).close("a", &row(&got))));
                assert!(panics(move || golden(&values).close_table("a", &got)));
                // A recorded infinity must not make the tolerance infinite.
                if !other.is_finite() {
                    assert!(panics(move || golden(&got).close("a", &row(&values))));
                }
            }
        }
        assert!(panics(
            move || golden(&values).close("a", &row(&values[..2]))
        ));
        assert!(panics(
            move || golden(&values).close_table("a", &values[..2])
        ));
    }
}
