//! `report.md`.

use super::findings::{caveats, findings, headline};
use super::{paper, svg::short, table};
use crate::reproduce::Results;

/// The whole report but its pictures, which are in `report.html`.
pub(crate) fn report(results: &Results) -> String {
    let mut out = format!(
        "# tinyfusion: the experiment `{}`\n\n**{}**\n\n",
        results.preset,
        headline(results)
    );
    out += &format!(
        "{}\n\nPictures and plots: [report.html](report.html). Every number: [results.json](results.json).\n\n",
        table::machine(results)
    );
    out += &format!("## Results\n\n{}\n{}\n\n", table(results), table::LEGEND);
    out += &format!("## What the numbers show\n\n{}\n", findings_list(results));
    out += "### To be kept in mind\n\n";
    for caveat in caveats(results) {
        out += &format!("- {caveat}\n");
    }
    out += &format!(
        "\n## The paper's table\n\n{}\n\n{}\n{}\n",
        paper::LABEL,
        paper_table(),
        paper::RANDOM
    );
    out += &format!(
        "\n## Commands\n\nEach can be pasted at the repository's root.\n\n```sh\n{}\n```\n",
        results.commands.join("\n")
    );
    out
}

/// The results alone.
pub(crate) fn table(results: &Results) -> String {
    let lines = table::lines(results).into_iter().map(|line| {
        if line.aggregate {
            line.cells
                .iter()
                .map(|c| {
                    if c.is_empty() {
                        String::new()
                    } else {
                        format!("**{c}**")
                    }
                })
                .collect()
        } else {
            line.cells
        }
    });
    grid(table::COLUMNS, lines)
}

fn paper_table() -> String {
    let columns = [
        "method",
        "depth",
        "steps of training",
        "FID",
        "IS",
        "prec.",
        "recall",
        "it/s",
    ];
    let lines = paper::ROWS.iter().map(|r| {
        let numbers = [r.fid, r.inception_score, r.precision, r.recall, r.speed].map(short);
        [r.name, r.depth, r.steps]
            .map(String::from)
            .into_iter()
            .chain(numbers)
            .collect()
    });
    grid(&columns, lines)
}

/// A table; all columns but the first are numbers, to the right.
fn grid(columns: &[&str], lines: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells
            .iter()
            .map(|c| c.replace('|', "\\|").replace('\n', " "))
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let names: Vec<String> = columns.iter().map(|c| (*c).to_string()).collect();
    let rule = format!("|---|{}\n", "--:|".repeat(columns.len() - 1));
    lines.fold(line(&names) + &rule, |out, cells| out + &line(&cells))
}

fn findings_list(results: &Results) -> String {
    let mut out = String::new();
    for finding in findings(results) {
        out += &format!("- {}\n", finding.question);
        for (verdict, text) in finding.answers {
            out += &format!("  - **{}**: {text}\n", verdict.word());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample::results;

    #[test]
    fn tables_keep_their_columns() {
        let text = grid(
            &["a", "b"],
            [vec!["x | y".to_string(), "1".into()]].into_iter(),
        );
        assert_eq!(text, "| a | b |\n|---|--:|\n| x \\| y | 1 |\n");
        for table in [table(&results()), paper_table()] {
            let bars = |l: &str| l.matches('|').count();
            let columns = bars(table.lines().next().unwrap());
            assert!(table.lines().all(|l| bars(l) == columns), "{table}");
        }
    }

    #[test]
    fn the_report_has_every_part() {
        let text = report(&results());
        let parts = [
            "In this run the learned masks recover better",
            "| **random 1:2, median of 4, fine-tuned** |",
            "**Yes**: FID 18",
            "not on Inception",
            "only the order of the methods can be compared",
            "| DiT-XL/2, dense | 28 | 7000K | 2.27 |",
            "learn assets/teacher 'a b'",
        ];
        for part in parts {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }
}
