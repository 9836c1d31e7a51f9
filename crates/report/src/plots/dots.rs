//! One dot per row, a line per method: what a table of a study shows at a glance.

use super::WIDE;
use super::over_x::colour as palette;
use crate::class::{WIDTH, classes, same_work, words};
use crate::groups::{Group, groups};
use crate::measure::{Measure, plus_minus};
use crate::results::{ResultRow, Results};
use crate::study::{Kind, cell};
use crate::svg::{Anchor, Scale, Svg, short};

/// A line of the plot and the colours on it.
struct Line<'a> {
    name: String,
    /// By the number of their colour.
    dots: Vec<(usize, Group<'a>)>,
}

/// What a row's line and colour are called; an empty name is no entry of the legend.
fn names(row: &ResultRow, kind: Kind) -> (String, String) {
    let criterion = || match &row.pattern {
        Some(pattern) => format!("{} {pattern}", row.criterion),
        None => row.criterion.clone(),
    };
    let recovery = || row.recovery_label().to_string();
    match kind {
        Kind::Table4 => {
            let delta = cell(row, "delta");
            let delta = if row.labels.contains_key("delta") {
                delta
            } else {
                row.criterion.clone()
            };
            (cell(row, "pattern"), delta)
        }
        Kind::Table5 => (recovery(), String::new()),
        Kind::Table7 => (cell(row, "route"), recovery()),
        _ => (criterion(), recovery()),
    }
}

/// Distance of two lines, and of two colours on one line.
const LINE: f64 = 20.0;
const APART: f64 = 6.0;
const HEADING: f64 = 24.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 616.0;

/// A small dot for every row, a large one for the mean over a method's seeds with a whisker of one standard deviation; the
/// lines of a size and a budget together under their heading, and the dense model as a dashed line through all of them,
/// where it is near enough.
///
/// None where no row has the number. The names and colours are returned for the legend.
pub fn dots(
    results: &Results,
    kind: Kind,
    measure: Measure,
) -> Option<(String, Vec<(usize, String)>)> {
    let students = || {
        let measured = |r: &&ResultRow| r.criterion != "dense" && measure.of(r).is_some();
        results.rows.iter().filter(measured)
    };
    let mut colours: Vec<String> = Vec::new();
    let sections: Vec<(String, Vec<Line<'_>>)> = classes(students(), same_work)
        .iter()
        .map(|class| {
            (
                words(class, results, false),
                lines(class, kind, &mut colours),
            )
        })
        .collect();
    if sections.is_empty() {
        return None;
    }
    // Room for every colour beside the others.
    let height = LINE.max(APART * (colours.len() + 1) as f64);
    let headed = |(heading, lines): &(String, Vec<Line<'_>>)| {
        height * lines.len() as f64 + if heading.is_empty() { 0.0 } else { HEADING }
    };
    let top = 12.0;
    let bottom = top + sections.iter().map(headed).sum::<f64>() + 6.0;
    let values: Vec<f64> = students().filter_map(|r| measure.of(r)).collect();
    let (low, high) = (values.iter()).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
        (l.min(*v), h.max(*v))
    });
    // A teacher that is far better must not squeeze the others into a corner.
    let dense = results.rows.iter().find(|r| r.id == "dense");
    let dense = dense.and_then(|r| measure.of(r));
    let span = high - low;
    let near = dense.filter(|d| (low - span..=high + span).contains(d));
    let wide = low > 0.0 && high > WIDE * low;
    let x = if wide {
        Scale::log(values.into_iter().chain(near), LEFT, RIGHT)
    } else {
        let ends = sections
            .iter()
            .flat_map(|(_, lines)| lines)
            .flat_map(|line| {
                let moments = |g: &Group<'_>| measure.over(g.rows.iter().copied());
                line.dots.iter().filter_map(move |(_, g)| moments(g))
            });
        let ends = ends.flat_map(|m| m.ends());
        Scale::linear(values.into_iter().chain(near).chain(ends), LEFT, RIGHT)
    };
    let name = measure.name();
    let mut svg = Svg::new(
        640.0,
        bottom + 44.0,
        &format!("{name} of every row, a line per method"),
    );
    for tick in x.ticks(5) {
        svg.line("grid", (x.at(tick), bottom), (x.at(tick), top));
        svg.text(
            "tick",
            (x.at(tick), bottom + 16.0),
            Anchor::Middle,
            &short(tick),
        );
    }
    match (dense, near) {
        (_, Some(dense)) => svg.path(
            "ideal",
            &[(x.at(dense), bottom), (x.at(dense), top)],
            &format!("dense teacher: {name} {}", short(dense)),
        ),
        (Some(dense), None) => {
            let text = format!("dense {}, off the scale", short(dense));
            svg.text("tick", (8.0, bottom + 36.0), Anchor::Start, &text);
        }
        (None, None) => {}
    }
    let mut y = top;
    for (heading, lines) in &sections {
        if !heading.is_empty() {
            y += HEADING;
            svg.text("strong", (8.0, y - 6.0), Anchor::Start, heading);
        }
        for line in lines {
            y += height;
            let at = y - height / 2.0;
            svg.text("label", (LEFT - 8.0, at + 4.0), Anchor::End, &line.name);
            for (colour, group) in &line.dots {
                // Colours side by side, around the line.
                let shift = APART * (*colour as f64 - (colours.len() - 1) as f64 / 2.0);
                draw(&mut svg, &x, at + shift, group, measure, palette(*colour));
            }
        }
        svg.line("grid", (8.0, y + 3.0), (RIGHT, y + 3.0));
    }
    svg.line("axis", (LEFT, bottom), (RIGHT, bottom));
    let scale = if wide { " (log scale)" } else { "" };
    svg.text(
        "name",
        (f64::midpoint(LEFT, RIGHT), bottom + 36.0),
        Anchor::Middle,
        &format!("{name}{scale}"),
    );
    let legend = colours.into_iter().enumerate();
    let legend = legend.filter(|(_, name)| !name.is_empty());
    Some((
        svg.finish(),
        legend.map(|(i, name)| (palette(i), name)).collect(),
    ))
}

