//! The report of merged runs: `report.html`, `report.md`, `results.csv` and `rows.tex`.

use crate::comparisons::{self, Comparison, comparisons};
use crate::findings::caveats;
use crate::groups::groups;
use crate::html::{page, section};
use crate::matrix::matrix;
use crate::measure::Measure;
use crate::merge::{Merged, Section};
use crate::report::Figure;
use crate::results::{ResultRow, Results};
use crate::svg::escape;
use crate::{html, markdown, table};

/// A section with its plots.
#[derive(Debug, Clone)]
pub struct Part {
    /// Rows of one preset.
    pub section: Section,
    /// Its plots.
    pub figures: Vec<Figure>,
}

/// The four files of a report.
#[derive(Debug, Clone)]
pub struct Pages {
    /// One file, nothing fetched.
    pub html: String,
    /// All but the pictures.
    pub markdown: String,
    /// Every row, every number, RFC 4180.
    pub csv: String,
    /// Rows of LaTeX tables.
    pub latex: String,
}

/// Writes merged runs, whose plots are drawn, as texts.
pub fn combined(parts: &[Part], merged: &Merged) -> Pages {
    Pages {
        html: page_of(parts, &merged.objections),
        markdown: markdown_of(parts, &merged.objections),
        csv: csv(parts),
        latex: latex(parts),
    }
}

const TITLE: &str = "tinyfusion: results";

fn heading(results: &Results) -> String {
    let title = results.study.as_ref().and_then(|s| s.title.as_deref());
    match title {
        Some(title) => format!("{}: {title}", results.preset),
        None => format!("{}, {}", results.preset, results.family),
    }
}

/// What the numbers are, and where they come from.
fn origin(section: &Section) -> String {
    let results = &section.results;
    let count = |n: Option<u64>| n.map_or("an unknown number of".into(), |n| n.to_string());
    format!(
        "From {}. {}, {} samples per row against {} reference images, on the features: {}. Measured on: {}.",
        section.sources.join(" and "),
        results.family,
        count(results.sample_count),
        count(results.reference_count),
        results.features,
        table::machine(results).trim_end_matches('.')
    )
}

/// What a reader has to know before the numbers.
fn reservations(section: &Section) -> Vec<String> {
    let notes = section.notes.iter().cloned();
    notes.chain(caveats(&section.results)).collect()
}

/// What ± and bold mean in a section's table.
fn key(results: &Results) -> String {
    let seeds = groups(&results.rows).iter().any(|g| g.rows.len() > 1);
    let spread = if seeds {
        " Several seeds: mean ± standard deviation (n − 1) over the seeds that have the number, of search and recovery (of random masks: over \
         the masks). The noise of sampling is not in it: every row is scored once, with one seed."
    } else {
        ""
    };
    format!(
        "Bold: the best of its size, budget and x, the dense model and methods that lost seeds aside.{spread}"
    )
}

/// The differences in words; what cannot be said is said, too.
fn statements(results: &Results) -> (Vec<Comparison>, Option<String>) {
    let all = comparisons(results);
    let note = if all.is_empty() {
        comparisons::untested(results)
    } else {
        Some(comparisons::NOTE.into())
    };
    (all, note)
}

fn markdown_of(parts: &[Part], objections: &[String]) -> String {
    let mut out = format!("# {TITLE}\n\nPictures: report.html. Every row: results.csv.\n");
    if !objections.is_empty() {
        out += "\n**Put side by side by force; these cannot be compared:**\n\n";
        out.extend(objections.iter().map(|o| format!("- {o}\n")));
    }
    for part in parts {
        let results = &part.section.results;
        out += &format!(
            "\n## {}\n\n{}\n\n{}\n{}\n",
            heading(results),
            origin(&part.section),
            matrix(results).markdown(),
            key(results)
        );
        let (all, note) = statements(results);
        if let Some(note) = note {
            out += &format!("\n### {}\n\n", comparisons::heading(results));
            out += &markdown::answers(&all);
            out += &format!("{}{note}\n", if all.is_empty() { "" } else { "\n" });
        }
        let plots = part.figures.iter().filter(|f| !f.caption.is_empty());
        let captions: Vec<String> = plots
            .map(|f| format!("- {}: {}\n", f.title, f.caption))
            .collect();
        if !captions.is_empty() {
            out += &format!("\n### Plots (in report.html)\n\n{}", captions.concat());
        }
        out += "\n### To be kept in mind\n\n";
        out.extend(
            reservations(&part.section)
                .iter()
                .map(|c| format!("- {c}\n")),
        );
    }
    out
}

