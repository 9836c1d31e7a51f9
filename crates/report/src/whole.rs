//! The report of several experiments: every part's table under its family, and the paper's beside them.

use serde::Serialize;

use crate::findings::headline;
use crate::report::Report;
use crate::results::Results;
use crate::svg::escape;
use crate::{html, markdown, paper, table};

/// All parts of a run: the content of its `results.json`.
#[derive(Serialize)]
pub struct Whole<'a> {
    /// Name of the preset.
    preset: &'a str,
    title: Option<&'a str>,
    /// Seconds of all stages of all parts.
    seconds: f64,
    /// Seconds on the clock.
    wall_seconds: f64,
    parts: Vec<&'a Results>,
    #[serde(skip)]
    reports: &'a [Report],
}

impl<'a> Whole<'a> {
    /// The parts of the preset `preset`, whose reports are written.
    pub fn of(preset: &'a str, title: Option<&'a str>, reports: &'a [Report]) -> Self {
        let parts: Vec<&Results> = reports.iter().map(|r| &r.results).collect();
        Self {
            preset,
            title,
            seconds: parts.iter().map(|r| r.seconds).sum(),
            wall_seconds: parts.iter().map(|r| r.wall_seconds).sum(),
            parts,
            reports,
        }
    }

    fn name(&self) -> String {
        match self.title {
            Some(title) => format!("tinyfusion: {title}"),
            None => format!("tinyfusion: the experiments of {}", self.preset),
        }
    }

    fn paper(&self) -> paper::Table {
        let families: Vec<&str> = self.parts.iter().map(|r| r.family.as_str()).collect();
        paper::table_2(&families)
    }

    /// How long everything took, and what must not be compared.
    fn note(&self) -> String {
        format!(
            "All stages of all parts together took {}. Rows are comparable within a part: the families differ in teacher, \
             training loss, sampler and budget.",
            crate::table::duration(self.seconds)
        )
    }

    /// Every part's table, and once what they mean and where they were measured: to be pasted elsewhere.
    pub fn tables(&self) -> String {
        let mut out = String::new();
        for results in &self.parts {
            out += &format!(
                "## {}\n\n**{}**\n\n{}\nPreset `{}`. {}\n\n",
                heading(results),
                headline(results),
                markdown::compact(results),
                results.preset,
                table::costs(results)
            );
        }
        let legend = self
            .parts
            .first()
            .map_or(String::new(), |first| table::legend(first));
        out + &format!("{}\n\nMeasured on: {}.\n", legend, self.place())
    }

    fn place(&self) -> String {
        let first = self.parts.first();
        first.map_or(String::new(), |r| table::place(&r.machine))
    }

    /// `report.md` of all parts.
    pub fn markdown(&self) -> String {
        let mut out = format!(
            "# {}\n\n{}\n\nPictures: [report.html](report.html). Every number: [results.json](results.json). Each part has a report \
             of its own, with its plots, limits and commands:\n\n",
            self.name(),
            self.note()
        );
        for results in &self.parts {
            out += &format!(
                "- {}: [{1}/report.html]({1}/report.html), [{1}/report.md]({1}/report.md)\n",
                results.family, results.preset
            );
        }
        out += &format!("\n{}", self.tables());
        out += &format!(
            "\n## The paper's table 2\n\n{}",
            markdown::papers(&self.paper())
        );
        out += "\n## What the numbers show\n";
        for results in &self.parts {
            out += &format!(
                "\n### {}\n\n{}",
                heading(results),
                markdown::findings_list(results)
            );
        }
        out
    }

    /// `report.html` of all parts: one file, nothing fetched.
    pub fn html(&self) -> String {
        let title = escape(&self.name());
        let mut body = vec![format!(
            "<header><h1>{title}</h1><p>{} Measured on: {}.</p></header>",
            escape(&self.note()),
            escape(&self.place())
        )];
        for report in self.reports {
            let results = &report.results;
            let text = format!(
                "<p class=\"headline\">{}</p>\n{}\n<p class=\"note\">{} The part's own report, with plots and commands, is \
                 {}/report.html.</p>\n<details><summary>What the numbers show</summary>\n{}\n</details>\n\
                 <h3>Samples from the same noise</h3>\n{}",
                escape(&headline(results)),
                html::results_table(results),
                escape(&table::costs(results)),
                escape(&results.preset),
                html::findings_list(results),
                html::samples(&report.grids),
            );
            let id = escape(&results.preset);
            body.push(html::section(&id, &escape(&heading(results)), &text));
        }
        body.push(html::section(
            "paper",
            "The paper's table, beside it",
            &html::papers(&self.paper()),
        ));
        html::page(&title, &body)
    }
}

fn heading(results: &Results) -> String {
    format!("{}, teacher {}", results.family, results.teacher.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::results;

    fn report(family: &str) -> Report {
        let mut results = results();
        results.family = family.into();
        results.preset = format!("made-up-{family}");
        results.teacher = format!("models/{family}").into();
        results.rows[0].fid = Some(family.len() as f64 + 0.25);
        Report {
            results,
            figures: Vec::new(),
            grids: Vec::new(),
        }
    }

    #[test]
    fn every_part_has_its_table_beside_the_papers() {
        let reports = ["SiT", "MAR"].map(report);
        let whole = Whole::of("both", Some("two <families>"), &reports);
        let text = whole.markdown();
        for part in [
            "# tinyfusion: two <families>\n",
            "## SiT, teacher models/SiT\n",
            "## MAR, teacher models/MAR\n",
            "(made-up-MAR/report.html)",
            "| TinyMAR-D16 (learned) | 32 → 16 | 277M | 40 epochs | 2.28 | 283.4 |",
            "took 28:00 min",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        assert!(!text.contains("DiT-XL/2"));
        assert_eq!(text.matches("| **random 1:2, median of 4").count(), 2);
        assert!(text.contains(&whole.tables()));
        assert_eq!(text.matches("Calibration loss: ").count(), 1);
        let page = whole.html();
        html::tests::well_formed(&page);
        for part in ["two &lt;families&gt;", "id=\"made-up-SiT\"", "TinySiT-D14"] {
            assert!(page.contains(part), "{part}");
        }
        assert_eq!(page.matches("class=\"aggregate\"").count(), 2);
        for forbidden in ["src=\"http", "href=", "<script", "url("] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
        let json: serde_json::Value = serde_json::to_value(&whole).unwrap();
        let parts = json["parts"].as_array().unwrap();
        assert_eq!((parts.len(), &parts[1]["family"]), (2, &"MAR".into()));
        assert_eq!(parts[0]["rows"].as_array().unwrap().len(), 12);
        assert_eq!(json["seconds"], 1680.0);
    }
}
