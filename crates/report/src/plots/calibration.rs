//! The loss of masks right after the cut against the FID after recovery.

use super::{Labels, WIDE};
use crate::class::{classes, comparable, masks, prefix};
use crate::correlation::rank_correlation;
use crate::groups::groups;
use crate::measure::Measure;
use crate::results::{ResultRow, Results};
use crate::svg::{Frame, Scale, Svg, short};

/// Corners of a criterion's marker, around (0, 0) with radius 1; the circle is drawn as one.
const SHAPES: [&[(f64, f64)]; 10] = [
    &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    &[(0.0, -1.1), (1.1, 0.85), (-1.1, 0.85)],
    &[(0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)],
    &[(0.0, 1.1), (1.1, -0.85), (-1.1, -0.85)],
    &[(-1.1, 0.0), (0.85, -1.1), (0.85, 1.1)],
    &[(1.1, 0.0), (-0.85, -1.1), (-0.85, 1.1)],
    &[
        (0.0, -1.1),
        (1.05, -0.34),
        (0.65, 0.89),
        (-0.65, 0.89),
        (-1.05, -0.34),
    ],
    // A cross, the same turned, and a star.
    &[
        (-0.35, -1.1),
        (0.35, -1.1),
        (0.35, -0.35),
        (1.1, -0.35),
        (1.1, 0.35),
        (0.35, 0.35),
        (0.35, 1.1),
        (-0.35, 1.1),
        (-0.35, 0.35),
        (-1.1, 0.35),
        (-1.1, -0.35),
        (-0.35, -0.35),
    ],
    &[
        (0.0, -0.45),
        (0.7, -1.1),
        (1.1, -0.7),
        (0.45, 0.0),
        (1.1, 0.7),
        (0.7, 1.1),
        (0.0, 0.45),
        (-0.7, 1.1),
        (-1.1, 0.7),
        (-0.45, 0.0),
        (-1.1, -0.7),
        (-0.7, -1.1),
    ],
    &[
        (0.0, -1.3),
        (0.35, -0.35),
        (1.3, 0.0),
        (0.35, 0.35),
        (0.0, 1.3),
        (-0.35, 0.35),
        (-1.3, 0.0),
        (-0.35, -0.35),
    ],
];
/// Every shape is drawn filled first and hollow then, so that twice as many criteria have a marker of their own.
fn marker(criterion: usize) -> (&'static [(f64, f64)], &'static str) {
    let fill = if (criterion / SHAPES.len()).is_multiple_of(2) {
        "full s2 f2"
    } else {
        "hollow s2"
    };
    (SHAPES[criterion % SHAPES.len()], fill)
}

/// Rows that have both numbers: those, and what is drawn.
fn points(results: &Results) -> Vec<(&ResultRow, f64, f64)> {
    let point = |r| {
        let loss = Measure::CalibrationLoss.of(r)?;
        Some((r, loss, Measure::Fid.of(r)?))
    };
    results.rows.iter().filter_map(point).collect()
}

/// Random masks as small dots, every other criterion with a marker and a label of its own, learned in colour and bold.
pub fn criteria_over_calibration(results: &Results) -> String {
    let points = points(results);
    let mut svg = Svg::new(
        640.0,
        400.0,
        "FID after recovery over the calibration loss before it: random masks as dots, every criterion with its marker",
    );
    let fids = || points.iter().map(|p| p.2).filter(|f| *f > 0.0);
    let wide = fids().fold(0.0, f64::max) > WIDE * fids().fold(f64::INFINITY, f64::min);
    let y = |values: Vec<f64>| {
        if wide {
            Scale::log(values, 350.0, 12.0)
        } else {
            Scale::linear(values, 350.0, 12.0)
        }
    };
    let frame = Frame {
        x: Scale::log(points.iter().map(|p| p.1), 70.0, 500.0),
        y: y(points.iter().map(|p| p.2).collect()),
        x_name: "calibration loss: the cut model before recovery (log scale)",
        y_name: if wide {
            "FID after recovery (log scale)"
        } else {
            "FID after recovery"
        },
    };
    frame.draw(&mut svg);
    let tip = |row: &ResultRow, loss, fid| {
        format!(
            "{}: calibration loss {}, FID {}",
            row.name,
            short(loss),
            short(fid)
        )
    };
    for (row, loss, fid) in points.iter().filter(|p| p.0.criterion == "random") {
        svg.dot(
            "full s1 f1",
            frame.at((*loss, *fid)),
            2.5,
            &tip(row, *loss, *fid),
        );
    }
    let mut labels = Labels::default();
    let mut shape = 0;
    for group in groups(&results.rows) {
        let criterion = group.first().criterion.as_str();
        let learned = criterion == "learned";
        let mut labelled = criterion == "random";
        let (corners, class) = marker(shape);
        let class = if learned { "full s3 f3" } else { class };
        for (row, loss, fid) in points
            .iter()
            .filter(|p| criterion != "random" && p.0.group() == group.id)
        {
            let at = frame.at((*loss, *fid));
            let text = tip(row, *loss, *fid);
            if learned {
                svg.dot(class, at, 8.0, &text);
            } else {
                let corner = |(x, y): &(f64, f64)| (at.0 + 5.5 * x, at.1 + 5.5 * y);
                let corners: Vec<_> = corners.iter().map(corner).collect();
                svg.polygon(class, &corners, &text);
            }
            // Seeds share a label.
            if !labelled {
                labelled = true;
                let class = if learned { "strong" } else { "label" };
                labels.put_as(&mut svg, class, at, &group.name);
            }
        }
        if labelled && !learned && criterion != "random" {
            shape += 1;
        }
    }
    svg.finish()
}

