//! The results as cells of text, for both kinds of report.

use super::svg::short;
use crate::reproduce::{Results, Spread};

/// Names of the columns; all but the first and the last hold numbers.
pub(crate) const COLUMNS: &[&str] = &[
    "method",
    "depth",
    "params",
    "steps",
    "loss before",
    "loss after",
    "FID",
    "IS",
    "prec.",
    "recall",
    "KID",
    "accuracy",
    "images/s",
    "kept blocks",
];

/// What the columns mean.
pub(crate) const LEGEND: &str = "steps: sampling steps. Loss before: held-out denoising loss of the cut model before recovery (calibration \
loss); loss after: of the recovered model, same images, timesteps and noise. FID, IS, precision, recall, KID: on the features \
of the small classifier, not Inception; sFID does not apply to them. Accuracy: share of samples that the classifier takes for their label.";

/// A line of the table.
pub(crate) struct Line {
    pub(crate) cells: Vec<String>,
    /// Blocks kept, out of the teacher's; none for the aggregate.
    pub(crate) kept: Option<Vec<usize>>,
    /// The random masks taken together.
    pub(crate) aggregate: bool,
}

fn number(value: Option<f64>) -> String {
    value.map_or("–".into(), short)
}

/// One line per row, with the random masks' median and spread after their rows.
pub(crate) fn lines(results: &Results) -> Vec<Line> {
    let mut lines = Vec::new();
    let last_random = results.rows.iter().rposition(|r| r.criterion == "random");
    for (i, r) in results.rows.iter().enumerate() {
        let kept: Vec<String> = r.kept_layers.iter().map(usize::to_string).collect();
        lines.push(Line {
            cells: vec![
                r.name.clone(),
                r.depth.to_string(),
                parameters(r.parameters),
                r.sampling_steps.to_string(),
                number(r.calibration_loss),
                short(r.held_out_loss),
                number(r.fid),
                number(r.inception_score),
                number(r.precision),
                number(r.recall),
                number(r.kid),
                r.accuracy
                    .map_or("–".into(), |a| format!("{:.1} %", a * 100.0)),
                short(r.images_per_second),
                if r.criterion == "dense" {
                    "all".into()
                } else {
                    kept.join(" ")
                },
            ],
            kept: Some(r.kept_layers.clone()),
            aggregate: false,
        });
        if let Some(random) = results.random.as_ref().filter(|_| Some(i) == last_random) {
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
                    String::new(),
                ],
                kept: None,
                aggregate: true,
            });
        }
    }
    lines
}

fn parameters(n: u64) -> String {
    if n >= 1_000_000 {
        format!("{:.2}M", n as f64 / 1e6)
    } else {
        format!("{:.0}K", n as f64 / 1e3)
    }
}

/// Machine, time and memory in one line.
pub(crate) fn machine(results: &Results) -> String {
    let m = &results.machine;
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
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
    let peak = results
        .peak_rss_bytes
        .map(|b| format!(", at most {} of memory", gib(b)))
        .unwrap_or_default();
    let took = crate::reproduce::duration(results.seconds);
    format!(
        "{}. All stages together took {took}{peak}.",
        parts.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample::results;

    #[test]
    fn every_line_has_every_column_and_the_random_masks_are_summed_up() {
        let results = results();
        let lines = lines(&results);
        assert_eq!(lines.len(), results.rows.len() + 1);
        assert!(lines.iter().all(|l| l.cells.len() == COLUMNS.len()));
        let at = lines.iter().position(|l| l.aggregate).unwrap();
        assert_eq!(at, 6);
        assert_eq!(lines[at].cells[6], "26 (20 to 32)");
        assert_eq!(lines[0].cells[4], "–");
        assert_eq!(lines[2].cells[13], "0 2 4 6 8 10 12 14");
    }

    #[test]
    fn the_machine_is_one_line() {
        let line = machine(&results());
        assert_eq!(
            line,
            "unknown CPU, 2 cores, 8.0 GiB memory, TestOS <1>. All stages together took 14:00 min, at most 1.0 GiB of memory."
        );
    }
}
