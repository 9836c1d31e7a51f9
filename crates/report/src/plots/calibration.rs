//! The loss of masks right after the cut against the FID after recovery.

use super::Labels;
use crate::correlation::rank_correlation;
use crate::groups::groups;
use crate::measure::Measure;
use crate::results::{ResultRow, Results};
use crate::svg::{Frame, Scale, Svg, short};

/// Corners of a criterion's marker, around (0, 0) with radius 1; the circle is drawn as one.
const SHAPES: [&[(f64, f64)]; 7] = [
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
];
/// A range this wide is shown on a logarithmic scale.
const WIDE: f64 = 5.0;

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
        let class = if learned { "full s3 f3" } else { "full s2 f2" };
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
                let corners: Vec<_> = SHAPES[shape % SHAPES.len()].iter().map(corner).collect();
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

/// Spearman's correlation of the two, over all masks and over the random ones, in a sentence.
pub fn correlations(results: &Results) -> String {
    let points = points(results);
    let over = |keep: &dyn Fn(&ResultRow) -> bool| {
        let kept: Vec<(f64, f64)> = points
            .iter()
            .filter(|p| keep(p.0))
            .map(|p| (p.1, p.2))
            .collect();
        match rank_correlation(&kept) {
            Some(rho) => format!("{} over {} masks", short(rho), kept.len()),
            None => format!("none over {} masks, too few or all alike", kept.len()),
        }
    };
    format!(
        "Spearman's rank correlation of calibration loss and FID: {}; the random ones alone: {}.",
        over(&|_| true),
        over(&|r| r.criterion == "random")
    )
}
