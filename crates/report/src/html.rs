//! `report.html`: one file, nothing fetched, for light and dark, wide and narrow screens.

use crate::comparisons::{self, Comparison, NOTE, comparisons};
use crate::findings::{Verdict, caveats, findings, headline};
use crate::matrix::matrix;
use crate::paper;
use crate::report::{Figure, Grid};
use crate::results::Results;
use crate::svg::escape;
use crate::table::{self, Kind};

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub(crate) fn report(results: &Results, figures: &[Figure], grids: &[Grid]) -> String {
    let title = escape(&format!("tinyfusion: the experiment {}", results.preset));
    let body = [
        format!(
            "<header><h1>{title}</h1><p class=\"headline\">{}</p>",
            escape(&headline(results))
        ),
        format!("<p>{}</p></header>", escape(&table::machine(results))),
        study(results),
        section("results", "Results", &results_table(results)),
        section(
            "paper",
            "The paper's table, beside it",
            &papers(&paper::of(&results.family)),
        ),
        section("findings", "What the numbers show", &findings_list(results)),
        section(
            "figures",
            "Plots",
            &figures.iter().map(figure).collect::<String>(),
        ),
        section("samples", "Samples from the same noise", &samples(grids)),
        section("record", "For the record", &record(results)),
    ];
    page(&title, &body)
}

/// The study's table and the tests over its seeds; nothing where there is neither.
fn study(results: &Results) -> String {
    let tests = answers(&comparisons(results));
    let Some(study) = &results.study else {
        return String::new();
    };
    let title = study.title.as_deref().unwrap_or("The study");
    let table = matrix(results).html(title);
    let tests = match tests.as_str() {
        "" => tests,
        list => format!(
            "<h3>{}</h3>\n{list}<p class=\"note\">{}</p>",
            escape(&comparisons::heading(results)),
            escape(NOTE)
        ),
    };
    section("study", &escape(title), &format!("{table}\n{tests}"))
}

/// Comparisons as a table; empty for none.
pub(crate) fn answers(all: &[Comparison]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let line = |c: &Comparison| {
        let [method, words @ .., verdict] = c.cells().map(|cell| escape(&cell));
        let words: String = words.iter().map(|w| format!("<td>{w}</td>")).collect();
        let (sentence, class) = (escape(&c.text), class(c.verdict));
        format!(
            "<tr title=\"{sentence}\"><th>{method}</th>{words}<td><b class=\"{class}\">{verdict}</b></td></tr>\n"
        )
    };
    let lines: String = all.iter().map(line).collect();
    scrolling("Paired tests", &comparisons::COLUMNS, &lines)
}

/// The colour of a verdict.
fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Yes => "yes",
        Verdict::No => "no",
        Verdict::Unclear | Verdict::Unknown => "unclear",
    }
}

/// A page of these parts; `title` is escaped already.
pub(crate) fn page(title: &str, body: &[String]) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{}\n</main>\n</body>\n</html>\n",
        body.join("\n")
    )
}

pub(crate) fn section(id: &str, title: &str, body: &str) -> String {
    format!(
        "<section id=\"{id}\" aria-labelledby=\"h-{id}\">\n<h2 id=\"h-{id}\">{title}</h2>\n{body}\n</section>"
    )
}

/// A table that scrolls by itself on a narrow screen.
pub(crate) fn scrolling(name: &str, columns: &[&str], rows: &str) -> String {
    let head: String = columns
        .iter()
        .map(|c| format!("<th scope=\"col\">{c}</th>"))
        .collect();
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{name}\">\n<table><thead><tr>{head}</tr></thead>\n\
         <tbody>\n{rows}</tbody></table>\n</div>"
    )
}

fn cells(cells: &[String]) -> String {
    let (first, rest) = cells
        .split_first()
        .map_or(("", [].as_slice()), |(f, r)| (f.as_str(), r));
    let rest: String = rest
        .iter()
        .map(|c| format!("<td>{}</td>", escape(c)))
        .collect();
    format!("<th scope=\"row\">{}</th>{rest}", escape(first))
}

