//! `bench-files.md`: the results as a table.

use super::super::results::Spread;
use super::super::table::{grid, is_busy, percent, resident, seconds, spread};
use super::results::{ContenderResult, GoalResult, Results, TaskResult, Unit};
use crate::machine;

const COLUMNS: &[&str] = &[
    "task",
    "contender",
    "repetition",
    "rate",
    "of floor",
    "over ours",
    "peak memory",
    "files held",
    "difference",
    "goal",
];

const LEGEND: &str = "Repetition: median seconds (least to largest) of the timed rounds, in which the contenders take turns. Over ours: median (quartiles) of the \
ratio of the times within a round, for the same number of bytes or images. Load: from a file in the page cache to f32 tensors, each time in a new process; both sides then read a value of every page of every tensor, so \
that a mapped file is read and not promised, and ours also hashes the file and looks for NaN and infinity. Latents: shuffled batches of 4×32×32, the posterior drawn from stored moments (ours in shards) or a \
stored sample (.npy). Floor: of a load, the file's bytes once at the bandwidth of a copy (reading one value of a page is less than that); of the autoencoder, its convolutions and products at the rate of a large product; of \
latents, the moments read and the latent written, without drawing noise. Peak memory: of the whole process, in brackets before its first repetition. Files held: open and mapped, of the set's shards.";

/// The whole file.
pub(crate) fn report(results: &Results) -> String {
    let mut out = String::from("# Files and the autoencoder: tinyfusion against Python, CPU\n\n");
    out += &format!("{}\n\n", verdict(results));
    let busy = results.tasks.iter().filter(|t| is_busy(t.cores_of_others));
    for task in busy {
        out += &format!(
            "**Not to be trusted: {}.** Other programs used {:.1} cores meanwhile.\n\n",
            task.name,
            task.cores_of_others.unwrap_or(0.0)
        );
    }
    let lines = results.tasks.iter().flat_map(lines).collect();
    out += &format!("{}\n{LEGEND}\n\n", grid(COLUMNS, lines));
    let versions: Vec<String> = results
        .versions
        .iter()
        .map(|(k, v)| format!("{k} {v}"))
        .collect();
    out += &format!(
        "Measured on: {}; {} threads, {} rounds; peak {:.1} GFLOP/s, copy {:.1} GB/s (read and written); {}.\n",
        machine::place(&results.machine),
        results.threads,
        results.rounds,
        results.peak_flops_per_second / 1e9,
        results.bandwidth_bytes_per_second / 1e9,
        versions.join(", ")
    );
    out
}

/// How many goals were met; those of a busy machine do not count.
fn verdict(results: &Results) -> String {
    let goals = |busy: bool| {
        let tasks = results.tasks.iter();
        let tasks = tasks.filter(move |t| is_busy(t.cores_of_others) == busy);
        tasks.flat_map(|t| &t.contenders).flat_map(|c| &c.goals)
    };
    let left_out = match goals(true).count() {
        0 => String::new(),
        n => format!(" ({n} more were measured while the machine was busy)"),
    };
    format!(
        "**{} of {} goals met**{left_out}.",
        goals(false).filter(|g| g.met).count(),
        goals(false).count()
    )
}

fn lines(task: &TaskResult) -> Vec<Vec<String>> {
    let mut lines: Vec<Vec<String>> = task
        .contenders
        .iter()
        .enumerate()
        .map(|(i, c)| {
            let first = if i == 0 {
                format!("**{}**", task.name)
            } else {
                String::new()
            };
            line(first, c, task)
        })
        .collect();
    let mut floor = vec![String::new(); COLUMNS.len()];
    floor[1] = "*floor of ours*".into();
    floor[2] = seconds(task.floor_seconds);
    floor[4] = "100 %".into();
    lines.push(floor);
    lines
}

fn line(first: String, c: &ContenderResult, task: &TaskResult) -> Vec<String> {
    let ratio = |s: Spread| {
        format!(
            "**{:.2}×** ({:.2} to {:.2})",
            s.median, s.lower_quartile, s.upper_quartile
        )
    };
    let held = c
        .facts
        .open_files
        .zip(c.facts.mapped_files)
        .zip(c.facts.shards);
    let goals: Vec<String> = c
        .goals
        .iter()
        .map(|g| goal(g, is_busy(task.cores_of_others)))
        .collect();
    vec![
        first,
        c.name.clone(),
        spread(&c.spread),
        rate(c, task.unit),
        c.of_floor.map_or_else(String::new, percent),
        c.over_ours.map_or_else(String::new, ratio),
        resident(c.peak_rss_bytes, c.ready_rss_bytes),
        held.map_or_else(String::new, |((open, mapped), shards)| {
            format!("{open} + {mapped} of {shards}")
        }),
        c.difference
            .map_or_else(String::new, |d| format!("{d:.1e}")),
        goals.join("; "),
    ]
}

fn rate(c: &ContenderResult, unit: Unit) -> String {
    match (c.flops_per_second, unit) {
        (Some(flops), _) => format!("{:.1} GFLOP/s", flops / 1e9),
        (None, Unit::Bytes) => format!("{:.2} GB/s", c.per_second / 1e9),
        (None, Unit::Images) if c.per_second < 100.0 => format!("{:.2} images/s", c.per_second),
        (None, Unit::Images) => format!("{:.0} images/s", c.per_second),
    }
}

fn goal(g: &GoalResult, busy: bool) -> String {
    let sign = if g.at_least { '≥' } else { '≤' };
    let found = g.found.map_or("not told".into(), |f| format!("{f:.2}"));
    let word = match g.met {
        _ if busy => "busy",
        true => "met",
        false => "**missed**",
    };
    format!("{} {sign} {}: {found}, {word}", g.of, g.goal)
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::sample;
    use super::*;

    #[test]
    fn the_report_says_rates_ratios_and_goals() {
        let text = report(&sample());
        for part in [
            "**3 of 5 goals met**.",
            "| **load a file** | tinyfusion | 2.00 s (1.80 s to 2.20 s) | 0.13 GB/s | 25 % |  | 1.00 GiB (0.25) |  |  | memory over file ≤ 1.2: 4.00, **missed** |",
            "|  | torch.load | 1.00 s (900 ms to 1.10 s) | 0.27 GB/s | 25 % | **0.50×** (0.50 to 0.50) |",
            "| 1.0e-7 | time ≥ 1: 0.50, **missed**; memory ≤ 1: 1.00, met |",
            "| 1000 images/s | 25 % |  | 1.00 GiB (0.25) | 0 + 4 of 4 |  | files held over shards ≤ 1: 1.00, met |",
            "|  | training step | 200 ms (200 ms to 200 ms) | 50.00 images/s | 25 % | **20.00×** (20.00 to 20.00) |",
            "|  | *floor of ours* | 500 ms |",
            "copy 10.0 GB/s (read and written); torch 2.15.0.",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn a_busy_machine_is_told() {
        let mut results = sample();
        assert!(!report(&results).contains("Not to be trusted"));
        results.tasks[0].cores_of_others = Some(1.25);
        let text = report(&results);
        for part in [
            "**2 of 2 goals met** (3 more were measured while the machine was busy)",
            "**Not to be trusted: load a file.** Other programs used 1.2 cores",
            "time ≥ 1: 0.50, busy",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn the_table_keeps_its_columns() {
        let text = report(&sample());
        let bars: Vec<usize> = text
            .lines()
            .filter(|l| l.starts_with('|'))
            .map(|l| l.matches('|').count())
            .collect();
        assert!(bars.iter().all(|n| *n == COLUMNS.len() + 1), "{text}");
    }
}
