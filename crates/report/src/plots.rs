//! The pictures of the report, each a function from data to SVG.

mod activations;
mod calibration;
mod dots;
mod over_x;
mod panels;
mod speed;

use serde::Deserialize;

use crate::results::{Recovery, ResultRow, Results};
use crate::svg::{Anchor, Frame, Scale, Svg, short};

pub use activations::{Activations, Beyond, Layer, activations};
pub use calibration::{correlations, criteria_over_calibration};
pub use dots::dots;
pub use over_x::fid_over_x;
pub use panels::{Search, searches};
pub use speed::speed_over_compression;

/// A range this wide is shown on a logarithmic scale.
const WIDE: f64 = 5.0;

/// One line of a search's `history.jsonl`, as far as it is drawn.
#[derive(Debug, Clone, Deserialize)]
pub struct Decision {
    /// Step of the search.
    pub step: u64,
    /// Blocks that would be kept.
    pub kept: Vec<usize>,
    /// One per group.
    pub confidence: Vec<f64>,
}

/// N of M blocks, as in `selection.json`.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Group {
    /// M: blocks of the group.
    pub m: usize,
}

/// A search's `selection.json`, as far as it is drawn.
#[derive(Debug, Clone, Deserialize)]
pub struct Selection {
    /// Blocks that are kept in the end.
    pub kept: Vec<usize>,
    /// Groups of blocks, from block 0 on.
    pub groups: Vec<Group>,
}

/// One line of a `metrics.jsonl`, as far as it is drawn; a skipped step has no loss.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Metric {
    /// Step of training.
    pub step: u64,
    /// None for a step that was skipped.
    pub loss: Option<f64>,
}

/// A named line of a plot.
#[derive(Debug, Clone)]
pub struct Curve {
    /// For the legend.
    pub name: String,
    /// Colour, see [`series`].
    pub series: usize,
    /// Step and loss.
    pub points: Vec<(f64, f64)>,
}

/// Colour of a row: 0 dense, 1 random, 2 oracle, from 3 on the learned masks.
pub fn series(row: &ResultRow, results: &Results) -> usize {
    match row.criterion.as_str() {
        "dense" => 0,
        "random" => 1,
        "oracle" => 2,
        _ => {
            let mut patterns: Vec<&Option<String>> = Vec::new();
            for r in results.rows.iter().filter(|r| r.criterion == row.criterion) {
                if !patterns.contains(&&r.pattern) {
                    patterns.push(&r.pattern);
                }
            }
            3 + patterns
                .iter()
                .position(|p| **p == row.pattern)
                .unwrap_or(0)
                % 3
        }
    }
}

