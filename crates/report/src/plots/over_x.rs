//! FID over a number that a study varies, one line per recovery.

use crate::groups::groups;
use crate::measure::{Measure, plus_minus};
use crate::results::Results;
use crate::statistics::Moments;
use crate::svg::{Anchor, Frame, Scale, Svg, short};

/// A named line: x and the FID over its seeds, from small to large x.
type Series = (String, Vec<(f64, Moments)>);

/// One line per recovery that has rows with an x, with whiskers of one standard deviation where there are seeds.
///
/// The names and colours of the lines are returned for the legend.
pub fn fid_over_x(results: &Results) -> (String, Vec<(usize, String)>) {
    let series = series(results);
    let name = results
        .study
        .as_ref()
        .and_then(|s| s.x_name.as_deref())
        .unwrap_or("x");
    let all = || series.iter().flat_map(|(_, points)| points);
    // Batch sizes and their like are doubled from one to the next.
    let positive = all().all(|p| p.0 > 0.0);
    let span =
        all().map(|p| p.0).fold(0.0, f64::max) / all().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let x: Vec<f64> = all().map(|p| p.0).collect();
    let frame = Frame {
        x: if positive && span > 3.0 {
            Scale::log(x, 70.0, 600.0)
        } else {
            Scale::linear(x, 70.0, 600.0)
        },
        y: Scale::linear(all().flat_map(|p| p.1.ends()), 310.0, 12.0),
        x_name: name,
        y_name: "FID",
    };
    let mut svg = Svg::new(
        640.0,
        360.0,
        &format!("FID over {name}, one line per recovery"),
    );
    frame.draw(&mut svg);
    for (i, (recovery, points)) in series.iter().enumerate() {
        let colour = colour(i);
        let line: Vec<_> = points.iter().map(|(x, m)| frame.at((*x, m.mean))).collect();
        svg.path(&format!("curve s{colour}"), &line, recovery);
        for (x, m) in points {
            let [low, high] = m.ends();
            if high > low {
                svg.line("whisker", frame.at((*x, low)), frame.at((*x, high)));
            }
            let tip = format!("{recovery}, {name} {}: FID {}", short(*x), plus_minus(*m));
            svg.dot(
                &format!("full s{colour} f{colour}"),
                frame.at((*x, m.mean)),
                4.0,
                &tip,
            );
        }
    }
    if series.is_empty() {
        svg.text(
            "label",
            (335.0, 160.0),
            Anchor::Middle,
            "no row has both an x and an FID",
        );
    }
    let legend = series
        .into_iter()
        .enumerate()
        .map(|(i, (name, _))| (colour(i), name));
    (svg.finish(), legend.collect())
}

/// The colours of series that are told apart by a legend alone, in their order.
pub(super) fn colour(series: usize) -> usize {
    [3, 2, 4, 5, 0, 1][series % 6]
}

fn series(results: &Results) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for group in groups(&results.rows) {
        let fid = Measure::Fid.over(group.rows.iter().copied());
        let Some((x, fid)) = group.first().x.filter(|x| x.is_finite()).zip(fid) else {
            continue;
        };
        let name = group.first().recovery_label();
        match series.iter_mut().find(|(n, _)| n == name) {
            Some((_, points)) => points.push((x, fid)),
            None => series.push((name.to_string(), vec![(x, fid)])),
        }
    }
    for (_, points) in &mut series {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    series
}
