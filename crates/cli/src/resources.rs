use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
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

/// How many files of a folder this process holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct FilesHeld {
    /// Open descriptors.
    pub(crate) open_files: usize,
    /// Files mapped into memory, which hold no descriptor.
    pub(crate) mapped_files: usize,
}

impl FilesHeld {
    /// Of a folder without links in its path, where the system tells (Linux).
    pub(crate) fn of(folder: &Path) -> Option<Self> {
        let links = std::fs::read_dir("/proc/self/fd").ok()?.flatten();
        let open = links.filter_map(|link| std::fs::read_link(link.path()).ok());
        let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
        let mapped = mapped(&maps, folder);
        Some(Self {
            open_files: open.filter(|path| path.starts_with(folder)).count(),
            mapped_files: mapped,
        })
    }

    /// The larger of both counts.
    pub(crate) fn most(self, other: Self) -> Self {
        Self {
            open_files: self.open_files.max(other.open_files),
            mapped_files: self.mapped_files.max(other.mapped_files),
        }
    }
}

/// Files under `folder` in the lines `addresses permissions offset device inode /path`; a file may have several.
fn mapped(maps: &str, folder: &Path) -> usize {
    let path = |line: &'_ str| line.find('/').map(|at| line[at..].to_string());
    let files: BTreeSet<String> = maps.lines().filter_map(path).collect();
    let inside = |file: &&String| Path::new(file).starts_with(folder);
    files.iter().filter(inside).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_is_counted_once() {
        let maps = "7f00-7f10 r--s 00000000 fe:00 11  /a/b/shard-0\n7f10-7f20 r--s 00001000 fe:00 11  /a/b/shard-0\n\
                    7f20-7f30 r--s 00000000 fe:00 12  /a/b/shard-1\n7f30-7f40 r--p 00000000 fe:00 13  /a/bc/other\n7f40-7f50 rw-p 0 0 0\n";
        assert_eq!(mapped(maps, Path::new("/a/b")), 2);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_open_file_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().canonicalize().unwrap();
        let none = FilesHeld::of(&folder).unwrap();
        let _file = std::fs::File::create(folder.join("x")).unwrap();
        let one = FilesHeld::of(&folder).unwrap();
        assert_eq!((none.open_files, one.open_files), (0, 1));
        assert_eq!(none.most(one), one);
    }
}
