//! What the tests share: settings for a loopback hub, and a watcher.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tinyfusion_hub::{HubPath, Progress, Settings};
use tinyfusion_testing::hub_server::{HubServer, Seen, Storage};

pub(crate) const REPO: &str = "facebook/tiny-dit";

/// A hub, and an empty cache.
pub(crate) struct World {
    pub(crate) server: HubServer,
    pub(crate) home: TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            server: HubServer::start(),
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// A hub with [`REPO`] at `main`: a small file, a large one in a folder, an empty one. Returns the commit too.
    pub(crate) fn with_model() -> (Self, String) {
        let world = Self::new();
        let commit = world.server.commit(
            REPO,
            "main",
            &[
                ("README.md", b"# tiny", Storage::Git),
                ("empty.txt", b"", Storage::Git),
                ("transformer/config.json", CONFIG, Storage::Git),
                ("transformer/model.safetensors", &weights(), Storage::Lfs),
            ],
        );
        (world, commit)
    }

    /// Settings for this hub and cache: nothing of the process's environment, and no long waits.
    pub(crate) fn settings(&self) -> Settings {
        let mut settings = Settings::new(self.cache()).unwrap();
        settings.endpoint = self.server.endpoint();
        settings.retries = 2;
        settings.backoff = Duration::from_millis(1);
        settings.read_timeout = Duration::from_secs(10);
        settings
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.home.path().join("hub")
    }

    /// The repository's folder in the cache.
    pub(crate) fn repo(&self) -> PathBuf {
        self.cache().join("models--facebook--tiny-dit")
    }

    /// `GET`s since the last call, of the hub's and the CDN's files.
    pub(crate) fn downloads(&self) -> Vec<Seen> {
        let seen = self.server.seen();
        seen.into_iter()
            .filter(|s| s.method == "GET" && !s.path.starts_with("/api/"))
            .collect()
    }
}

pub(crate) const CONFIG: &[u8] = b"{\"num_layers\": 2}";

/// Three pieces' worth of bytes that repeat only after a long while.
pub(crate) fn weights() -> Vec<u8> {
    (0..700_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

pub(crate) fn path(text: &str) -> HubPath {
    text.parse().unwrap()
}

/// `hub://` and [`REPO`] and this.
pub(crate) fn in_repo(rest: &str) -> HubPath {
    path(&format!("hub://{REPO}{rest}"))
}

/// Notes what it is told; stops when the file has so many bytes.
#[derive(Default)]
pub(crate) struct Watch {
    pub(crate) planned: Option<(usize, u64)>,
    pub(crate) files: Vec<(String, u64)>,
    pub(crate) at: Vec<u64>,
    pub(crate) done: usize,
    pub(crate) stop_at: Option<u64>,
}

impl Progress for Watch {
    fn plan(&mut self, files: usize, bytes: u64) {
        self.planned = Some((files, bytes));
    }

    fn file(&mut self, name: &str, bytes: u64) {
        self.files.push((name.to_owned(), bytes));
    }

    fn at(&mut self, bytes: u64) {
        self.at.push(bytes);
    }

    fn done(&mut self) {
        self.done += 1;
    }

    fn stop(&self) -> bool {
        match (self.stop_at, self.at.last()) {
            (Some(limit), Some(at)) => *at >= limit,
            _ => false,
        }
    }
}

/// Every file below `folder`, relative, sorted.
pub(crate) fn tree(folder: &Path) -> Vec<String> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                walk(root, &path, found);
            } else {
                let relative = path.strip_prefix(root).unwrap();
                found.push(relative.to_str().unwrap().replace('\\', "/"));
            }
        }
    }
    let mut found = Vec::new();
    if folder.exists() {
        walk(folder, folder, &mut found);
    }
    found.sort();
    found
}
