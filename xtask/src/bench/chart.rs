//! `bench.svg`: a picture that stands for itself, so it carries its own colours.

use tinyfusion_report::svg::{Anchor, Svg};

use super::preset::Contender;
use super::results::{CaseResult, ContenderResult, Results};
use super::table::{is_busy, seconds};

const STYLE: &str = "text{fill:#1b1f24;font:12px system-ui,'DejaVu Sans',sans-serif}.title{font-weight:600;font-size:15px}\
.case{font-weight:600}.soft{fill:#59636e}.ours{fill:#0a6bc2}.half{fill:#00845c}.eager{fill:#c75b00}.compile{fill:#a03a8c}\
.page{fill:#fff}line{stroke:#1b1f24}.one{stroke:#8a929c;stroke-dasharray:3 3}.floor{stroke-width:2}\
@media(prefers-color-scheme:dark){text{fill:#e4e8ed}.soft{fill:#9aa5b1}.page{fill:#12151a}line{stroke:#e4e8ed}\
.ours{fill:#63b3ff}.half{fill:#3fd0a0}.eager{fill:#ff9d4d}.compile{fill:#e08bd0}}";

const WIDTH: f64 = 900.0;
/// Where bars begin, and the room behind the longest for its number.
const LEFT: f64 = 190.0;
const RIGHT: f64 = 210.0;
const BAR: f64 = 18.0;
const GAP: f64 = 30.0;
const TOP: f64 = 64.0;

/// Time of every contender over ours; a whisker from the least to the largest, a mark at the floor.
pub(crate) fn draw(results: &Results) -> String {
    let bars: usize = results.cases.iter().map(|c| c.contenders.len()).sum();
    let height = TOP + bars as f64 * BAR + results.cases.len() as f64 * GAP + 10.0;
    let longest = results
        .cases
        .iter()
        .flat_map(|case| {
            case.contenders
                .iter()
                .map(|c| c.spread.largest / ours(case))
        })
        .fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / longest;
    let title = "Time of a step over tinyfusion's";
    let mut picture = Svg::new(WIDTH, height, title);
    picture.style(STYLE);
    picture.text("title", (12.0, 24.0), Anchor::Start, title);
    picture.text(
        "soft",
        (12.0, 44.0),
        Anchor::Start,
        &format!(
            "CPU, f32, {} threads; median of {} alternating rounds, whisker: least to largest; thick mark: what the operations cost at \
             the machine's peak",
            results.threads, results.rounds
        ),
    );
    let mut y = TOP;
    for case in &results.cases {
        let busy = if is_busy(case.cores_of_others) {
            " (not to be trusted: the machine was busy)"
        } else {
            ""
        };
        let name = format!("{}, batch {}{busy}", case.name, case.batch);
        picture.text("case", (12.0, y + 14.0), Anchor::Start, &name);
        y += GAP - 10.0;
        let (top, unit) = (y, ours(case));
        for c in &case.contenders {
            bar(&mut picture, c, y, unit, scale);
            y += BAR;
        }
        picture.line("one", (LEFT + scale, top), (LEFT + scale, y));
        if let Some(floor) = case.floor_seconds {
            let x = LEFT + floor / unit * scale;
            picture.line("floor", (x, top), (x, y));
        }
        y += 10.0;
    }
    picture.finish() + "\n"
}

/// Our median: the unit of a case.
fn ours(case: &CaseResult) -> f64 {
    case.contenders.first().map_or(1.0, |c| c.spread.median)
}

fn bar(picture: &mut Svg, c: &ContenderResult, y: f64, unit: f64, scale: f64) {
    let at = |s: f64| LEFT + s / unit * scale;
    let (class, middle) = (class(c.contender), y + BAR / 2.0);
    picture.text(
        "soft",
        (24.0, middle + 4.0),
        Anchor::Start,
        c.contender.name(),
    );
    let length = at(c.spread.median) - LEFT;
    picture.rect(class, (LEFT, y + 2.0), (length, BAR - 4.0), 1.0);
    picture.line(
        "whisker",
        (at(c.spread.least), middle),
        (at(c.spread.largest), middle),
    );
    let share = c
        .of_peak
        .map(|p| format!(", {:.0} % of peak", p * 100.0))
        .unwrap_or_default();
    picture.text(
        "number",
        // Behind the marks, too.
        (at(c.spread.largest.max(unit)) + 8.0, middle + 4.0),
        Anchor::Start,
        &format!(
            "{:.2}×  {}{share}",
            c.spread.median / unit,
            seconds(c.spread.median)
        ),
    );
}

fn class(contender: Contender) -> &'static str {
    match contender {
        Contender::Ours => "ours",
        Contender::Half => "half",
        Contender::Eager => "eager",
        Contender::Compile => "compile",
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::sample;
    use super::*;

    #[test]
    fn every_contender_has_a_bar_as_long_as_its_time() {
        let text = draw(&sample());
        let xml = roxmltree::Document::parse(&text).unwrap();
        let width = |class: &str| -> f64 {
            let bar = xml
                .descendants()
                .find(|n| n.attribute("class") == Some(class))
                .unwrap();
            bar.attribute("width").unwrap().parse().unwrap()
        };
        assert!((width("eager") / width("ours") - 1.5).abs() < 0.01);
        assert!((width("half") / width("ours") - 0.5).abs() < 0.01);
        let floor = xml
            .descendants()
            .find(|n| n.attribute("class") == Some("floor"))
            .unwrap();
        let x: f64 = floor.attribute("x1").unwrap().parse().unwrap();
        assert!((x - LEFT - 0.5 * width("ours")).abs() < 0.2);
        assert!(text.contains("forward &lt;S&gt;, batch 8"));
    }
}
