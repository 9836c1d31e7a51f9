//! `report.md`.

use crate::comparisons::{self, Comparison, NOTE, comparisons};
use crate::findings::{caveats, findings, headline};
use crate::matrix::matrix;
use crate::paper;
use crate::results::Results;
use crate::table::{self, Kind, Line};

/// The whole report but its pictures, which are in `report.html`.
pub(crate) fn report(results: &Results) -> String {
    let mut out = format!(
        "# tinyfusion: the experiment `{}`\n\n**{}**\n\n",
        results.preset,
        headline(results)
    );
    out += "Pictures and plots: [report.html](report.html). Every number: [results.json](results.json).\n\n";
    out += &study(results);
    out += &format!("## Results\n\n{}\n", summary(results));
    out += &format!("## What the numbers show\n\n{}\n", findings_list(results));
    out += "### To be kept in mind\n\n";
    for caveat in caveats(results) {
        out += &format!("- {caveat}\n");
    }
    out += &format!(
        "\n## Every row\n\n{}",
        table(table::COLUMNS, table::lines(results))
    );
    out += &format!(
        "\n## The paper's table\n\n{}\n",
        papers(&paper::of(&results.family))
    );
    out += &format!(
        "\n## Commands\n\nEach can be pasted at the repository's root.\n\n```sh\n{}\n```\n",
        results.commands.join("\n")
    );
    out
}

/// The study's table and the tests over its seeds; nothing without a study.
fn study(results: &Results) -> String {
    let Some(study) = &results.study else {
        return String::new();
    };
    let title = study.title.as_deref().unwrap_or("The study");
    let tests = answers(&comparisons(results));
    let tests = match tests.as_str() {
        "" => tests,
        list => format!(
            "### {}\n\n{list}\n{NOTE}\n\n",
            comparisons::heading(results)
        ),
    };
    format!("## {title}\n\n{}\n{tests}", matrix(results).markdown())
}

/// Comparisons as a table; empty for none.
pub(crate) fn answers(all: &[Comparison]) -> String {
    if all.is_empty() {
        return String::new();
    }
    grid(
        &comparisons::COLUMNS,
        all.iter().map(|c| c.cells().to_vec()),
    )
}

/// The results in few columns, what they mean and where they were measured: to be pasted elsewhere.
pub(crate) fn summary(results: &Results) -> String {
    format!(
        "{}\n{}\n\nPreset `{}`, measured on: {}\n",
        compact(results),
        table::legend(results),
        results.preset,
        table::machine(results)
    )
}

/// The table in few columns alone.
pub(crate) fn compact(results: &Results) -> String {
    table(table::COMPACT, table::compact(results))
}

/// The paper's numbers, with what has to be said of them.
pub(crate) fn papers(table: &paper::Table) -> String {
    let lines = grid(table.columns, table.lines.iter().cloned());
    let note = table.note.map_or(String::new(), |n| format!("\n{n}\n"));
    format!("{}\n\n{lines}{note}", table.label)
}

fn table(columns: &[&str], lines: Vec<Line>) -> String {
    let lines = lines.into_iter().map(|line| {
        if line.kind == Kind::Aggregate {
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
    grid(columns, lines)
}

/// A table; all columns but the first are numbers, to the right.
pub(crate) fn grid(columns: &[&str], lines: impl Iterator<Item = Vec<String>>) -> String {
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

pub(crate) fn findings_list(results: &Results) -> String {
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
    use crate::sample::results;

    #[test]
    fn tables_keep_their_columns() {
        let text = grid(
            &["a", "b"],
            [vec!["x | y".to_string(), "1".into()]].into_iter(),
        );
        assert_eq!(text, "| a | b |\n|---|--:|\n| x \\| y | 1 |\n");
        let r = results();
        for table in [
            table(table::COLUMNS, table::lines(&r)),
            table(table::COMPACT, table::compact(&r)),
            grid(paper::of("DiT").columns, paper::of("DiT").lines.into_iter()),
        ] {
            let bars = |l: &str| l.matches('|').count();
            let columns = bars(table.lines().next().unwrap());
            assert!(table.lines().all(|l| bars(l) == columns), "{table}");
        }
    }

    #[test]
    fn the_summary_stands_for_itself() {
        let text = summary(&results());
        let head = "| method | kept | params | calibration loss | held-out loss | FID | IS | P | R | accuracy | images/s |\n";
        assert!(text.starts_with(head), "{text}");
        // The random masks are one line, and the machine is named.
        assert_eq!(text.matches("| **random").count(), 1);
        assert!(!text.contains("seed 0") && text.contains("2 cores, 8.0 GiB"));
        assert!(report(&results()).contains(&text));
    }

    #[test]
    fn a_study_has_its_own_table_and_other_reports_do_not() {
        let mut r = results();
        assert!(!report(&r).contains("| pattern | delta |"));
        r.study =
            Some(serde_json::from_str(r#"{"kind": "table4", "title": "the study"}"#).unwrap());
        let text = report(&r);
        assert!(
            text.contains("## the study\n\n| pattern | delta |"),
            "{text}"
        );
        let page = crate::html::report(&r, &[], &[]);
        crate::html::tests::well_formed(&page);
        assert!(page.contains("<section id=\"study\""));
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
