//! The plots of a section: those of its study, or of an experiment of no kind.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::groups::groups;
use crate::measure::Measure;
use crate::merge::Error;
use crate::plots::{self, Activations, Decision, Search, Selection};
use crate::report::Figure;
use crate::results::{ResultRow, Results};
use crate::study::Kind;

/// Reads a file that a row's [`crate::Traces`] name, as text.
pub type Read<'a> = &'a dyn Fn(&Path) -> std::io::Result<String>;

/// The plots that the study asks for; none without a study. A table is drawn as dots, a line per method.
///
/// # Errors
/// [`Error::Trace`] where a file that a row names cannot be read or is not what it should be.
pub fn study_figures(results: &Results, read: Read<'_>) -> Result<Vec<Figure>, Error> {
    let Some(study) = &results.study else {
        return Ok(Vec::new());
    };
    let one = |title: &str, caption: &str, svg: String, legend| Figure {
        title: title.into(),
        caption: caption.into(),
        svg,
        legend,
    };
    let has_x = results.rows.iter().any(|r| r.x.is_some());
    Ok(match study.kind {
        Kind::Table3 => vec![one(
            "Recovered FID over calibration loss",
            &plots::correlations(results),
            plots::criteria_over_calibration(results),
            vec![
                (1, "random masks".into()),
                (2, "other criteria".into()),
                (3, "learned".into()),
            ],
        )],
        Kind::Figure4 => vec![one(
            "Speed over depth and width",
            "Sampling on the machine named above. Dashed: time proportional to depth. Triangles: pruned in width, where a model \
             pruned in depth would have as many parameters.",
            plots::speed_over_compression(results),
            vec![(3, "pruned in depth".into()), (2, "pruned in width".into())],
        )],
        Kind::Figure6 => decisions(results, read)?,
        Kind::Activations => hidden_states(results, read)?,
        _ if has_x => {
            let (svg, legend) = plots::fid_over_x(results);
            let caption = "Lower is better. Whiskers: one standard deviation over seeds.";
            vec![one("FID of the recoveries", caption, svg, legend)]
        }
        kind => [Measure::Fid, Measure::HeldOutLoss]
            .into_iter()
            .filter_map(|measure| {
                let (svg, legend) = plots::dots(results, kind, measure)?;
                let title = format!("{} of every method", measure.name());
                let title = title[..1].to_uppercase() + &title[1..];
                Some(one(&title, DOTS, svg, legend))
            })
            .collect(),
    })
}

/// What is drawn by [`plots::dots`].
const DOTS: &str = "Lower is better. Large dots: means over seeds; small ones: the rows; whiskers: one standard deviation over seeds \
of search and recovery (over the masks, where they are random). Dashed: the dense model, where it is near. Hollow: pruned in width.";

/// The plots of any results that need no file: what a report of no study shows.
pub fn plain_figures(results: &Results) -> Vec<Figure> {
    let figure = |title: &str, caption: &str, svg| Figure {
        title: title.into(),
        caption: caption.into(),
        svg,
        legend: Vec::new(),
    };
    vec![
        figure(
            "FID over calibration loss",
            "Does the loss right after the cut tell how well a mask recovers? Filled: fine-tuned; hollow: masked distillation.",
            plots::fid_over_calibration(results),
        ),
        figure(
            "Speed over depth",
            "Sampling with guidance on this machine. Dashed: time proportional to depth.",
            plots::speed_over_depth(results),
        ),
    ]
}

/// All searches side by side; seeds of a search, and rows that share it, are drawn once.
fn decisions(results: &Results, read: Read<'_>) -> Result<Vec<Figure>, Error> {
    let mut searches: Vec<Search> = Vec::new();
    let mut drawn: Vec<&Path> = Vec::new();
    for group in groups(&results.rows) {
        let row = group.first();
        let (Some(history), Some(selection)) = (&row.traces.history, &row.traces.selection) else {
            continue;
        };
        if drawn.contains(&history.as_path()) {
            continue;
        }
        drawn.push(history);
        searches.push(Search {
            name: search_name(row, &group.name),
            history: lines::<Decision>(history, read)?,
            selection: json::<Selection>(selection, read)?,
        });
    }
    if searches.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![Figure {
        title: "Decisions over the steps of the searches".into(),
        caption: "Blocks that would be kept if the decision fell at that step, as strong as it is sure. Dots: kept in the end.".into(),
        svg: plots::searches(&searches),
        legend: Vec::new(),
    }])
}