fn page_of(parts: &[Part], objections: &[String]) -> String {
    let list = |items: &[String]| -> String {
        let items: String = items
            .iter()
            .map(|i| format!("<li>{}</li>\n", escape(i)))
            .collect();
        format!("<ul>\n{items}</ul>\n")
    };
    let forced = if objections.is_empty() {
        String::new()
    } else {
        format!(
            "<p><strong>Put side by side by force; these cannot be compared:</strong></p>\n{}",
            list(objections)
        )
    };
    let mut body = vec![format!("<header><h1>{TITLE}</h1>{forced}</header>")];
    for (i, part) in parts.iter().enumerate() {
        let results = &part.section.results;
        let (all, note) = statements(results);
        let answers = html::answers(&all);
        let said = note.map_or(String::new(), |note| {
            format!(
                "<h3>{}</h3>\n{answers}<p class=\"note\">{}</p>\n",
                escape(&comparisons::heading(results)),
                escape(&note)
            )
        });
        let figures: String = part.figures.iter().map(html::figure).collect();
        let text = format!(
            "<p>{}</p>\n{}\n<p class=\"note\">{}</p>\n{said}<div class=\"figures\">\n{figures}</div>\n\
             <h3>To be kept in mind</h3>\n{}",
            escape(&origin(&part.section)),
            matrix(results).html(&heading(results)),
            escape(&key(results)),
            list(&reservations(&part.section))
        );
        body.push(section(
            &format!("part-{i}"),
            &escape(&heading(results)),
            &text,
        ));
    }
    page(TITLE, &body)
}

/// Fields of a row that are no measure, in the order of the columns.
const FIELDS: [&str; 16] = [
    "preset",
    "family",
    "group",
    "id",
    "name",
    "criterion",
    "pattern",
    "recovery",
    "seed",
    "repetition",
    "depth",
    "parameters",
    "sampling steps",
    "budget steps",
    "samples seen",
    "x",
];

/// One line per row. Numbers are written in full; an empty field was not measured, and `status` says why.
fn csv(parts: &[Part]) -> String {
    let rows = || parts.iter().flat_map(|p| p.section.results.rows.iter());
    let labels: std::collections::BTreeSet<&String> =
        rows().flat_map(|r| r.labels.keys()).collect();
    let line = |cells: Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|c| quoted(c)).collect();
        format!("{}\r\n", cells.join(","))
    };
    let head = FIELDS
        .into_iter()
        .chain(Measure::ALL.map(Measure::name))
        .chain(["status"])
        .map(String::from)
        .chain(labels.iter().map(|l| (*l).clone()));
    let mut out = line(head.collect());
    for results in parts.iter().map(|p| &p.section.results) {
        for row in &results.rows {
            let labels = labels
                .iter()
                .map(|l| row.labels.get(*l).cloned().unwrap_or_default());
            let measures = Measure::ALL.map(|m| m.of(row).map_or(String::new(), |v| v.to_string()));
            let cells = fields(results, row)
                .into_iter()
                .chain(measures)
                .chain([status(row)])
                .chain(labels);
            out += &line(cells.collect());
        }
    }
    out
}

fn fields(results: &Results, row: &ResultRow) -> [String; 16] {
    let or_empty = |n: Option<u64>| n.map_or(String::new(), |n| n.to_string());
    [
        results.preset.clone(),
        results.family.clone(),
        row.group(),
        row.id.clone(),
        row.name.clone(),
        row.criterion.clone(),
        row.pattern.clone().unwrap_or_default(),
        row.recovery_label().into(),
        row.seed.to_string(),
        row.repetition().to_string(),
        row.depth.to_string(),
        row.parameters.to_string(),
        row.sampling_steps.to_string(),
        or_empty(row.budget_steps),
        or_empty(row.samples_seen),
        row.x.map_or(String::new(), |x| x.to_string()),
    ]
}

fn status(row: &ResultRow) -> String {
    match &row.failed {
        _ if row.diverged() => "diverged".into(),
        Some(failed) => format!("failed: {}", failed.stage),
        None => "measured".into(),
    }
}

/// A field of RFC 4180.
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.into()
    }
}

fn latex(parts: &[Part]) -> String {
    let mut out =
        String::from("% Rows for tabular, in ASCII: pdfLaTeX needs no package for them.\n");
    for part in parts {
        let results = &part.section.results;
        // A comment ends with its line.
        out += &format!(
            "\n% {}\n{}",
            crate::latex::escape(&heading(results)),
            matrix(results).latex()
        );
    }
    out
}

#[cfg(test)]
mod tests;
