//! Runs the binary `tinyfusion` as a user would; shared by the workspace's tests.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use tempfile::TempDir;
use tinyfusion::fid::Inception;

/// The binary, built once per test process (a no-op when it is fresh).
///
/// # Panics
/// When it does not build.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo tells a test of its package, build scripts (ring's) would take for a change, and everything behind
        // them be compiled again in every test run.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                cargo.env_remove(&name);
            }
        }
        let output = cargo
            .args([
                "build",
                "--release",
                // Of the whole workspace, so that candle is built once: features are those of all packages selected.
                "--workspace",
                "--bin",
                "tinyfusion",
                "--message-format",
                "json",
            ])
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "the binary does not build");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
            .filter(|m| m["reason"] == "compiler-artifact" && m["target"]["name"] == "tinyfusion")
            .find_map(|m| m["executable"].as_str().map(PathBuf::from))
            .expect("cargo names the executable")
    })
}

/// A folder in which one test runs its commands.
pub struct Place(TempDir);

impl Place {
    /// An empty one.
    ///
    /// # Panics
    /// When there is no temporary folder.
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `tinyfusion` with `line`'s words as arguments, run here.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(binary());
        command
            .current_dir(self.0.path())
            .args(line.split_whitespace());
        command
    }

    /// Runs `line` and returns what happened.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().expect("the binary starts")
    }

    /// Runs `line`, which must succeed; its standard output.
    ///
    /// # Panics
    /// When it fails.
    pub fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(
            output.status.success(),
            "{line}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `line`, which must fail with `code` and one error on standard error; that text.
    ///
    /// # Panics
    /// When it does not.
    pub fn fails(&self, code: i32, line: &str) -> String {
        let output = self.run(line);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{line}\n{text}");
        assert!(!text.contains("panicked"), "{line}\n{text}");
        let errors = text.lines().filter(|l| l.starts_with("error")).count();
        assert_eq!(errors, 1, "one clear error: {line}\n{text}");
        text
    }

    /// Starts `line` in the background, quietly.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&self, line: &str) -> Child {
        self.command(line)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts")
    }

    /// The JSON in a file.
    ///
    /// # Panics
    /// When it is missing or not JSON.
    pub fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.text(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The text of a file.
    ///
    /// # Panics
    /// When it is missing.
    pub fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The bytes of a file.
    ///
    /// # Panics
    /// When it is missing.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// A teacher of four narrow blocks in `teacher/model`, barely trained.
    pub fn with_teacher() -> Self {
        let place = Self::new();
        place.ok(&format!("pretrain teacher --steps 8 {TINY}"));
        place
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

/// Flags of `pretrain` for a network that trains in milliseconds.
pub const TINY: &str =
    "--depth 4 --hidden-size 16 --num-heads 2 --patch-size 8 --batch-size 8 --seed 1";

/// Names under `folder` that end in `.partial`, at any depth.
///
/// # Panics
/// When a folder cannot be read.
pub fn partials(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|e| e == "partial") {
            found.push(path.clone());
        }
        if path.is_dir() {
            found.extend(partials(&path));
        }
    }
    found
}

/// Writes an Inception, 95 MB, whose weights are a formula.
///
/// # Panics
/// When it cannot be written.
pub fn inception_weights(path: &Path) {
    candle_core::safetensors::save(&inception_tensors(), path).expect("room for 95 MB");
}

/// The tensors of [`inception_weights`].
///
/// # Panics
/// Never: shapes and values are made for each other.
pub fn inception_tensors() -> HashMap<String, Tensor> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let count: usize = shape.iter().product();
        let width = (shape[1..].iter().product::<usize>() as f32).sqrt();
        let wave =
            |i: usize| (((i * 7919 + name.len()) % 10_007) as f32 / 10_007.0 - 0.5) / width * 4.0;
        let variance = name.ends_with("running_var");
        let value = |i: usize| if variance { 1.0 } else { wave(i) };
        let values: Vec<f32> = (0..count).map(value).collect();
        let tensor =
            Tensor::from_vec(values, shape, &Device::Cpu).expect("as many as the shape says");
        (name, tensor)
    };
    Inception::tensors().into_iter().map(tensor).collect()
}
