//! A folder to run the driver in, with a stand-in for the binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder with models, a preset and the stand-in.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::of("tiny")
    }

    /// With one of the presets in assets/presets.
    pub(crate) fn of(preset: &str) -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        for model in ["teacher", "classifier"] {
            fs::create_dir_all(bench.path(model)).unwrap();
            fs::write(bench.path(model).join("model.safetensors"), model).unwrap();
            fs::write(bench.path(model).join("config.json"), r#"{"depth":16}"#).unwrap();
        }
        let presets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/presets");
        let preset = fs::read_to_string(presets.join(format!("{preset}.toml"))).unwrap();
        let absolute = preset.replace("assets/", &format!("{}/", bench.dir.path().display()));
        fs::write(bench.path("preset.toml"), absolute).unwrap();
        let mut grid = image::RgbImage::new(329, 329);
        for (x, y, pixel) in grid.enumerate_pixels_mut() {
            *pixel = image::Rgb([
                (x * 7 % 256) as u8,
                (y * 5 % 256) as u8,
                (x / 33 * 25) as u8,
            ]);
        }
        grid.save(bench.path("grid.png")).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, env: &[(&str, &str)], extra: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command
            .args([
                "reproduce",
                "--preset",
                "preset.toml",
                "--out",
                "out",
                "--binary",
            ])
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/fake/tinyfusion.sh"
            ))
            .args(extra)
            .current_dir(self.dir.path())
            .env("FAKE_CALLS", self.path("calls"))
            .env("FAKE_GRID", self.path("grid.png"))
            .envs(env.iter().copied());
        command
    }

    pub(crate) fn run(&self, env: &[(&str, &str)], extra: &[&str]) -> Output {
        self.command(env, extra).output().unwrap()
    }

    /// The calls since the last time this was asked.
    pub(crate) fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        fs::remove_file(self.path("calls")).ok();
        text.lines().map(String::from).collect()
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn succeeded(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}\n{}",
        stdout(output),
        String::from_utf8_lossy(&output.stderr)
    );
    stdout(output)
}

pub(crate) fn has(path: &Path, parts: &[&str]) {
    let text = fs::read_to_string(path).unwrap();
    for part in parts {
        assert!(text.contains(part), "{} lacks {part}", path.display());
    }
}
