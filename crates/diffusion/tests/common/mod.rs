//! Reading golden files and comparing with them.
#![allow(dead_code)] // every test binary uses its own part

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tinyfusion_diffusion::GaussianDiffusion;

/// A golden file: tensors, the settings they were made with and the rounding noise of the reference.
pub(crate) struct Golden {
    tensors: HashMap<String, Tensor>,
    pub(crate) config: Value,
    noise: Value,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let folder = std::env::var_os("TINYFUSION_GOLDEN").map_or_else(
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/golden")),
            PathBuf::from,
        );
        let path = folder.join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().expect("metadata");
        let json = |key: &str| serde_json::from_str(&metadata[key]).unwrap();
        Self {
            config: json("config"),
            noise: json("f32_vs_f64"),
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap(),
        }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("no tensor `{name}`"))
            .clone()
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        self.get(name)
            .to_dtype(DType::U32)
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    pub(crate) fn table(&self, name: &str) -> Vec<f64> {
        self.get(name).to_vec1().unwrap()
    }

    pub(crate) fn text(&self, path: &str) -> &str {
        self.config
            .pointer(path)
            .and_then(Value::as_str)
            .unwrap_or_else(|| panic!("no text {path} in config"))
    }

    pub(crate) fn number(&self, path: &str) -> f64 {
        self.config
            .pointer(path)
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("no number {path} in config"))
    }

    /// |got − want| ≤ 1e-5·max|want| + 20·(the reference's own rounding noise), where `got` may have fewer
    /// entries that broadcast.
    pub(crate) fn check(&self, name: &str, got: &Tensor) {
        let want = self.get(name);
        let got = got
            .broadcast_as(want.shape())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let flat = |t: &Tensor| {
            t.to_dtype(DType::F64)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        let (got, want) = (flat(&got), flat(&want));
        let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let noise = self.noise[name][0].as_f64().unwrap_or(0.0);
        let tolerance = 1e-5 * largest + 20.0 * noise;
        let worst = got
            .iter()
            .zip(&want)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0f64, |m, d| {
                assert!(!d.is_nan(), "{name}: not a number");
                m.max(d)
            });
        assert!(
            worst <= tolerance,
            "{name}: off by {worst:e}, allowed {tolerance:e}, largest value {largest:e}"
        );
    }

    /// As [`check`](Self::check) for f64 tables: 1e-12 relative, per entry.
    pub(crate) fn check_table(&self, name: &str, got: &[f64]) {
        let want = self.table(name);
        assert_eq!(got.len(), want.len(), "{name}");
        for (i, (a, b)) in got.iter().zip(&want).enumerate() {
            assert!(
                (a - b).abs() <= 1e-12 * b.abs(),
                "{name}[{i}]: {a} instead of {b}"
            );
        }
    }
}

/// The first channels of a network output, as many as the process wants for samples of `channels`.
pub(crate) fn output_for(
    diffusion: &GaussianDiffusion,
    channels: usize,
    output: &Tensor,
) -> Tensor {
    output
        .narrow(1, 0, diffusion.output_channels(channels))
        .unwrap()
}
