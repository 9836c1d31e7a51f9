//! A small writer of SVG: elements, a scale, axes. Colours are classes, so that the page's light and
//! dark themes reach into the pictures.

use std::fmt::Write;

/// Escapes text for XML and HTML, in content and in attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A picture being drawn.
pub struct Svg {
    body: String,
    width: f64,
    height: f64,
    title: String,
}

/// Where a text is anchored.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// At its begin.
    Start,
    /// At its middle.
    Middle,
    /// At its end.
    End,
}

impl Svg {
    /// `title` is what a screen reader says of the picture.
    pub fn new(width: f64, height: f64, title: &str) -> Self {
        Self {
            body: String::new(),
            width,
            height,
            title: title.into(),
        }
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        self.body.write_fmt(element).ok();
        self.body.push('\n');
    }

    /// A straight line.
    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.add(format_args!(
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        ));
    }

    /// A filled rectangle.
    pub fn rect(&mut self, class: &str, (x, y): (f64, f64), (w, h): (f64, f64), opacity: f64) {
        self.add(format_args!(
            r#"<rect class="{class}" x="{x:.2}" y="{y:.2}" width="{w:.2}" height="{h:.2}" opacity="{opacity:.3}"/>"#
        ));
    }

    /// A dot with a tooltip.
    pub fn dot(&mut self, class: &str, (x, y): (f64, f64), r: f64, tip: &str) {
        let tip = escape(tip);
        self.add(format_args!(r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{r:.1}"><title>{tip}</title></circle>"#));
    }

    /// A polyline with a tooltip.
    pub fn path(&mut self, class: &str, points: &[(f64, f64)], tip: &str) {
        let points: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let tip = escape(tip);
        self.add(format_args!(
            r#"<polyline class="{class}" points="{}"><title>{tip}</title></polyline>"#,
            points.join(" ")
        ));
    }

    /// A closed shape with a tooltip.
    pub fn polygon(&mut self, class: &str, points: &[(f64, f64)], tip: &str) {
        let points: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let tip = escape(tip);
        self.add(format_args!(
            r#"<polygon class="{class}" points="{}"><title>{tip}</title></polygon>"#,
            points.join(" ")
        ));
    }

    /// Another picture within this one, in a rectangle.
    pub fn nest(&mut self, picture: &str, (x, y): (f64, f64), (w, h): (f64, f64)) {
        let place = format!(r#"<svg x="{x:.1}" y="{y:.1}" width="{w:.1}" height="{h:.1}" "#);
        self.add(format_args!("{}", picture.replacen("<svg ", &place, 1)));
    }

    /// A text at its base line.
    pub fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escape(text);
        self.add(format_args!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
        ));
    }

    /// A text that reads upwards.
    pub fn text_up(&mut self, class: &str, (x, y): (f64, f64), text: &str) {
        let text = escape(text);
        self.add(format_args!(
            r#"<text class="{class}" transform="translate({x:.1} {y:.1}) rotate(-90)" text-anchor="middle">{text}</text>"#
        ));
    }

    /// The whole element.
    pub fn finish(self) -> String {
        let Self {
            body,
            width,
            height,
            title,
        } = self;
        let title = escape(&title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" \
             aria-label=\"{title}\">\n{body}</svg>"
        )
    }
}

/// A linear or logarithmic map from values to pixels.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Scale {
    /// Linear over the finite values among `values`, with some air, onto `from..to` pixels.
    pub fn linear(values: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = range(values.into_iter().filter(|v| v.is_finite()));
        let air = (high - low) * 0.06;
        Self {
            low: low - air,
            high: high + air,
            from,
            to,
            log: false,
        }
    }

    /// Linear over exactly `low..high`.
    pub fn exact(low: f64, high: f64, from: f64, to: f64) -> Self {
        let (low, high) = range([low, high].into_iter());
        Self {
            low,
            high,
            from,
            to,
            log: false,
        }
    }

    /// Logarithmic over the positive values among `values`.
    pub fn log(values: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = range(
            values
                .into_iter()
                .filter(|v| v.is_finite() && *v > 0.0)
                .map(f64::log10),
        );
        let air = ((high - low) * 0.06).max(0.02);
        Self {
            low: low - air,
            high: high + air,
            from,
            to,
            log: true,
        }
    }

    /// The pixel of a value.
    pub fn at(&self, value: f64) -> f64 {
        let v = if self.log {
            value.max(1e-300).log10()
        } else {
            value
        };
        self.from + (v - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// About `count` round values within the range.
    pub fn ticks(&self, count: usize) -> Vec<f64> {
        let (low, high) = if self.log {
            (10f64.powf(self.low), 10f64.powf(self.high))
        } else {
            (self.low, self.high)
        };
        if self.log && high / low > 3.0 {
            let (first, last) = (self.low.floor() as i32, self.high.ceil() as i32);
            let all: Vec<f64> = (first..=last)
                .flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e)))
                .collect();
            let within = |v: &f64| *v >= low && *v <= high;
            let decades: Vec<f64> = all.iter().copied().step_by(3).filter(within).collect();
            return if decades.len() >= count {
                decades
            } else {
                all.into_iter().filter(within).collect()
            };
        }
        let rough = (high - low) / count.max(1) as f64;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|m| m * unit)
            .find(|s| *s >= rough)
            .unwrap_or(unit);
        let first = (low / step).ceil() as i64;
        let last = (high / step).floor() as i64;
        (first..=last).map(|k| k as f64 * step).collect()
    }
}