/// Which blocks a search would keep, over its steps: a cell per step and block, as strong as the
/// decision of the block's group is sure. Dots at the right: the final decision.
pub fn decisions(name: &str, history: &[Decision], groups: &[Group], kept: &[usize]) -> String {
    const COLUMNS: usize = 150;
    let depth: usize = groups.iter().map(|g| g.m).sum();
    let row = (320.0 / depth.max(1) as f64).clamp(8.0, 20.0);
    let (left, top, width, height) = (64.0, 10.0, 560.0, row * depth as f64);
    let group_of: Vec<usize> = groups
        .iter()
        .enumerate()
        .flat_map(|(g, group)| vec![g; group.m])
        .collect();
    let title = format!(
        "Decisions of {name} over the steps; kept in the end: {}",
        list(kept)
    );
    let mut svg = Svg::new(left + width + 40.0, top + height + 44.0, &title);
    let last = history.last().map_or(1, |r| r.step) as f64;
    let first = history.first().map_or(0, |r| r.step) as f64;
    let x = Scale::exact(first.min(last - 1.0), last, left, left + width);
    // Block 0 at the bottom, as data flow is drawn.
    let y = |layer: usize| top + height - (layer + 1) as f64 * row;
    svg.rect("plate", (left, top), (width, height), 1.0);
    let stride = history.len().div_ceil(COLUMNS).max(1);
    let shown: Vec<&Decision> = history.iter().step_by(stride).collect();
    for (i, record) in shown.iter().enumerate() {
        let from = x.at(record.step as f64);
        let to = shown
            .get(i + 1)
            .map_or(left + width, |next| x.at(next.step as f64));
        for &layer in record.kept.iter().filter(|l| **l < depth) {
            let confidence = record
                .confidence
                .get(group_of[layer])
                .copied()
                .unwrap_or(0.0);
            svg.rect(
                "cell",
                (from, y(layer) + 1.0),
                (to - from, row - 2.0),
                confidence.clamp(0.0, 1.0),
            );
        }
    }
    let mut boundary = 0;
    for group in groups {
        boundary += group.m;
        let at = top + height - boundary as f64 * row;
        svg.line("grid", (left, at), (left + width, at));
    }
    let every = if row < 11.0 { 2 } else { 1 };
    for layer in (0..depth).step_by(every) {
        svg.text(
            "tick",
            (left - 6.0, y(layer) + row / 2.0 + 4.0),
            Anchor::End,
            &layer.to_string(),
        );
    }
    for &layer in kept.iter().filter(|l| **l < depth) {
        svg.dot(
            "f-cell",
            (left + width + 12.0, y(layer) + row / 2.0),
            4.0,
            &format!("block {layer} is kept"),
        );
    }
    for step in x.ticks(6) {
        svg.text(
            "tick",
            (x.at(step), top + height + 16.0),
            Anchor::Middle,
            &short(step),
        );
    }
    svg.text(
        "name",
        (left + width / 2.0, top + height + 36.0),
        Anchor::Middle,
        "step of the search",
    );
    svg.text_up("name", (18.0, top + height / 2.0), "block");
    svg.finish()
}

