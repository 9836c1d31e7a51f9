//! The results as cells of text, for both kinds of report.

use crate::aggregate::{Aggregate, Spread};
use crate::results::Machine;
use crate::results::{ResultRow, Results};
use crate::svg::short;

/// Names of the columns of [`lines`]; all but the first and the last hold numbers.
pub(crate) const COLUMNS: &[&str] = &[
    "method",
    "depth",
    "params",
    "steps",
    "calibration loss",
    "held-out loss",
    "FID",
    "IS",
    "P",
    "R",
    "KID",
    "accuracy",
    "images/s",
    "kept",
];

/// The columns of [`compact`].
pub(crate) const COMPACT: &[&str] = &[
    "method",
    "kept",
    "params",
    "calibration loss",
    "held-out loss",
    "FID",
    "IS",
    "P",
    "R",
    "accuracy",
    "images/s",
];

/// What the columns mean.
pub(crate) fn legend(results: &Results) -> String {
    let features = match results.on_inception() {
        true => "on Inception's features. Accuracy is not measured",
        false => {
            "on the features of the small classifier, not Inception; sFID does not apply to them. Accuracy: share of samples \
             that the classifier takes for their label"
        }
    };
    format!(
        "Kept: blocks of the teacher, from 0. Calibration loss: held-out denoising loss of the cut model before recovery; \
         held-out loss: of the recovered model, same images and random draws. FID, IS, precision (P), recall (R), KID: \
         {features}. Of the random masks: median (least to largest)."
    )
}

/// What a line stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A row of its own.
    Row,
    /// A random mask that an aggregate sums up; where all of a class failed there is none.
    Random,
    /// The random masks of a class taken together.
    Aggregate,
}

/// A line of the table.
pub(crate) struct Line {
    pub(crate) cells: Vec<String>,
    /// Blocks kept, out of the teacher's; none for the aggregate.
    pub(crate) kept: Option<Vec<usize>>,
    pub(crate) kind: Kind,
}

/// [`lines`] in few columns, the random masks of a class as one line.
pub(crate) fn compact(results: &Results) -> Vec<Line> {
    let columns: Vec<usize> = COMPACT
        .iter()
        .filter_map(|name| COLUMNS.iter().position(|c| c == name))
        .collect();
    let mut lines = lines(results);
    lines.retain(|l| l.kind != Kind::Random);
    for line in &mut lines {
        line.cells = columns.iter().map(|&c| line.cells[c].clone()).collect();
    }
    lines
}

/// What stands in the place of a number that there is not.
fn absent(row: &ResultRow) -> &'static str {
    match &row.failed {
        Some(_) => "failed",
        None => "–",
    }
}

/// One line per row, with the median and spread of each class of random masks after its last row.
pub(crate) fn lines(results: &Results) -> Vec<Line> {
    let mut lines = Vec::new();
    // By the row that each of them follows.
    let aggregates: Vec<(usize, &Aggregate)> = results
        .random
        .iter()
        .filter_map(|a| {
            let last = results.rows.iter().rposition(|r| a.ids.contains(&r.id));
            Some((last?, a))
        })
        .collect();
    let summed_up = |r: &ResultRow| results.random.iter().any(|a| a.ids.contains(&r.id));
    for (i, r) in results.rows.iter().enumerate() {
        let kept: Vec<String> = r.kept_layers.iter().map(usize::to_string).collect();
        let dense = r.criterion == "dense";
        let or = |value: Option<f64>, other: &str| value.map_or(other.to_string(), short);
        // What a diverged model draws is noise: its scores are not to be compared.
        let (missing, sound) = if r.diverged() {
            ("diverged", false)
        } else {
            (absent(r), true)
        };
        let scored = |value: Option<f64>| or(value.filter(|_| sound), missing);
        lines.push(Line {
            cells: vec![
                r.name.clone(),
                r.depth.to_string(),
                parameters(r.parameters),
                r.sampling_steps.to_string(),
                or(r.calibration_loss, if dense { "–" } else { "diverged" }),
                or(r.held_out_loss, missing),
                scored(r.fid),
                scored(r.inception_score),
                scored(r.precision),
                scored(r.recall),
                scored(r.kid),
                r.accuracy
                    .filter(|_| sound)
                    .map_or(missing.into(), |a| format!("{:.1} %", a * 100.0)),
                or(r.images_per_second, absent(r)),
                if dense {
                    format!("all {}", r.depth)
                } else {
                    kept.join(" ")
                },
            ],
            kept: Some(r.kept_layers.clone()),
            kind: if summed_up(r) {
                Kind::Random
            } else {
                Kind::Row
            },
        });
        for (_, random) in aggregates.iter().filter(|(last, _)| *last == i) {
            let of = |s: Option<Spread>| {
                s.map_or("–".into(), |s| {
                    format!("{} ({} to {})", short(s.median), short(s.min), short(s.max))
                })
            };
            let percent = |s: Spread| {
                format!(
                    "{:.1} % ({:.1} to {:.1})",
                    s.median * 100.0,
                    s.min * 100.0,
                    s.max * 100.0
                )
            };
            lines.push(Line {
                cells: vec![
                    random.name.clone(),
                    r.depth.to_string(),
                    parameters(r.parameters),
                    r.sampling_steps.to_string(),
                    of(random.calibration_loss),
                    of(random.held_out_loss),
                    of(random.fid),
                    of(random.inception_score),
                    of(random.precision),
                    of(random.recall),
                    of(random.kid),
                    random.accuracy.map_or("–".into(), percent),
                    of(random.images_per_second),
                    "–".into(),
                ],
                kept: None,
                kind: Kind::Aggregate,
            });
        }
    }
    lines
}

