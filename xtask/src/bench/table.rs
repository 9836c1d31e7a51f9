//! `bench.md`: the results as tables.

use super::preset::{Contender, Kind};
use super::results::{CaseResult, Comparison, ContenderResult, Results, ScalingResult, Spread};

const COLUMNS: &[&str] = &[
    "case",
    "contender",
    "step",
    "GFLOP/s",
    "of peak",
    "peak memory",
    "over ours",
    "our memory",
    "goal",
];

const LEGEND: &str = "Step: median seconds (least to largest) of the timed rounds, in which the contenders take turns. GFLOP/s: \
operations of the contender's way by formula (matrix products, 2 per multiply-add) over the median. Of peak: that over the best \
rate of a large f32 product on this machine. Floor: the operations that cannot be left out, at that peak. Over ours: median \
(quartiles) of the ratio of the times within a round; for half the depth, of ours over it. Peak memory: of the \
whole process, in brackets before its first step. Our memory: our peak over the contender's.";

/// Cores of other programs above which a measurement is not to be trusted.
const BUSY: f64 = 0.1;

/// The whole file.
pub(crate) fn report(results: &Results) -> String {
    let mut out = String::from("# tinyfusion against PyTorch, CPU, f32\n\n");
    out += &format!("{}\n\n", verdict(results));
    for warning in warnings(results) {
        out += &format!("{warning}\n\n");
    }
    if !results.cases.is_empty() {
        out += &format!("{}\n{LEGEND}\n\n", cases(&results.cases));
    }
    if !results.scaling.is_empty() {
        out += "## Scaling of ours\n\n";
        for scaling in &results.scaling {
            out += &format!("{}\n", self::scaling(scaling));
        }
        out += "Floors: the operations at the machine's peak (fewer threads have their share of it), and the bytes that have to move at \
                its bandwidth. Of floor: the larger of the two over the median.\n\n";
    }
    out += &format!("{}\n", conditions(results));
    out
}

/// How many goals were met, and how close the outputs are. A case on a busy machine does not count.
pub(crate) fn verdict(results: &Results) -> String {
    let (mut met, mut judged, mut left_out) = (0, 0, 0);
    for case in &results.cases {
        if is_busy(case.cores_of_others) {
            left_out += case.goals.len();
        } else {
            judged += case.goals.len();
            met += case.goals.iter().filter(|g| g.met).count();
        }
    }
    let left_out = match left_out {
        0 => String::new(),
        n => format!(" ({n} more were measured on a busy machine and do not count)"),
    };
    let difference = match worst_difference(results) {
        Some(worst) => {
            format!("largest difference of the outputs: {worst:.1e} of the largest value")
        }
        None => "no outputs were compared".into(),
    };
    format!("**{met} of {judged} goals met**{left_out}; {difference}.")
}

/// Whether other programs took too much of the machine.
pub(crate) fn is_busy(cores_of_others: Option<f64>) -> bool {
    cores_of_others.is_some_and(|c| c > BUSY)
}

/// A busy machine hurts programs unequally: those whose threads wait for one another most.
fn warnings(results: &Results) -> Vec<String> {
    let cases = results
        .probes
        .iter()
        .chain(&results.cases)
        .map(|c| (c.name.clone(), c.cores_of_others));
    let scalings = results.scaling.iter().map(|s| {
        let name = format!("{} over {}", s.kind.word(), s.over);
        (name, s.cores_of_others)
    });
    let busy = cases.chain(scalings).filter(|(_, cores)| is_busy(*cores));
    busy.map(|(name, cores)| {
        let cores = cores.unwrap_or_default();
        format!("**Not to be trusted: {name}.** Other programs used {cores:.1} cores meanwhile.")
    })
    .collect()
}

/// The largest difference between a contender's output and ours.
pub(crate) fn worst_difference(results: &Results) -> Option<f64> {
    let all = results.cases.iter().flat_map(|c| &c.contenders);
    all.filter_map(|c| c.difference).reduce(f64::max)
}

fn cases(cases: &[CaseResult]) -> String {
    let mut lines = Vec::new();
    for case in cases {
        for (i, contender) in case.contenders.iter().enumerate() {
            let first = if i == 0 {
                format!("**{}**, batch {}", case.name, case.batch)
            } else {
                String::new()
            };
            lines.push(line(first, contender, case));
        }
        if let Some(floor) = case.floor_seconds {
            let mut cells = vec![String::new(); COLUMNS.len()];
            cells[1] = "*floor*".into();
            cells[2] = seconds(floor);
            cells[4] = "100 %".into();
            lines.push(cells);
        }
    }
    grid(COLUMNS, lines)
}

fn line(first: String, c: &ContenderResult, case: &CaseResult) -> Vec<String> {
    let comparison = case.comparisons.iter().find(|o| o.with == c.contender);
    let goals: Vec<String> = case
        .goals
        .iter()
        .filter(|g| g.with == c.contender)
        .map(|g| {
            let sign = if g.of == "time" { '≥' } else { '≤' };
            let word = match g.met {
                _ if is_busy(case.cores_of_others) => "busy",
                true => "met",
                false => "**missed**",
            };
            format!("{} {sign} {}: {word}", g.of, g.goal)
        })
        .collect();
    vec![
        first,
        c.contender.name().into(),
        spread(&c.spread),
        format!("{:.1}", c.flops_per_second / 1e9),
        c.of_peak.map_or_else(String::new, percent),
        resident(c.peak_rss_bytes, c.ready_rss_bytes),
        comparison.map_or_else(String::new, ratio),
        comparison.map_or_else(String::new, |o| format!("{:.2}×", o.memory)),
        goals.join("; "),
    ]
}