fn search_name(row: &ResultRow, group: &str) -> String {
    match (&row.pattern, row.labels.get("delta")) {
        (Some(pattern), Some(delta)) => format!("{pattern}, {delta}"),
        (Some(pattern), None) => pattern.clone(),
        (None, _) => group.into(),
    }
}

fn hidden_states(results: &Results, read: Read<'_>) -> Result<Vec<Figure>, Error> {
    let mut figures = Vec::new();
    for group in groups(&results.rows) {
        // The first seed stands for the others.
        let Some(file) = &group.first().traces.activations else {
            continue;
        };
        let data: Activations = json(file, read)?;
        data.check().map_err(|message| trace(file, message))?;
        figures.push(Figure {
            title: format!("Hidden states: {}", group.name),
            caption: "After every block, over samples, tokens and channels. Far from the mean: massive activations.".into(),
            svg: plots::activations(&group.name, &data),
            legend: Vec::new(),
        });
    }
    Ok(figures)
}

fn trace(file: &Path, message: impl std::fmt::Display) -> Error {
    Error::Trace {
        file: file.display().to_string(),
        message: message.to_string(),
    }
}

fn json<T: DeserializeOwned>(file: &Path, read: Read<'_>) -> Result<T, Error> {
    let text = read(file).map_err(|e| trace(file, e))?;
    serde_json::from_str(&text).map_err(|e| trace(file, e))
}

