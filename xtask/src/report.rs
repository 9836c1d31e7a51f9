//! The report of a run: `results.json`, `report.md` and the self-contained `report.html`, with pictures of its files.

use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine as _;
use tinyfusion_report::plots::{self, Curve, Decision, Metric, Selection};
use tinyfusion_report::svg::short;
use tinyfusion_report::{Figure, Grid, Recovery, Report, ResultRow, Results, Whole, study_figures};

use crate::files;
use crate::reproduce::{Row, say};

/// Writes the four files into `out`.
pub(crate) fn write(results: Results, rows: &[Row], out: &Path) -> Result<Report> {
    let read = |path: &Path| std::fs::read_to_string(out.join(path));
    let mut pictures = study_figures(&results, &read)?;
    pictures.extend(figures(&results, rows)?);
    let report = Report {
        figures: pictures,
        grids: grids(&results, rows)?,
        results,
    };
    files::write_json(&out.join("results.json"), &report.results)?;
    pages(out, &report.markdown(), &report.summary(), &report.html())?;
    Ok(report)
}

/// Says the main thing, and where the rest stands.
pub(crate) fn announce(report: &Report, out: &Path) {
    println!("\n{}\n{}", report.summary(), report.headline());
    places(out);
}

/// Writes the four files of several parts into `out` and says the main thing.
pub(crate) fn write_whole(whole: &Whole<'_>, out: &Path) -> Result<()> {
    files::write_json(&out.join("results.json"), whole)?;
    let summary = whole.tables();
    pages(out, &whole.markdown(), &summary, &whole.html())?;
    println!("\n{summary}");
    places(out);
    Ok(())
}

fn pages(out: &Path, markdown: &str, summary: &str, html: &str) -> Result<()> {
    let pages = [
        ("report.md", markdown),
        ("table.md", summary),
        ("report.html", html),
    ];
    pages
        .iter()
        .try_for_each(|(name, text)| files::write_atomic(&out.join(name), text.as_bytes()))
}

fn places(out: &Path) {
    println!(
        "report: {0}/report.html, {0}/report.md, {0}/results.json\ntable: {0}/table.md",
        say(out)
    );
}

fn figures(results: &Results, rows: &[Row]) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut searches = Vec::new();
    let (mut fine_tuning, mut distillation) = (Vec::new(), Vec::new());
    for (row, result) in rows.iter().zip(&results.rows) {
        let series = plots::series(result, results);
        // Both recoveries of a mask share its search: it is drawn once.
        let first = row.recovery == Recovery::FineTuning;
        if let (true, Some(history), Some(selection)) =
            (first, &row.files.history, &row.files.selection)
        {
            let history: Vec<Decision> = files::read_json_lines(history)?;
            let selection: Selection = files::read_json(selection)?;
            let name = row.name.split(',').next().unwrap_or(&row.name);
            figures.push(Figure {
                title: format!("Decisions: {name}"),
                caption: "Blocks that would be kept if the decision fell at that step, as strong as it is sure. Dots: kept in the end.".into(),
                svg: plots::decisions(name, &history, &selection.groups, &selection.kept),
                legend: Vec::new(),
            });
            if let Some(metrics) = &row.files.search_metrics {
                searches.push(curve(name, series, metrics)?);
            }
        }
        // A training that failed at once has no losses.
        let metrics = row.files.metrics.as_ref();
        if let Some(metrics) = metrics.filter(|m| result.failed.is_none() || m.exists()) {
            let curves = if first {
                &mut fine_tuning
            } else {
                &mut distillation
            };
            curves.push(curve(&row.name, series, metrics)?);
        }
    }
    let losses = [
        (
            "Loss of the searches",
            "Diffusion loss under sampled masks.",
            searches,
        ),
        (
            "Loss of fine-tuning",
            "Recovery of every cut model, same data and noise.",
            fine_tuning,
        ),
        (
            "Loss of masked distillation",
            "Another objective: not comparable with fine-tuning.",
            distillation,
        ),
    ];
    for (title, caption, curves) in losses {
        figures.push(Figure {
            title: title.into(),
            caption: format!("{caption} Trailing mean over a twentieth of the run."),
            svg: plots::losses(title, &curves),
            legend: legend(curves.into_iter().map(|c| (c.series, c.name))),
        });
    }
    figures.push(Figure {
        title: "FID over calibration loss".into(),
        caption: "Does the loss right after the cut tell how well a mask recovers? Filled: fine-tuned; hollow: masked distillation.".into(),
        svg: plots::fid_over_calibration(results),
        legend: Vec::new(),
    });
    figures.push(Figure {
        title: "Speed over depth".into(),
        caption: "Sampling with guidance on this machine. Dashed: time proportional to depth."
            .into(),
        svg: plots::speed_over_depth(results),
        legend: Vec::new(),
    });
    Ok(figures)
}