fn scaling(result: &ScalingResult) -> String {
    let columns = [
        result.over,
        "step",
        "compute floor",
        "memory floor",
        "of floor",
        "peak memory",
    ];
    let lines = result.points.iter().map(|p| {
        let floor = p.compute_floor_seconds.max(p.memory_floor_seconds);
        vec![
            p.value.to_string(),
            spread(&p.spread),
            seconds(p.compute_floor_seconds),
            seconds(p.memory_floor_seconds),
            percent(floor / p.spread.median),
            memory(p.peak_rss_bytes),
        ]
    });
    let what = if result.kind == Kind::Forward {
        "A forward"
    } else {
        "A fine-tuning step"
    };
    format!(
        "{what} of {} over {}:\n\n{}",
        result.model,
        result.over,
        grid(&columns, lines.collect())
    )
}

/// Where and with what it was measured.
fn conditions(results: &Results) -> String {
    let m = &results.machine;
    let mut with: Vec<String> = m.rustc.iter().cloned().collect();
    with.extend(results.versions.iter().map(|(k, v)| format!("{k} {v}")));
    if let Some(commit) = &m.git_commit {
        let short = &commit[..commit.len().min(12)];
        let changed = if m.git_dirty == Some(true) {
            ", changed"
        } else {
            ""
        };
        with.push(format!("commit {short}{changed}"));
    }
    format!(
        "Measured on: {}, {} cores, {}; {} threads, {} rounds; peak {:.1} GFLOP/s, copy {:.1} GB/s (read and written); {}.",
        m.cpu.as_deref().unwrap_or("an unnamed processor"),
        m.cores,
        m.os,
        results.threads,
        results.rounds,
        results.peak_flops_per_second / 1e9,
        results.bandwidth_bytes_per_second / 1e9,
        with.join(", ")
    )
}

/// A table; all columns but the first two are numbers, to the right.
pub(crate) fn grid(columns: &[&str], lines: Vec<Vec<String>>) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let names: Vec<String> = columns.iter().map(|c| (*c).to_string()).collect();
    let rule = format!("|---|---|{}\n", "--:|".repeat(columns.len() - 2));
    lines
        .into_iter()
        .fold(row(&names) + &rule, |out, cells| out + &row(&cells))
}

/// `0.0123` as `12.3 ms`.
pub(crate) fn seconds(s: f64) -> String {
    match s {
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s if s >= 0.01 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.2} ms", s * 1e3),
    }
}

pub(crate) fn spread(s: &Spread) -> String {
    format!(
        "{} ({} to {})",
        seconds(s.median),
        seconds(s.least),
        seconds(s.largest)
    )
}

fn ratio(c: &Comparison) -> String {
    let t = &c.time;
    let what = if c.with == Contender::Half {
        "ours over it "
    } else {
        ""
    };
    format!(
        "{what}**{:.2}×** ({:.2} to {:.2})",
        t.median, t.lower_quartile, t.upper_quartile
    )
}

pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Peak memory, in brackets that before the first step.
pub(crate) fn resident(peak: u64, ready: Option<u64>) -> String {
    let before = ready.map(|b| format!(" ({})", gib(b)));
    format!("{}{}", memory(peak), before.unwrap_or_default())
}

fn gib(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / f64::from(1 << 30))
}

fn memory(bytes: u64) -> String {
    format!("{} GiB", gib(bytes))
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::sample;
    use super::*;

    #[test]
    fn the_report_says_who_was_faster_and_which_goals_were_met() {
        let text = report(&sample());
        for part in [
            "**2 of 3 goals met**; largest difference of the outputs: 2.0e-6",
            "| **forward <S>**, batch 8 | tinyfusion | 1.00 s (900 ms to 1.10 s) | 100.0 | 50 % | 3.00 GiB (0.50) |",
            "ours over it **2.00×** (2.00 to 2.00) | 1.50× | time ≥ 1.95: met |",
            "**1.50×** (1.35 to 1.50) | 0.75× | time ≥ 1.25: met; memory ≤ 0.6: **missed** |",
            "|  | *floor* | 500 ms |  | 100 % |",
            "A forward of DiT-S/2 over depth:",
            "| 6 | 250 ms (250 ms to 250 ms) | 50.0 ms | 100 ms | 40 % | 1.00 GiB |",
            "peak 200.0 GFLOP/s, copy 10.0 GB/s",
            "torch 2.15.0",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn a_busy_machine_is_told() {
        let mut results = sample();
        assert!(!report(&results).contains("Not to be trusted"));
        results.cases[0].cores_of_others = Some(1.25);
        let said = "**Not to be trusted: forward <S>.** Other programs used 1.2 cores meanwhile.";
        let text = report(&results);
        assert!(
            text.contains(said) && text.contains("| time ≥ 1.95: busy |"),
            "{text}"
        );
        assert!(text.contains("**0 of 0 goals met** (3 more were measured"));
    }

    #[test]
    fn tables_keep_their_columns() {
        let results = sample();
        for table in [cases(&results.cases), scaling(&results.scaling[0])] {
            let bars = |l: &str| l.matches('|').count();
            let lines: Vec<&str> = table.lines().filter(|l| l.starts_with('|')).collect();
            assert!(lines.iter().all(|l| bars(l) == bars(lines[0])), "{table}");
        }
    }
}