fn list(kept: &[usize]) -> String {
    kept.iter()
        .map(usize::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Loss over steps, smoothed by a trailing mean over a twentieth of the run.
pub fn losses(title: &str, curves: &[Curve]) -> String {
    let mut svg = Svg::new(640.0, 330.0, title);
    let smooth: Vec<Vec<(f64, f64)>> = curves.iter().map(|c| trailing_mean(&c.points)).collect();
    let all = || smooth.iter().flatten();
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let frame = Frame {
        x: Scale::exact(0.0, last, 70.0, 624.0),
        y: Scale::log(all().map(|p| p.1), 280.0, 12.0),
        x_name: "step",
        y_name: "training loss",
    };
    frame.draw(&mut svg);
    for (curve, points) in curves.iter().zip(&smooth) {
        let points: Vec<_> = points.iter().map(|p| frame.at(*p)).collect();
        svg.path(&format!("curve s{}", curve.series), &points, &curve.name);
    }
    svg.finish()
}

fn trailing_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (points.len() / 20).max(1);
    let mean = |i: usize| {
        let part = &points[(i + 1).saturating_sub(window)..=i];
        part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64
    };
    (0..points.len()).map(|i| (points[i].0, mean(i))).collect()
}

/// FID after recovery over the loss before it.
pub fn fid_over_calibration(results: &Results) -> String {
    let points: Vec<(&ResultRow, f64, f64)> = results
        .rows
        .iter()
        .filter_map(|r| Some((r, r.calibration_loss?, r.score()?)))
        .collect();
    let mut svg = Svg::new(
        640.0,
        380.0,
        "FID after recovery over the calibration loss before it, one dot per row",
    );
    let frame = Frame {
        x: Scale::linear(points.iter().map(|p| p.1), 70.0, 500.0),
        y: Scale::linear(points.iter().map(|p| p.2), 330.0, 12.0),
        x_name: "calibration loss: the cut model before recovery",
        y_name: "FID after recovery",
    };
    frame.draw(&mut svg);
    let mut labels = Labels::default();
    for (row, loss, fid) in points {
        let at = frame.at((loss, fid));
        let hollow = if row.recovery == Recovery::MaskedKd {
            "hollow"
        } else {
            "full"
        };
        let tip = format!(
            "{}: calibration loss {}, FID {}",
            row.name,
            short(loss),
            short(fid)
        );
        svg.dot(
            &format!("{hollow} s{0} f{0}", series(row, results)),
            at,
            6.0,
            &tip,
        );
        labels.put(&mut svg, at, &short_name(row));
    }
    svg.finish()
}

/// Sampling speed over depth, with the line of time proportional to depth.
pub fn speed_over_depth(results: &Results) -> String {
    let rows: Vec<(&ResultRow, f64)> = results
        .rows
        .iter()
        .filter_map(|r| Some((r, r.images_per_second?)))
        .collect();
    let mut svg = Svg::new(
        640.0,
        360.0,
        "Sampling speed in images per second over depth, one dot per row",
    );
    let deepest = rows.iter().map(|r| r.0.depth).max().unwrap_or(1) as f64;
    let fastest = rows.iter().map(|r| r.1).fold(0.0, f64::max);
    let frame = Frame {
        x: Scale::exact(0.0, deepest * 1.08, 70.0, 500.0),
        y: Scale::exact(0.0, fastest * 1.12, 310.0, 12.0),
        x_name: "depth in blocks",
        y_name: "images per second",
    };
    frame.draw(&mut svg);
    if let Some((dense, speed)) = rows.iter().find(|r| r.0.id == "dense") {
        let product = speed * dense.depth as f64;
        let start = product / (fastest * 1.12).max(1e-9);
        let line: Vec<_> = (0..=60)
            .map(|i| start + (deepest * 1.08 - start) * f64::from(i) / 60.0)
            .filter(|d| *d > 0.0)
            .map(|d| frame.at((d, product / d)))
            .collect();
        svg.path("ideal", &line, "time proportional to depth");
    }
    let mut labels = Labels::default();
    let mut groups: Vec<(usize, Option<u64>)> = Vec::new();
    for (row, speed) in rows {
        let at = frame.at((row.depth as f64, speed));
        let tip = format!(
            "{}: {} blocks, {} images/s",
            row.name,
            row.depth,
            short(speed)
        );
        svg.dot(
            &format!("full s{0} f{0}", series(row, results)),
            at,
            5.0,
            &tip,
        );
        // Pruned rows of one depth do the same work: one label for all of them.
        let group = (
            row.depth,
            (row.criterion == "dense").then_some(row.sampling_steps),
        );
        if !groups.contains(&group) {
            groups.push(group);
            let text = match group {
                (_, Some(steps)) => format!("dense, {steps} steps"),
                (depth, None) => format!("pruned to {depth}, {} steps", row.sampling_steps),
            };
            labels.put(&mut svg, at, &text);
        }
    }
    svg.finish()
}

fn short_name(row: &ResultRow) -> String {
    let pattern = row.pattern.as_deref().unwrap_or("");
    match (row.criterion.as_str(), row.recovery) {
        ("random", _) => format!("random, seed {}", row.seed),
        (criterion, Recovery::MaskedKd) => format!("{criterion} {pattern} KD"),
        (criterion, _) => format!("{criterion} {pattern}"),
    }
}

/// Labels beside dots, moved down or up until they do not cover one another.
#[derive(Default)]
struct Labels {
    taken: Vec<(f64, f64, f64)>,
}

impl Labels {
    fn put(&mut self, svg: &mut Svg, at: (f64, f64), text: &str) {
        self.put_as(svg, "label", at, text);
    }

    fn put_as(&mut self, svg: &mut Svg, class: &str, (x, y): (f64, f64), text: &str) {
        const LINE: f64 = 13.0;
        let width = 6.2 * text.chars().count() as f64;
        let free = |y: &f64| {
            self.taken.iter().all(|(tx, ty, tw)| {
                (ty - y).abs() >= LINE || x + 9.0 + width < *tx || tx + tw < x + 9.0
            })
        };
        let start = y + 4.0;
        let tries = (0..20).flat_map(|k| {
            [
                start + f64::from(k) * LINE / 2.0,
                start - f64::from(k) * LINE / 2.0,
            ]
        });
        let at = tries.into_iter().find(free).unwrap_or(start);
        self.taken.push((x + 9.0, at, width));
        svg.text(class, (x + 9.0, at), Anchor::Start, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::results;

    fn parsed(svg: &str, check: impl FnOnce(roxmltree::Node<'_, '_>)) {
        check(roxmltree::Document::parse(svg).unwrap().root_element());
    }

    fn count(root: roxmltree::Node<'_, '_>, tag: &str, class: &str) -> usize {
        let has = |n: &roxmltree::Node<'_, '_>| {
            n.attribute("class")
                .unwrap_or("")
                .split(' ')
                .any(|c| c == class)
        };
        root.descendants()
            .filter(|n| n.tag_name().name() == tag && has(n))
            .count()
    }

    #[test]
    fn decisions_are_cells_as_strong_as_they_are_sure() {
        let history = [
            Decision {
                step: 1,
                kept: vec![0, 3],
                confidence: vec![0.5, 0.25],
            },
            Decision {
                step: 2,
                kept: vec![1, 3],
                confidence: vec![0.75, 1.0],
            },
        ];
        let svg = decisions("x", &history, &[Group { m: 2 }, Group { m: 2 }], &[1, 3]);
        parsed(&svg, |root| {
            let opacities: Vec<&str> = root
                .descendants()
                .filter(|n| n.attribute("class") == Some("cell"))
                .map(|n| n.attribute("opacity").unwrap())
                .collect();
            assert_eq!(opacities, ["0.500", "0.250", "0.750", "1.000"]);
            assert_eq!(count(root, "circle", "f-cell"), 2);
            assert!(
                root.attribute("aria-label")
                    .unwrap()
                    .ends_with("kept in the end: 1, 3")
            );
        });
        // Nothing recorded yet, and a long history: still a picture, and not a large one.
        parsed(&decisions("x", &[], &[Group { m: 2 }], &[]), |_| {});
        let long: Vec<Decision> = (0..10_000)
            .map(|step| Decision {
                step,
                kept: vec![0],
                confidence: vec![1.0],
            })
            .collect();
        parsed(&decisions("x", &long, &[Group { m: 2 }], &[0]), |root| {
            assert!(count(root, "rect", "cell") <= 150);
        });
    }

    #[test]
    fn every_row_with_numbers_is_a_dot() {
        let mut r = results();
        let pruned = r
            .rows
            .iter()
            .filter(|row| row.calibration_loss.is_some())
            .count();
        parsed(&fid_over_calibration(&r), |root| {
            assert_eq!(
                count(root, "circle", "full") + count(root, "circle", "hollow"),
                pruned
            );
            assert_eq!(count(root, "circle", "hollow"), 3);
        });
        parsed(&speed_over_depth(&r), |root| {
            assert_eq!(count(root, "circle", "full"), r.rows.len());
        });
        r.rows.clear();
        parsed(&fid_over_calibration(&r), |_| {});
        parsed(&speed_over_depth(&r), |_| {});
    }

    #[test]
    fn curves_are_smoothed_over_a_twentieth() {
        let points: Vec<(f64, f64)> = (0..40).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let smooth = trailing_mean(&points);
        assert_eq!(smooth.len(), 40);
        assert!(smooth[1..].iter().all(|p| (p.1 - 0.5).abs() < 1e-12));
        let curve = Curve {
            name: "a < b".into(),
            series: 3,
            points,
        };
        parsed(&losses("t", &[curve]), |root| {
            assert_eq!(count(root, "polyline", "s3"), 1);
        });
        parsed(&losses("t", &[]), |_| {});
    }

    #[test]
    fn colours_follow_the_criterion() {
        let r = results();
        let of = |id: &str| series(r.rows.iter().find(|row| row.id == id).unwrap(), &r);
        assert_eq!(
            [of("dense"), of("random-1-2-seed-3-ft"), of("oracle-kd")],
            [0, 1, 2]
        );
        assert_eq!(
            [
                of("learned-1-2-ft"),
                of("learned-1-2-kd"),
                of("learned-2-4-ft")
            ],
            [3, 3, 4]
        );
    }
}