/// One entry per colour: the random masks share one.
fn legend(entries: impl Iterator<Item = (usize, String)>) -> Vec<(usize, String)> {
    let mut legend: Vec<(usize, String)> = Vec::new();
    for (series, name) in entries {
        match legend.iter_mut().find(|(s, _)| *s == series) {
            Some((1, shared)) => *shared = "random masks".into(),
            Some(_) => {}
            None => legend.push((series, name)),
        }
    }
    legend
}

fn curve(name: &str, series: usize, metrics: &Path) -> Result<Curve> {
    let lines: Vec<Metric> = files::read_json_lines(metrics)?;
    let points = lines
        .iter()
        .filter_map(|m| Some((m.step as f64, m.loss.filter(|l| l.is_finite())?)))
        .collect();
    Ok(Curve {
        name: name.into(),
        series,
        points,
    })
}

/// Rows of samples that are shown of each grid.
const GRID_ROWS: u32 = 4;

fn grids(results: &Results, rows: &[Row]) -> Result<Vec<Grid>> {
    let columns = results
        .settings
        .pointer("/sample/flags/grid-columns")
        .and_then(serde_json::Value::as_u64)
        .unwrap_or(10);
    let grid = |(row, result): (&Row, &ResultRow)| {
        let png = std::fs::read(&row.files.grid)
            .with_context(|| format!("cannot read {}", say(&row.files.grid)))?;
        let png = first_rows(&png, columns as u32).with_context(|| say(&row.files.grid))?;
        let fid = match result.score() {
            Some(fid) => format!("FID {}", short(fid)),
            None if result.diverged() => "diverged".into(),
            None => "no FID".into(),
        };
        Ok(Grid {
            name: row.name.clone(),
            caption: format!("{}; {fid}", row.name),
            address: format!(
                "data:image/png;base64,{}",
                base64::engine::general_purpose::STANDARD.encode(png)
            ),
        })
    };
    // A row whose sampling failed has no pictures.
    rows.iter()
        .zip(&results.rows)
        .filter(|(_, result)| result.images_per_second.is_some())
        .map(grid)
        .collect()
}

/// Cuts a grid of square pictures to its first rows: a report has no room for all.
fn first_rows(png: &[u8], columns: u32) -> Result<Vec<u8>> {
    let picture = image::load_from_memory_with_format(png, image::ImageFormat::Png)?;
    let height = (picture.width() * GRID_ROWS / columns.max(1)).max(1);
    if picture.height() <= height {
        return Ok(png.to_vec());
    }
    let mut out = std::io::Cursor::new(Vec::new());
    picture
        .crop_imm(0, 0, picture.width(), height)
        .write_to(&mut out, image::ImageFormat::Png)?;
    Ok(out.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_cut_to_its_first_rows() {
        let png = |w, h| {
            let mut out = std::io::Cursor::new(Vec::new());
            image::RgbImage::new(w, h)
                .write_to(&mut out, image::ImageFormat::Png)
                .unwrap();
            out.into_inner()
        };
        let size = |png: &[u8]| {
            let p = image::load_from_memory(png).unwrap();
            (p.width(), p.height())
        };
        assert_eq!(size(&first_rows(&png(50, 300), 10).unwrap()), (50, 20));
        assert_eq!(size(&first_rows(&png(50, 15), 10).unwrap()), (50, 15));
        assert!(first_rows(b"no picture", 10).is_err());
    }

    #[test]
    fn random_masks_share_an_entry_of_the_legend() {
        let entries =
            [(1, "random a"), (1, "random b"), (3, "learned")].map(|(s, n)| (s, n.to_string()));
        let expected = [(1, "random masks"), (3, "learned")].map(|(s, n)| (s, n.to_string()));
        assert_eq!(legend(entries.into_iter()), expected);
    }
}
