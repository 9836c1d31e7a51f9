//! A table of groups: columns that tell them apart, then what they measured. One code for every study.

use crate::class::same_work;
use crate::groups::{Group, groups};
use crate::latex::escape;
use crate::measure::{Measure, plus_minus};
use crate::results::{ResultRow, Results};
use crate::study::cell;

/// Cells of text, with the best of every measured column marked.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Names of all columns.
    pub columns: Vec<String>,
    /// How many of them tell groups apart; the others are measured.
    pub keys: usize,
    /// One per group.
    pub lines: Vec<Line>,
}

/// A group of the table.
#[derive(Debug, Clone)]
pub struct Line {
    /// As many as there are columns.
    pub cells: Vec<String>,
    /// Whether the cell is its column's best among the methods of its size and budget; the dense model, which nothing was cut from, does not compete.
    pub best: Vec<bool>,
}

/// What stands where nothing was measured.
const NOTHING: &str = "–";

/// The table of a study, or of an experiment of no kind by its methods.
///
/// Rows are grouped by their groups first; a study's columns sort groups that are equal in the left column together, in
/// the order of their first appearance.
pub fn matrix(results: &Results) -> Matrix {
    let groups = groups(&results.rows);
    let measures: Vec<Measure> = Measure::ALL
        .into_iter()
        .filter(|m| results.rows.iter().any(|r| m.of(r).is_some()))
        .collect();
    let seeds = groups.iter().any(|g| g.rows.len() > 1);
    let names = results.study.as_ref().map(|s| {
        let columns = s.columns();
        columns.into_iter().map(String::from).collect::<Vec<_>>()
    });
    let key = |g: &Group<'_>| -> Vec<String> {
        match &names {
            Some(names) => names.iter().map(|c| cell(g.first(), c)).collect(),
            None => vec![g.name.clone()],
        }
    };
    let mut keyed: Vec<(Vec<String>, &Group<'_>)> = groups.iter().map(|g| (key(g), g)).collect();
    if names.is_some() {
        together(&mut keyed);
    }
    // Groups that no column tells apart get their names beside them: they must not look like one method.
    let ambiguous = names.is_some()
        && (1..keyed.len()).any(|i| keyed[..i].iter().any(|(k, _)| *k == keyed[i].0));
    let x_name = results.study.as_ref().and_then(|s| s.x_name.as_deref());
    let mut columns: Vec<String> = match names {
        Some(names) => names
            .into_iter()
            .map(|c| match (c.as_str(), x_name) {
                ("x", Some(name)) => name.to_string(),
                _ => c,
            })
            .collect(),
        None => vec!["method".into()],
    };
    if ambiguous {
        columns.push("method".into());
    }
    if seeds {
        columns.push("seeds".into());
    }
    let keys = columns.len();
    columns.extend(measures.iter().map(|m| m.name().to_string()));
    let mut lines: Vec<Line> = keyed
        .iter()
        .map(|(key, group)| {
            let mut cells = key.clone();
            if ambiguous {
                cells.push(group.name.clone());
            }
            if seeds {
                cells.push(match group.lost() {
                    Some(lost) => format!("{} ({lost})", group.rows.len()),
                    None => group.rows.len().to_string(),
                });
            }
            cells.extend(measures.iter().map(|&m| measured(group, m)));
            Line {
                best: vec![false; cells.len()],
                cells,
            }
        })
        .collect();
    for (i, measure) in measures.iter().enumerate() {
        for line in best(&keyed, *measure) {
            lines[line].best[keys + i] = true;
        }
    }
    Matrix {
        columns,
        keys,
        lines,
    }
}