/// The lines of a section, each with its colours; new colours are added.
fn lines<'a>(class: &[&'a ResultRow], kind: Kind, colours: &mut Vec<String>) -> Vec<Line<'a>> {
    let mut lines: Vec<Line<'a>> = Vec::new();
    for &row in class {
        let (line, colour) = names(row, kind);
        let colour = colours
            .iter()
            .position(|c| *c == colour)
            .unwrap_or_else(|| {
                colours.push(colour);
                colours.len() - 1
            });
        let at = lines
            .iter()
            .position(|l| l.name == line)
            .unwrap_or_else(|| {
                let dots = Vec::new();
                lines.push(Line { name: line, dots });
                lines.len() - 1
            });
        let id = row.group();
        match lines[at]
            .dots
            .iter_mut()
            .find(|(c, g)| *c == colour && g.id == id)
        {
            Some((_, group)) => group.rows.push(row),
            None => lines[at].dots.push((colour, groups_of(row))),
        }
    }
    lines
}

fn groups_of(row: &ResultRow) -> Group<'_> {
    groups(std::slice::from_ref(row)).swap_remove(0)
}

fn draw(svg: &mut Svg, x: &Scale, y: f64, group: &Group<'_>, measure: Measure, series: usize) {
    let Some(mean) = measure.over(group.rows.iter().copied()) else {
        return;
    };
    if mean.deviation.is_some() {
        // A mean less its deviation may be negative, which a logarithmic scale has no place for.
        let [low, high] = mean.ends().map(|v| x.at(v).clamp(LEFT, RIGHT));
        svg.line("whisker", (low, y), (high, y));
        for row in &group.rows {
            if let Some(value) = measure.of(row) {
                let tip = format!("{}: {} {}", row.name, measure.name(), short(value));
                svg.dot(
                    &format!("full s{series} f{series}"),
                    (x.at(value), y),
                    1.2,
                    &tip,
                );
            }
        }
    }
    let tip = format!("{}: {} {}", group.name, measure.name(), plus_minus(mean));
    let hollow = if group.first().criterion == WIDTH {
        "hollow"
    } else {
        "full"
    };
    svg.dot(
        &format!("{hollow} s{series} f{series}"),
        (x.at(mean.mean), y),
        4.0,
        &tip,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{results, study};

    fn count(svg: &str, tag: &str, size: Option<&str>) -> usize {
        let xml = roxmltree::Document::parse(svg).unwrap();
        let matches = |n: &roxmltree::Node<'_, '_>| {
            n.tag_name().name() == tag && size.is_none_or(|r| n.attribute("r") == Some(r))
        };
        xml.descendants().filter(matches).count()
    }

    #[test]
    fn a_study_of_criteria_has_a_line_for_each_in_its_class() {
        let r = study();
        let (svg, legend) = dots(&r, Kind::Table1, Measure::Fid).unwrap();
        let names: Vec<&str> = legend.iter().map(|l| l.1.as_str()).collect();
        assert_eq!(names, ["fine-tuning", "masked KD"]);
        let groups = groups(&r.rows);
        // One mean for each method that is not dense, and a dot for every row of those.
        assert_eq!(count(&svg, "circle", Some("4.0")), groups.len() - 2);
        assert_eq!(count(&svg, "circle", Some("1.2")), r.rows.len() - 2);
        for text in [
            "8 blocks, 200 steps",
            "11 blocks, 600 steps",
            "learned 3:4",
            "width",
        ] {
            assert!(svg.contains(&format!(">{text}</text>")), "{text}");
        }
        // Two budgets at 8 blocks alone have a width row.
        assert_eq!(svg.matches(">width</text>").count(), 2);
    }

    #[test]
    fn single_rows_are_dots_without_whiskers_and_missing_numbers_no_plot() {
        let mut r = results();
        r.rows.retain(|r| r.criterion != "random");
        let (svg, legend) = dots(&r, Kind::Table5, Measure::HeldOutLoss).unwrap();
        assert_eq!(count(&svg, "circle", None), 6);
        assert!(!svg.contains("whisker") && legend.is_empty());
        // The teacher is far off the others: it is told, and not drawn.
        assert!(
            svg.contains("dense 0.02, off the scale") && !svg.contains("ideal"),
            "{svg}"
        );
        r.rows[0].held_out_loss = Some(0.028);
        let (svg, _) = dots(&r, Kind::Table5, Measure::HeldOutLoss).unwrap();
        assert!(svg.contains("class=\"ideal\""));
        r.rows.iter_mut().for_each(|row| row.fid = None);
        assert!(dots(&r, Kind::Table5, Measure::Fid).is_none());
    }
}
