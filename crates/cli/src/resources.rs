use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;
use tinyfusion::checkpoint::write_atomic;

/// Time and memory that a command took, written beside its results as `resources.json`.
pub(crate) struct Resources(Instant);

impl Resources {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// `trained` are the seconds of a resumable training over all its parts, which replace the clock's.
    pub(crate) fn write(&self, folder: &Path, trained: Option<f64>) -> Result<()> {
        let report = json!({
            "seconds": trained.unwrap_or_else(|| self.0.elapsed().as_secs_f64()),
            "peak_rss_bytes": peak_rss(),
            "threads": rayon::current_num_threads(),
        });
        Ok(write_atomic(folder.join("resources.json"), |f| {
            f.write_all(format!("{report:#}\n").as_bytes())
        })?)
    }
}

/// The largest resident memory of this process so far, where the system tells (Linux).
pub(crate) fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}
