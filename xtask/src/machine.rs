//! Where numbers come from.

use std::process::Command;

use tinyfusion_report::Machine;

/// This machine, asked in the present folder, which is the repository's root, before a run of this binary.
///
/// The commit is that of a binary that was `built` here; what another one was built from is not known.
pub(crate) fn of_here(binary_sha256: &str, built: bool) -> Machine {
    let proc = |file: &str, key: &str| -> Option<String> {
        let text = std::fs::read_to_string(file).ok()?;
        let line = text.lines().find(|l| l.starts_with(key))?;
        Some(
            line.split_once([':', '='])?
                .1
                .trim()
                .trim_matches('"')
                .to_string(),
        )
    };
    let output = |program: &str, args: &[&str]| -> Option<String> {
        let out = Command::new(program).args(args).output().ok()?;
        out.status
            .success()
            .then(|| String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let git = |args: &[&str]| output("git", args).filter(|_| built);
    let memory = proc("/proc/meminfo", "MemTotal");
    Machine {
        cpu: proc("/proc/cpuinfo", "model name"),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory
            .and_then(|m| Some(m.trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)),
        os: proc("/etc/os-release", "PRETTY_NAME").unwrap_or_else(|| std::env::consts::OS.into()),
        rustc: output("rustc", &["--version"]),
        git_commit: git(&["rev-parse", "HEAD"]),
        git_dirty: git(&["status", "--porcelain"]).map(|s| !s.is_empty()),
        binary_sha256: binary_sha256.into(),
    }
}

/// Where something was measured, in a line.
pub(crate) fn place(m: &Machine) -> String {
    let mut parts = vec![
        m.cpu
            .as_deref()
            .unwrap_or("an unnamed processor")
            .to_owned(),
        format!("{} cores", m.cores),
        m.os.clone(),
    ];
    parts.extend(m.rustc.clone());
    if let Some(commit) = &m.git_commit {
        let changed = if m.git_dirty == Some(true) {
            ", changed"
        } else {
            ""
        };
        parts.push(format!(
            "commit {}{changed}",
            &commit[..commit.len().min(12)]
        ));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        let machine = of_here("abc", false);
        assert!(machine.git_commit.is_none() && machine.git_dirty.is_none());
        assert!(machine.cores > 0 && !machine.os.is_empty());
        assert!(machine.rustc.is_some_and(|r| r.starts_with("rustc ")));
    }
}
