use std::path::Path;

use tinyfusion_core::{Error, Result};

/// An error where `bytes` do not fit on the disk under `folder` (which need not be there yet): said before hours of work
/// or a download, not at their end. `advice` ends the message. Where the system does not tell, nothing is refused.
pub fn require_space(folder: impl AsRef<Path>, bytes: u64, advice: &str) -> Result<()> {
    let folder = folder.as_ref();
    match free_space(folder) {
        Some(free) if free < bytes => Err(Error::file(
            folder,
            format!(
                "{} are needed, {} are free on its disk; {advice}",
                size(bytes),
                size(free)
            ),
        )),
        _ => Ok(()),
    }
}

/// Bytes that can be written below `folder`, or below the nearest folder above it that is there.
pub fn free_space(folder: impl AsRef<Path>) -> Option<u64> {
    let absolute = std::path::absolute(folder).ok()?;
    let there = absolute.ancestors().find(|f| f.exists())?;
    available(there)
}

#[cfg(unix)]
fn available(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn available(_folder: &Path) -> Option<u64> {
    None
}

fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b => format!("{:.1} MB", b / 1e6),
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_and_what_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("not/yet/there");
        require_space(&below, 1, "").unwrap();
        let error = require_space(&below, u64::MAX, "take another disk").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("not/yet/there") && text.contains("take another disk"),
            "{text}"
        );
    }
}