pub(crate) fn parameters(n: u64) -> String {
    if n >= 1_000_000 {
        format!("{:.2}M", n as f64 / 1e6)
    } else {
        format!("{:.0}K", n as f64 / 1e3)
    }
}

/// Machine, time and memory in one line.
pub(crate) fn machine(results: &Results) -> String {
    format!("{}. {}", place(&results.machine), costs(results))
}

/// The machine.
pub(crate) fn place(m: &Machine) -> String {
    let mut parts = vec![m.cpu.clone().unwrap_or_else(|| "unknown CPU".into())];
    parts.push(format!(
        "{} core{}",
        m.cores,
        if m.cores == 1 { "" } else { "s" }
    ));
    parts.extend(m.memory_bytes.map(|b| format!("{} memory", gib(b))));
    parts.push(m.os.clone());
    parts.extend(m.rustc.clone());
    if let Some(commit) = &m.git_commit {
        let dirty = if m.git_dirty == Some(true) {
            " with changes"
        } else {
            ""
        };
        parts.push(format!(
            "commit {}{dirty}",
            commit.get(..12).unwrap_or(commit)
        ));
    }
    parts.join(", ")
}

/// Time and memory.
pub(crate) fn costs(results: &Results) -> String {
    let peak = results
        .peak_rss_bytes
        .map(|b| format!(", at most {} of memory", gib(b)))
        .unwrap_or_default();
    let took = duration(results.seconds);
    format!("All stages together took {took}{peak}.")
}

/// `75` as `1:15 min`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.round().max(0.0) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{}:{:02} min", s / 60, s % 60),
        _ => format!("{}:{:02} h", s / 3600, s % 3600 / 60),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Failure;
    use crate::sample::results;

    #[test]
    fn every_line_has_every_column_and_the_random_masks_are_summed_up() {
        let results = results();
        let lines = lines(&results);
        assert_eq!(lines.len(), results.rows.len() + 1);
        assert!(lines.iter().all(|l| l.cells.len() == COLUMNS.len()));
        let at = lines
            .iter()
            .position(|l| l.kind == Kind::Aggregate)
            .unwrap();
        assert_eq!(at, 6);
        assert_eq!(lines[at].cells[6], "26 (20 to 32)");
        assert_eq!(lines[0].cells[4], "–");
        assert_eq!(lines[2].cells[13], "0 2 4 6 8 10 12 14");
    }

    #[test]
    fn the_compact_table_has_all_its_columns() {
        let lines = compact(&results());
        assert!(lines.iter().all(|l| l.cells.len() == COMPACT.len()));
        assert_eq!(lines.iter().filter(|l| l.kind == Kind::Random).count(), 0);
        assert_eq!(lines[0].cells[..2], ["dense teacher", "all 16"]);
        assert_eq!(lines[2].cells[5], "26 (20 to 32)");
        assert_eq!(lines[3].cells[1], "0 2 4 6 8 10 12 14");
    }

    #[test]
    fn what_diverged_or_failed_shows_no_scores() {
        let mut r = results();
        let at = |id: &str| r.rows.iter().position(|row| row.id == id).unwrap();
        let (diverged, failed) = (at("oracle-ft"), at("oracle-kd"));
        r.rows[diverged].held_out_loss = None;
        r.rows[diverged].calibration_loss = None;
        r.rows[failed].fid = None;
        r.rows[failed].failed = Some(Failure {
            stage: "oracle-kd/evaluation".into(),
            error: "x".into(),
        });
        let lines = lines(&r);
        let cells = |row: usize| &lines[row + 1].cells; // behind the aggregate
        assert!(
            cells(diverged)[4..12].iter().all(|c| c == "diverged"),
            "{:?}",
            cells(diverged)
        );
        assert_eq!(cells(failed)[6], "failed");
        assert_eq!(cells(failed)[5], "0.0295");
        // A random mask without numbers is not part of the median.
        r.rows[2].held_out_loss = None;
        let random = Aggregate::of(&r.rows).swap_remove(0);
        assert_eq!((random.count, random.fid.unwrap().max), (3, 32.0));
        assert!(
            random
                .name
                .contains("median of 3 (1 more diverged or failed)")
        );
    }

    #[test]
    fn the_machine_is_one_line() {
        let line = machine(&results());
        assert_eq!(
            line,
            "unknown CPU, 2 cores, 8.0 GiB memory, TestOS <1>. All stages together took 14:00 min, at most 1.0 GiB of memory."
        );
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(9.4), "9 s");
        assert_eq!(duration(75.0), "1:15 min");
        assert_eq!(duration(7260.0), "2:01 h");
    }
}
