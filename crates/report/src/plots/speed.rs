//! What depth and width buy in speed.

use super::Labels;
use crate::class::WIDTH;
use crate::groups::{Group, groups};
use crate::measure::Measure;
use crate::results::Results;
use crate::svg::{Frame, Scale, Svg, short};

/// A group's depth, parameters and mean speed.
struct Point {
    name: String,
    depth: f64,
    parameters: f64,
    speed: f64,
}

fn point(group: &Group<'_>) -> Option<Point> {
    let row = group.first();
    Some(Point {
        name: group.name.clone(),
        depth: row.depth as f64,
        parameters: row.parameters as f64,
        speed: Measure::Speed.over(group.rows.iter().copied())?.mean,
    })
}

/// Images per second over depth as a line, models pruned in width as points where a model pruned in depth would have as
/// many parameters, and the ideal: time proportional to depth.
pub fn speed_over_compression(results: &Results) -> String {
    let groups = groups(&results.rows);
    let dense = groups.iter().find(|g| g.first().id == "dense");
    let steps = dense.map(|g| g.first().sampling_steps);
    let comparable = |g: &&Group<'_>| steps.is_none_or(|s| g.first().sampling_steps == s);
    let (narrow, deep): (Vec<&Group<'_>>, Vec<_>) = groups
        .iter()
        .filter(comparable)
        .partition(|g| g.first().criterion == WIDTH);
    let mut deep: Vec<Point> = deep.into_iter().filter_map(point).collect();
    deep.sort_by(|a, b| a.depth.total_cmp(&b.depth));
    let narrow: Vec<Point> = narrow.into_iter().filter_map(point).collect();
    let all = || deep.iter().chain(&narrow);
    let mut svg = Svg::new(
        640.0,
        360.0,
        "Sampling speed in images per second over depth, with models pruned in width at equal parameters",
    );
    let deepest = deep.iter().map(|p| p.depth).fold(1.0, f64::max) * 1.08;
    let fastest = all().map(|p| p.speed).fold(0.0, f64::max) * 1.12;
    let frame = Frame {
        x: Scale::exact(0.0, deepest, 70.0, 500.0),
        y: Scale::exact(0.0, fastest, 310.0, 12.0),
        x_name: "depth in blocks (width: the depth of equal parameters)",
        y_name: "images per second",
    };
    frame.draw(&mut svg);
    if let Some(dense) = dense.and_then(point) {
        let product = dense.speed * dense.depth;
        let start = product / fastest.max(1e-9);
        let line: Vec<_> = (0..=60)
            .map(|i| start + (deepest - start) * f64::from(i) / 60.0)
            .filter(|d| *d > 0.0)
            .map(|d| frame.at((d, product / d)))
            .collect();
        svg.path("ideal", &line, "ideal: time proportional to depth");
    }
    let line: Vec<_> = by_depth(&deep).into_iter().map(|p| frame.at(p)).collect();
    svg.path("curve s3", &line, "pruned in depth");
    let mut labels = Labels::default();
    for p in &deep {
        let tip = format!(
            "{}: {} blocks, {} images/s",
            p.name,
            p.depth,
            short(p.speed)
        );
        svg.dot("full s3 f3", frame.at((p.depth, p.speed)), 4.0, &tip);
    }
    for p in &narrow {
        let depth = depth_of(p.parameters, &deep);
        let at = frame.at((depth, p.speed));
        let tip = format!(
            "{}: parameters of {} blocks, {} images/s",
            p.name,
            short(depth),
            short(p.speed)
        );
        let corners = [(0.0, -6.0), (6.0, 5.0), (-6.0, 5.0)].map(|(x, y)| (at.0 + x, at.1 + y));
        svg.polygon("full s2 f2", &corners, &tip);
        labels.put(&mut svg, at, "width");
    }
    svg.finish()
}

/// The mean speed of each depth, from shallow to deep.
fn by_depth(points: &[Point]) -> Vec<(f64, f64)> {
    points
        .chunk_by(|a, b| a.depth == b.depth)
        .map(|same| {
            let sum: f64 = same.iter().map(|p| p.speed).sum();
            (same[0].depth, sum / same.len() as f64)
        })
        .collect()
}

/// The depth at which a model pruned in depth has `parameters`: parameters are linear in depth.
fn depth_of(parameters: f64, deep: &[Point]) -> f64 {
    let (Some(a), Some(b)) = (deep.first(), deep.last()) else {
        return 0.0;
    };
    if a.parameters == b.parameters {
        return b.depth;
    }
    a.depth + (parameters - a.parameters) / (b.parameters - a.parameters) * (b.depth - a.depth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parameters_are_found_between_the_depths() {
        let at = |depth: f64| Point {
            name: String::new(),
            depth,
            // Embeddings and head have parameters, too.
            parameters: 1000.0 + 100.0 * depth,
            speed: 1.0,
        };
        let deep = [at(4.0), at(16.0)];
        assert_eq!(depth_of(1800.0, &deep), 8.0);
        assert_eq!(depth_of(1.0, &[]), 0.0);
        assert_eq!(depth_of(1.0, &deep[..1]), 4.0);
    }
}