/// Spearman's correlation of the two, over all recoveries and over those of random masks, in a sentence for each class of
/// comparable rows.
pub fn correlations(results: &Results) -> String {
    let points = points(results);
    let classes = classes(points.iter().map(|p| p.0), comparable);
    let said: Vec<String> = classes
        .iter()
        .map(|class| {
            let over = |keep: &dyn Fn(&ResultRow) -> bool| correlation(class, keep);
            let name = prefix(class, results, true);
            let random = if class.iter().any(|r| r.criterion == "random") {
                format!(
                    "; the random ones alone: {}",
                    over(&|r| r.criterion == "random")
                )
            } else {
                String::new()
            };
            format!("{name}{}{random}", over(&|_| true))
        })
        .collect();
    format!(
        "Spearman's rank correlation of calibration loss and FID. {}.",
        said.join(". ")
    )
}

/// Over the rows of a class that are kept.
fn correlation(class: &[&ResultRow], keep: &dyn Fn(&ResultRow) -> bool) -> String {
    let rows = || class.iter().copied().filter(|r| keep(r));
    let number = |r: &ResultRow| Some((Measure::CalibrationLoss.of(r)?, Measure::Fid.of(r)?));
    let kept: Vec<(f64, f64)> = rows().filter_map(number).collect();
    // Seeds recover a mask again: as many points as recoveries, and fewer masks.
    let count = match (kept.len(), masks(rows())) {
        (1, _) => "1 recovery".to_string(),
        (n, 1) => format!("{n} recoveries of 1 mask"),
        (n, masks) => format!("{n} recoveries of {masks} masks"),
    };
    match rank_correlation(&kept) {
        Some(rho) => format!("{} over {count}", short(rho)),
        None => format!("none over {count}, too few or all alike"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn ten_criteria_and_more_have_markers_of_their_own() {
        let mut r = crate::sample::results();
        let row = r
            .rows
            .iter()
            .find(|r| r.criterion == "oracle")
            .unwrap()
            .clone();
        r.rows.clear();
        for i in 0..14 {
            let mut row = row.clone();
            row.criterion = format!("criterion {i}");
            row.id = format!("criterion-{i}");
            row.group = None;
            r.rows.push(row);
        }
        let svg = criteria_over_calibration(&r);
        let xml = roxmltree::Document::parse(&svg).unwrap();
        let markers: BTreeSet<(String, String)> = xml
            .descendants()
            .filter(|n| n.tag_name().name() == "polygon")
            .map(|n| {
                let of = |name| n.attribute(name).unwrap().to_string();
                (of("class"), of("points"))
            })
            .collect();
        // All rows are at one place, so that only the shape and its fill tell them apart.
        assert_eq!(markers.len(), 14);
    }

    #[test]
    fn recoveries_are_not_taken_for_masks_and_classes_are_kept_apart() {
        let said = correlations(&crate::sample::study());
        // 4 random masks (the oracle has one of them, too), the learned one, and a narrowed model for each of two seeds.
        let part = "8 blocks, fine-tuning, 200 steps: ";
        assert!(said.contains(part), "{said}");
        assert!(said.contains(" over 10 recoveries of 7 masks; the random ones alone: 1 over 4 recoveries of 4 masks"), "{said}");
        // Eight classes; random masks are fine-tuned only.
        assert_eq!(said.matches(" recoveries of ").count(), 8 + 4, "{said}");
        assert_eq!(said.matches("the random ones alone").count(), 4, "{said}");
    }
}