/// Smallest and largest; never empty, so that a scale can divide by the difference.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
        (l.min(v), h.max(v))
    });
    if low > high {
        (0.0, 1.0)
    } else if high - low < 1e-12 * high.abs().max(1e-300) {
        let half = (low.abs() * 0.1).max(0.5);
        (low - half, high + half)
    } else {
        (low, high)
    }
}

/// A number for an axis or a table: three to four significant digits.
pub fn short(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        _ if !value.is_finite() => return "n/a".into(),
        0.0 => return "0".into(),
        s if s >= 1000.0 => return format!("{value:.0}"),
        s if s >= 100.0 => format!("{value:.1}"),
        s if s >= 10.0 => format!("{value:.2}"),
        s if s >= 1.0 => format!("{value:.3}"),
        s if s >= 0.1 => format!("{value:.4}"),
        s if s >= 0.001 => format!("{value:.5}"),
        _ => return format!("{value:.1e}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// The frame of a plot: axes with ticks, grid lines and names.
pub struct Frame<'a> {
    /// To the right.
    pub x: Scale,
    /// Upwards.
    pub y: Scale,
    /// Below the x axis.
    pub x_name: &'a str,
    /// Beside the y axis.
    pub y_name: &'a str,
}

impl Frame<'_> {
    /// Draws it.
    pub fn draw(&self, svg: &mut Svg) {
        let Self { x, y, .. } = self;
        for v in x.ticks(5) {
            svg.line("grid", (x.at(v), y.from), (x.at(v), y.to));
            svg.text("tick", (x.at(v), y.from + 16.0), Anchor::Middle, &short(v));
        }
        for v in y.ticks(5) {
            svg.line("grid", (x.from, y.at(v)), (x.to, y.at(v)));
            svg.text(
                "tick",
                (x.from - 6.0, y.at(v) + 4.0),
                Anchor::End,
                &short(v),
            );
        }
        svg.line("axis", (x.from, y.from), (x.to, y.from));
        svg.line("axis", (x.from, y.from), (x.from, y.to));
        svg.text(
            "name",
            (f64::midpoint(x.from, x.to), y.from + 34.0),
            Anchor::Middle,
            self.x_name,
        );
        svg.text_up(
            "name",
            (x.from - 46.0, f64::midpoint(y.from, y.to)),
            self.y_name,
        );
    }

    /// The pixel of a point.
    pub fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.x.at(x), self.y.at(y))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_is_well_formed_and_escaped() {
        let mut svg = Svg::new(100.0, 50.0, "a < b & \"c\"");
        svg.line("l", (0.0, 1.0), (2.0, 3.0));
        svg.rect("r", (0.0, 0.0), (1.0, 1.0), 0.5);
        svg.dot("d", (1.0, 1.0), 2.0, "x > y");
        svg.path("p", &[(0.0, 0.0), (1.5, 2.25)], "it's");
        svg.text("t", (0.0, 0.0), Anchor::Middle, "1 < 2");
        svg.text_up("t", (0.0, 0.0), "up");
        let text = svg.finish();
        let xml = roxmltree::Document::parse(&text).unwrap();
        let root = xml.root_element();
        assert_eq!(root.attribute("aria-label"), Some("a < b & \"c\""));
        let of = |tag: &str| {
            root.descendants()
                .find(|n| n.has_tag_name(("http://www.w3.org/2000/svg", tag)))
                .unwrap()
        };
        assert_eq!(of("polyline").attribute("points"), Some("0.0,0.0 1.5,2.2"));
        assert_eq!(of("text").text(), Some("1 < 2"));
        assert_eq!(
            of("circle").first_element_child().unwrap().text(),
            Some("x > y")
        );
    }

    #[test]
    fn scales_map_ends_and_survive_odd_data() {
        let exact = Scale::exact(0.0, 10.0, 100.0, 200.0);
        assert_eq!(
            (exact.at(0.0), exact.at(5.0), exact.at(10.0)),
            (100.0, 150.0, 200.0)
        );
        let log = Scale::log([1.0, 100.0], 0.0, 100.0);
        assert!((log.at(10.0) - 50.0).abs() < 1e-9);
        for odd in [vec![], vec![f64::NAN], vec![3.0, 3.0], vec![0.0]] {
            let scale = Scale::linear(odd.clone(), 0.0, 1.0);
            assert!(
                scale.at(3.0).is_finite() && scale.ticks(5).iter().all(|t| t.is_finite()),
                "{odd:?}"
            );
            assert!(Scale::log(odd, 0.0, 1.0).at(3.0).is_finite());
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let near = |found: Vec<f64>, expected: &[f64]| {
            assert_eq!(found.len(), expected.len(), "{found:?}");
            assert!(
                found
                    .iter()
                    .zip(expected)
                    .all(|(a, b)| (a - b).abs() < 1e-9 * b.abs().max(1.0)),
                "{found:?}"
            );
        };
        near(
            Scale::exact(0.0, 10.0, 0.0, 1.0).ticks(5),
            &[0.0, 2.0, 4.0, 6.0, 8.0, 10.0],
        );
        near(
            Scale::exact(0.013, 0.022, 0.0, 1.0).ticks(5),
            &[0.014, 0.016, 0.018, 0.020, 0.022],
        );
        near(
            Scale::log([1.0, 100.0], 0.0, 1.0).ticks(5),
            &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0],
        );
    }

    #[test]
    fn numbers_are_short() {
        let of: Vec<String> = [0.0, 1234.5, 23.456, 2.5, 0.02612, 1e-6, f64::NAN]
            .map(short)
            .into();
        assert_eq!(
            of,
            ["0", "1234", "23.46", "2.5", "0.02612", "1.0e-6", "n/a"]
        );
    }
}