/// One JSON object per line; a half-written last line is left out.
fn lines<T: DeserializeOwned>(file: &Path, read: Read<'_>) -> Result<Vec<T>, Error> {
    let text = read(file).map_err(|e| trace(file, e))?;
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let mut values = Vec::with_capacity(lines.len());
    for (i, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(value) => values.push(value),
            Err(_) if i + 1 == lines.len() => {}
            Err(e) => return Err(trace(file, format!("line {}: {e}", i + 1))),
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::results;
    use crate::study::Study;

    fn of(kind: Kind) -> Results {
        let mut r = results();
        r.study = Some(Study {
            kind,
            title: None,
            columns: Vec::new(),
            x_name: Some("batch size".into()),
            against: Vec::new(),
        });
        r
    }

    fn files(path: &Path) -> std::io::Result<String> {
        match path.to_str().unwrap() {
            "h" => Ok("{\"step\": 1, \"kept\": [0], \"confidence\": [0.5]}\n{\"step\": 2, \"kept\": [1], \"confidence\": [1]}\n{\"st".into()),
            "s" => Ok("{\"kept\": [1], \"groups\": [{\"n\": 1, \"m\": 2}]}".into()),
            "a" => Ok("{\"layers\": [{\"layer\": 0, \"edges\": [0, 1, 2], \"counts\": [5, 1], \"mean\": 1, \"std\": 1, \"max_abs\": 2}]}".into()),
            "bad" => Ok("{\"layers\": [{\"layer\": 0, \"edges\": [0, 1], \"counts\": [5, 1], \"mean\": 1, \"std\": 1, \"max_abs\": 2}]}".into()),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        }
    }

    /// Elements of a class in the only figure, which has to be XML.
    fn count(figures: &[Figure], tag: &str, class: &str) -> usize {
        let [figure] = figures else {
            panic!("{} figures", figures.len());
        };
        let xml = roxmltree::Document::parse(&figure.svg).unwrap();
        xml.descendants()
            .filter(|n| n.tag_name().name() == tag && n.attribute("class") == Some(class))
            .count()
    }

    #[test]
    fn random_masks_are_dots_and_every_criterion_has_its_marker() {
        let mut r = of(Kind::Table3);
        for (i, row) in r.rows.iter_mut().enumerate() {
            row.kept_layers = vec![i];
        }
        let figures = study_figures(&r, &files).unwrap();
        assert_eq!(count(&figures, "circle", "full s1 f1"), 4);
        assert_eq!(count(&figures, "circle", "full s3 f3"), 4);
        assert_eq!(count(&figures, "polygon", "full s2 f2"), 2);
        // Two kinds of corners: each criterion its own.
        let xml = roxmltree::Document::parse(&figures[0].svg).unwrap();
        let corners: Vec<usize> = xml
            .descendants()
            .filter(|n| n.tag_name().name() == "polygon")
            .map(|n| n.attribute("points").unwrap().split(' ').count())
            .collect();
        assert_eq!(corners, [4, 3]);
        for label in [
            "oracle (BK-SDM), masked KD",
            "learned 1:2 (lora), fine-tuned",
        ] {
            assert!(
                xml.descendants().any(|n| n.text() == Some(label)),
                "{label}"
            );
        }
        // By recovery: 4 random masks, the oracle, 2 learned; the calibration loss rises with FID in the sample.
        assert!(
            figures[0]
                .caption
                .contains("fine-tuning: 1 over 7 recoveries of 7 masks; the random ones alone: 1 over 4 recoveries of 4 masks. masked KD: "),
            "{}",
            figures[0].caption
        );
    }

    #[test]
    fn width_stands_where_depth_has_as_many_parameters() {
        let mut r = of(Kind::Figure4);
        let mut narrow = r.rows[2].clone();
        (narrow.id, narrow.criterion) = ("width-8".into(), "width".into());
        (narrow.depth, narrow.parameters) = (16, 800_000);
        r.rows.push(narrow);
        let figures = study_figures(&r, &files).unwrap();
        let xml = roxmltree::Document::parse(&figures[0].svg).unwrap();
        let tip = "parameters of 8 blocks";
        assert!(
            xml.descendants()
                .any(|n| n.text().is_some_and(|t| t.contains(tip)))
        );
        assert_eq!(count(&figures, "polyline", "ideal"), 1);
        assert_eq!(count(&figures, "polygon", "full s2 f2"), 1);
        let line = xml
            .descendants()
            .find(|n| n.attribute("class") == Some("curve s3"))
            .unwrap();
        // The control with fewer steps is not on the line over depth.
        assert_eq!(line.attribute("points").unwrap().split(' ').count(), 2);
    }

    #[test]
    fn every_search_has_a_panel() {
        let mut r = of(Kind::Figure6);
        for row in r.rows.iter_mut().filter(|r| r.criterion == "learned") {
            row.traces.history = Some("h".into());
            row.traces.selection = Some("s".into());
        }
        // Both recoveries and both patterns name the same file here: it is drawn once.
        let figures = study_figures(&r, &files).unwrap();
        assert_eq!(count(&figures, "rect", "cell"), 2);
        let search = Search {
            name: "x".into(),
            history: Vec::new(),
            selection: serde_json::from_str(&files(Path::new("s")).unwrap()).unwrap(),
        };
        let many = plots::searches(&[search.clone(), search.clone(), search.clone(), search]);
        let xml = roxmltree::Document::parse(&many).unwrap();
        let nested = xml
            .descendants()
            .filter(|n| n.tag_name().name() == "svg")
            .count();
        assert_eq!(nested, 5);
        let row = r.rows.last_mut().unwrap();
        row.traces.history = Some("none".into());
        let error = study_figures(&r, &files).unwrap_err().to_string();
        assert!(error.starts_with("none: "), "{error}");
    }

    #[test]
    fn hidden_states_are_read_and_checked() {
        let mut r = of(Kind::Activations);
        r.rows[0].traces.activations = Some("a".into());
        let figures = study_figures(&r, &files).unwrap();
        assert_eq!(count(&figures, "rect", "f3 bin"), 2);
        r.rows[0].traces.activations = Some("bad".into());
        let error = study_figures(&r, &files).unwrap_err().to_string();
        assert!(
            error.contains("bad: layer 0: expected 3 `edges`"),
            "{error}"
        );
    }

    #[test]
    fn recoveries_are_lines_over_x() {
        let mut r = of(Kind::BatchSize);
        for (i, row) in r
            .rows
            .iter_mut()
            .filter(|r| r.criterion == "learned")
            .enumerate()
        {
            row.x = Some(if i < 2 { 16.0 } else { 64.0 });
        }
        let figures = study_figures(&r, &files).unwrap();
        assert_eq!(
            count(&figures, "polyline", "curve s3") + count(&figures, "polyline", "curve s2"),
            2
        );
        assert!(figures[0].svg.contains(">batch size</text>"));
        let names: Vec<&str> = figures[0].legend.iter().map(|l| l.1.as_str()).collect();
        assert_eq!(names, ["fine-tuning", "masked KD"]);
    }

    #[test]
    fn tables_are_drawn_as_dots_of_both_measures() {
        for kind in [Kind::Table1, Kind::Table4, Kind::Table5, Kind::Table7] {
            let figures = study_figures(&of(kind), &files).unwrap();
            let titles: Vec<&str> = figures.iter().map(|f| f.title.as_str()).collect();
            assert_eq!(
                titles,
                ["FID of every method", "Held-out loss of every method"]
            );
            for figure in &figures {
                let xml = roxmltree::Document::parse(&figure.svg).unwrap();
                assert!(
                    xml.descendants()
                        .any(|n| n.has_tag_name(("http://www.w3.org/2000/svg", "circle")))
                );
            }
        }
    }
}