pub(crate) fn results_table(results: &Results) -> String {
    let depth = results.rows.iter().map(|r| r.depth).max().unwrap_or(0);
    let mut rows = String::new();
    for line in table::lines(results) {
        let aggregate = line.kind == Kind::Aggregate;
        let class = if aggregate {
            " class=\"aggregate\""
        } else {
            ""
        };
        let strip = line.kept.map_or(String::new(), |kept| strip(&kept, depth));
        let mut numbers = cells(&line.cells[..line.cells.len() - 1]);
        if aggregate {
            // `26 (20 to 32)`: the spread below the median, or the column would grow too wide.
            numbers = numbers.replace(" (", " <small>(").replace(')', ")</small>");
        }
        rows += &format!("<tr{class}>{numbers}<td>{strip}</td></tr>\n");
    }
    scrolling("Results", table::COLUMNS, &rows)
        + &format!(
            "\n<p class=\"note\">{}</p>",
            escape(&table::legend(results))
        )
}

/// The kept blocks as a row of full and empty boxes.
fn strip(kept: &[usize], depth: usize) -> String {
    let boxes: String = (0..depth)
        .map(|i| {
            if kept.contains(&i) {
                "<i class=\"on\"></i>"
            } else {
                "<i></i>"
            }
        })
        .collect();
    let list: Vec<String> = kept.iter().map(usize::to_string).collect();
    let label = format!("blocks {}", list.join(", "));
    format!(
        "<span class=\"strip\" role=\"img\" aria-label=\"{label}\" title=\"{label}\">{boxes}</span>"
    )
}

pub(crate) fn findings_list(results: &Results) -> String {
    let mut out = String::new();
    for finding in findings(results) {
        out += &format!(
            "<h3>{}</h3>\n<ul class=\"answers\">\n",
            escape(finding.question)
        );
        for (verdict, text) in finding.answers {
            let class = class(verdict);
            out += &format!(
                "<li><b class=\"{class}\">{}:</b> {}</li>\n",
                verdict.word(),
                escape(&text)
            );
        }
        out += "</ul>\n";
    }
    let list: String = caveats(results)
        .iter()
        .map(|c| format!("<li>{}</li>\n", escape(c)))
        .collect();
    format!("{out}<h3>To be kept in mind</h3>\n<ul>\n{list}</ul>")
}

pub(crate) fn figure(figure: &Figure) -> String {
    let entry = |(series, name): &(usize, String)| {
        format!("<li><i class=\"k{series}\"></i>{}</li>", escape(name))
    };
    let legend: String = figure.legend.iter().map(entry).collect();
    let legend = if legend.is_empty() {
        legend
    } else {
        format!("<ul class=\"legend\">{legend}</ul>\n")
    };
    format!(
        "<figure>\n<h3>{}</h3>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\">{}</div>\n{legend}\
         <figcaption>{}</figcaption>\n</figure>\n",
        escape(&figure.title),
        figure.svg,
        escape(&figure.caption)
    )
}

pub(crate) fn samples(grids: &[Grid]) -> String {
    let one = |grid: &Grid| {
        let alt = escape(&format!(
            "Samples of {}, one class per column, in the same order and from the same noise as in every other grid",
            grid.name
        ));
        let caption = escape(&grid.caption);
        format!(
            "<figure><img src=\"{}\" alt=\"{alt}\"><figcaption>{caption}</figcaption></figure>\n",
            grid.address
        )
    };
    format!(
        "<div class=\"grids\">\n{}</div>",
        grids.iter().map(one).collect::<String>()
    )
}

/// The paper's numbers, with what has to be said of them.
pub(crate) fn papers(table: &paper::Table) -> String {
    let rows: String = table
        .lines
        .iter()
        .map(|line| format!("<tr>{}</tr>\n", cells(line)))
        .collect();
    let lines = scrolling("The paper's results", table.columns, &rows);
    let note = table.note.map_or(String::new(), |n| {
        format!("\n<p class=\"note\">{}</p>", escape(n))
    });
    format!(
        "<p><strong>{}</strong></p>\n{lines}{note}",
        escape(table.label)
    )
}

