//! What else runs on the machine while a case is timed: a busy machine hurts programs unequally.
//!
//! From /proc; where that is not, nothing is known and nothing is said.

use std::fs;

/// The kernel tells processor time in hundredths of a second, on every architecture.
const TICKS: f64 = 100.0;

/// Processor seconds of the whole machine in use since it started, those taken by the host included.
fn machine() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    in_use(text.lines().next()?)
}

/// `cpu user nice system idle iowait irq softirq steal …`
fn in_use(line: &str) -> Option<f64> {
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|n| n.parse().ok())
        .collect();
    let busy = [0, 1, 2, 5, 6, 7].map(|i| ticks.get(i).copied());
    busy.into_iter().sum::<Option<f64>>().map(|t| t / TICKS)
}

/// Processor seconds of a process and of its children that have ended.
fn process(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    of_process(&text)
}

fn of_process(stat: &str) -> Option<f64> {
    // The name, in brackets, may hold anything; the 3rd field comes after it.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: Vec<f64> = fields
        .split_whitespace()
        .skip(14 - 3)
        .take(4)
        .map_while(|n| n.parse().ok())
        .collect();
    (ticks.len() == 4).then(|| ticks.iter().sum::<f64>() / TICKS)
}

/// Resident memory of a process in bytes.
pub(crate) fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Processor seconds that others have used: everyone but this process and `workers`.
///
/// A difference of two such readings is what counts; a single one includes what `workers` did not do.
pub(crate) fn others(workers: impl Iterator<Item = u32>) -> Option<f64> {
    let own = std::iter::once(std::process::id()).chain(workers);
    let used: Option<f64> = own.map(process).sum();
    Some(machine()? - used?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_understood() {
        let line = "cpu  100 20 30 9999 50 6 7 8 40 0";
        assert_eq!(in_use(line), Some(1.71));
        assert_eq!(in_use("cpu 1 2"), None);
        let stat = "12 (a b) c) S 1 12 12 0 -1 4194560 1 2 3 4 150 50 20 30 20 0 1 0";
        assert_eq!(of_process(stat), Some(2.5));
        assert_eq!(of_process("12 (x) S 1"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_seen() {
        let own = std::process::id();
        assert!(resident(own).unwrap() > 1 << 20);
        assert!(process(own).is_some() && others(std::iter::empty()).unwrap() > 0.0);
    }
}