/// Brings groups with an equal left cell together, and within those the ones with an equal second cell, and so on.
fn together(keyed: &mut [(Vec<String>, &Group<'_>)]) {
    let depth = keyed.first().map_or(0, |(key, _)| key.len());
    let order: Vec<Vec<String>> = keyed.iter().map(|(key, _)| key.clone()).collect();
    let rank = |key: &[String]| -> Vec<usize> {
        (1..=depth)
            .map(|n| {
                order
                    .iter()
                    .position(|k| k[..n] == key[..n])
                    .unwrap_or(order.len())
            })
            .collect()
    };
    keyed.sort_by_key(|(key, _)| rank(key));
}

fn measured(group: &Group<'_>, measure: Measure) -> String {
    if let Some(moments) = measure.over(group.rows.iter().copied()) {
        return plus_minus(moments);
    }
    let all = |of: &dyn Fn(&ResultRow) -> bool| group.rows.iter().all(|r| of(r));
    if all(&|r| r.diverged()) && measure != Measure::CalibrationLoss {
        "diverged".into()
    } else if all(&|r| r.failed.is_some()) {
        "failed".into()
    } else {
        NOTHING.into()
    }
}

/// The lines with the best mean of their size, budget and x, where at least two compete and are not all alike.
fn best(keyed: &[(Vec<String>, &Group<'_>)], measure: Measure) -> Vec<usize> {
    let means: Vec<(usize, &ResultRow, f64)> = keyed
        .iter()
        .enumerate()
        // A method that loses seeds has no mean to win with.
        .filter(|(_, (_, g))| g.first().criterion != "dense" && g.lost().is_none())
        .filter_map(|(i, (_, g))| {
            let mean = measure.over(g.rows.iter().copied())?.mean;
            Some((i, g.first(), mean))
        })
        .collect();
    let better = |a: f64, b: f64| {
        if measure.lower_is_better() {
            a < b
        } else {
            a > b
        }
    };
    let is_best = |&&(_, row, mean): &&(usize, &ResultRow, f64)| {
        let mut rivals = means.iter().filter(|(_, r, _)| same_work(row, r));
        let beaten = rivals.clone().any(|(.., other)| better(*other, mean));
        !beaten && rivals.any(|(.., other)| better(mean, *other))
    };
    means.iter().filter(is_best).map(|m| m.0).collect()
}

impl Matrix {
    /// As a table of Markdown, the best in bold.
    pub fn markdown(&self) -> String {
        let lines = self.lines.iter().map(|line| {
            let bold = |(cell, best): (&String, &bool)| {
                if *best {
                    format!("**{cell}**")
                } else {
                    cell.clone()
                }
            };
            line.cells.iter().zip(&line.best).map(bold).collect()
        });
        let columns: Vec<&str> = self.columns.iter().map(String::as_str).collect();
        crate::markdown::grid(&columns, lines)
    }

    /// As a table of HTML, the best in bold.
    pub fn html(&self, name: &str) -> String {
        let row = |line: &Line| {
            let cell = |(i, (cell, best)): (usize, (&String, &bool))| {
                let text = crate::svg::escape(cell);
                match (i, best) {
                    (0, _) => format!("<th scope=\"row\">{text}</th>"),
                    (_, true) => format!("<td><strong>{text}</strong></td>"),
                    (_, false) => format!("<td>{text}</td>"),
                }
            };
            let cells: String = line
                .cells
                .iter()
                .zip(&line.best)
                .enumerate()
                .map(cell)
                .collect();
            format!("<tr>{cells}</tr>\n")
        };
        let columns: Vec<String> = self.columns.iter().map(|c| crate::svg::escape(c)).collect();
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let rows: String = self.lines.iter().map(row).collect();
        crate::html::scrolling(&crate::svg::escape(name), &columns, &rows)
    }

    /// As rows of a LaTeX tabular: cells between `&`, `\\` at the end, the best in `\textbf`. The first line is a comment
    /// with the columns' names.
    pub fn latex(&self) -> String {
        let mut out = format!(
            "% {}\n",
            self.columns
                .iter()
                .map(|c| escape(c))
                .collect::<Vec<_>>()
                .join(" & ")
        );
        for line in &self.lines {
            let cell = |(cell, best): (&String, &bool)| {
                let text = escape(cell);
                if *best {
                    format!("\\textbf{{{text}}}")
                } else {
                    text
                }
            };
            let cells: Vec<String> = line.cells.iter().zip(&line.best).map(cell).collect();
            out += &format!("{} \\\\\n", cells.join(" & "));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::results;
    use crate::study::{Kind, Study};

    #[test]
    fn without_a_study_the_methods_are_the_lines() {
        let table = matrix(&results());
        assert_eq!(table.columns[..2], ["method", "seeds"]);
        assert_eq!(table.keys, 2);
        assert!(
            table
                .lines
                .iter()
                .all(|l| l.cells.len() == table.columns.len())
        );
        let fid = table.columns.iter().position(|c| c == "FID").unwrap();
        let random = table
            .lines
            .iter()
            .find(|l| l.cells[0].starts_with("random"))
            .unwrap();
        // 28, 20, 32, 24: mean 26, deviation √(80 / 3).
        assert_eq!(random.cells[1..2], ["4"]);
        assert_eq!(random.cells[fid], "26.0 ± 5.2");
        let best: Vec<&str> = table
            .lines
            .iter()
            .filter(|l| l.best[fid])
            .map(|l| l.cells[0].as_str())
            .collect();
        assert_eq!(
            best,
            ["learned 2:4 (lora), masked KD"],
            "the dense teacher does not compete"
        );
    }

    #[test]
    fn the_best_is_the_best_of_its_size_and_budget() {
        let table = matrix(&crate::sample::study());
        let fid = table.columns.iter().position(|c| c == "FID").unwrap();
        let best: Vec<&str> = table
            .lines
            .iter()
            .filter(|l| l.best[fid])
            .map(|l| l.cells[0].as_str())
            .collect();
        // Of four classes, and not only of the deepest that was recovered longest.
        assert_eq!(best, ["learned"; 4]);
        // Where all are alike there is no best.
        let precision = table.columns.iter().position(|c| c == "P").unwrap();
        assert!(table.lines.iter().all(|l| !l.best[precision]));
    }

    #[test]
    fn a_study_names_its_columns_and_brings_equal_ones_together() {
        let mut r = results();
        r.study = Some(Study {
            kind: Kind::Table1,
            title: None,
            columns: vec!["recovery".into(), "criterion".into(), "pattern".into()],
            x_name: None,
            against: Vec::new(),
        });
        let table = matrix(&r);
        let recoveries: Vec<&str> = table.lines.iter().map(|l| l.cells[0].as_str()).collect();
        let mut distinct = recoveries.clone();
        distinct.dedup();
        assert_eq!(distinct, ["none", "fine-tuning", "masked KD"]);
        // Two dense lines differ in nothing that a column shows: their names do.
        assert_eq!(table.columns[3..5], ["method", "seeds"]);
        assert_eq!(table.lines[1].cells[3], "dense teacher, 12 sampling steps");
    }

    #[test]
    fn latex_is_escaped_and_bold_where_best() {
        let mut r = results();
        r.rows[0].name = "50 % & a_b".into();
        let text = matrix(&r).latex();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("% method & seeds & "));
        assert!(
            lines[1].starts_with("50 \\% \\& a\\_b & 1 & -- & "),
            "{text}"
        );
        assert!(text.contains("26.0 $\\pm$ 5.2"));
        assert!(text.contains("\\textbf{13}"), "{text}");
        assert!(lines[1..].iter().all(|l| l.ends_with(" \\\\")));
        // pdfLaTeX has no glyphs for what the reports write elsewhere.
        r.rows[0].name = "masked KD, 2σ, β ≥ 0.1, τ ≤ 4, 3 × 2 − 1 → 0, Δ, é, ∮ [*]\n".into();
        r.rows[1].labels = [("Σ".to_string(), "µ…".to_string())].into();
        let text = matrix(&r).latex();
        assert!(text.is_ascii(), "{text}");
        assert!(text.contains("2$\\sigma$, $\\beta$ $\\ge$ 0.1"), "{text}");
    }

    #[test]
    fn a_method_that_diverged_says_so_and_does_not_compete() {
        let mut r = results();
        let last = r.rows.len() - 1;
        r.rows[last].held_out_loss = None;
        r.rows[last].fid = Some(0.1);
        let table = matrix(&r);
        let fid = table.columns.iter().position(|c| c == "FID").unwrap();
        let line = table.lines.last().unwrap();
        assert_eq!(line.cells[fid], "diverged");
        assert_eq!(line.cells[1], "1 (1 diverged)");
        assert!(!line.best[fid]);
    }
}