fn record(results: &Results) -> String {
    const STAGES: &[&str] = &[
        "search",
        "cut",
        "calibration",
        "recovery",
        "loss",
        "sampling",
        "evaluation",
    ];
    let mut rows = String::new();
    for r in &results.rows {
        let cost = |stage: &&str| {
            r.stages.get(*stage).map_or("–".into(), |c| {
                let memory = c
                    .peak_rss_bytes
                    .map(|b| format!(", {:.0} MiB", b as f64 / f64::from(1 << 20)));
                format!("{:.1} s{}", c.seconds, memory.unwrap_or_default())
            })
        };
        let line: Vec<String> = std::iter::once(r.name.clone())
            .chain(STAGES.iter().map(cost))
            .chain([r.seed.to_string()])
            .collect();
        rows += &format!("<tr>{}</tr>\n", cells(&line));
    }
    let columns: Vec<&str> = ["method"]
        .iter()
        .chain(STAGES)
        .chain(&["seed"])
        .copied()
        .collect();
    let costs = scrolling("Seconds and memory", &columns, &rows);
    let settings = serde_json::to_string_pretty(&results.settings).unwrap_or_default();
    format!(
        "<details><summary>Seconds and peak memory of every stage</summary>\n<p class=\"note\">Stages that rows share are named in each.</p>\n{costs}\n</details>\n\
         <details><summary>Commands, to be pasted at the repository's root</summary>\n<pre>{}</pre>\n</details>\n\
         <details><summary>Settings</summary>\n<pre>{}</pre>\n</details>\n<p class=\"note\">Binary: SHA-256 {}</p>",
        escape(&results.commands.join("\n")),
        escape(&settings),
        escape(&results.machine.binary_sha256),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sample::results;

    #[test]
    fn the_page_is_one_file_that_fetches_nothing_and_closes_its_tags() {
        let figures = [Figure {
            title: "a < b".into(),
            caption: "c".into(),
            svg: "<svg xmlns=\"http://www.w3.org/2000/svg\"/>".into(),
            legend: vec![(3, "x".into())],
        }];
        let grids = [Grid {
            name: "n".into(),
            caption: "c".into(),
            address: "data:image/png;base64,AAAA".into(),
        }];
        let page = report(&results(), &figures, &grids);
        for forbidden in ["src=\"http", "href=", "<script", "@import", "url("] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        for part in [
            "lang=\"en\"",
            "prefers-color-scheme: dark",
            "alt=\"Samples of n",
            "TestOS &lt;1&gt;",
            "<h3>a &lt; b</h3>",
            "class=\"aggregate\"",
        ] {
            assert!(page.contains(part), "{part}");
        }
        well_formed(&page);
    }

    /// HTML that is XML but for its void elements: a parser finds every unclosed or crossed tag.
    pub(crate) fn well_formed(page: &str) {
        let xml = page.replace("<!DOCTYPE html>", "");
        let xml = closed(&xml, &["meta", "img"]);
        roxmltree::Document::parse(&xml).unwrap();
    }

    /// Closes void elements: `<img …>` to `<img …/>`.
    fn closed(page: &str, tags: &[&str]) -> String {
        let mut out = page.to_string();
        for tag in tags {
            let parts: Vec<String> = out
                .split(&format!("<{tag} "))
                .enumerate()
                .map(|(i, part)| {
                    if i == 0 {
                        part.into()
                    } else {
                        part.replacen('>', "/>", 1)
                    }
                })
                .collect();
            out = parts.join(&format!("<{tag} "));
        }
        out
    }

    #[test]
    fn kept_blocks_are_full_boxes() {
        let s = strip(&[0, 2], 4);
        assert_eq!(s.matches("<i class=\"on\">").count(), 2);
        assert_eq!(s.matches("<i>").count(), 2);
        assert!(s.contains("aria-label=\"blocks 0, 2\""));
    }
}
