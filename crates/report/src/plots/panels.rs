//! Small multiples: the decisions of several searches beside one another.

use super::{Decision, Selection, decisions};
use crate::svg::{Anchor, Svg};

/// A search with its history and its end.
#[derive(Debug, Clone)]
pub struct Search {
    /// Shown above the panel.
    pub name: String,
    /// Line by line.
    pub history: Vec<Decision>,
    /// What came of it.
    pub selection: Selection,
}

/// Panels in a row, and their rows.
const COLUMNS: usize = 3;
const SIZE: (f64, f64) = (420.0, 300.0);
const HEADING: f64 = 24.0;

/// A panel of [`decisions`] for every search, on the same size whatever its depth and steps.
pub fn searches(searches: &[Search]) -> String {
    let columns = searches.len().clamp(1, COLUMNS);
    let rows = searches.len().div_ceil(columns).max(1);
    let (width, height) = (SIZE.0, SIZE.1 + HEADING);
    let names: Vec<&str> = searches.iter().map(|s| s.name.as_str()).collect();
    let mut svg = Svg::new(
        width * columns as f64,
        height * rows as f64,
        &format!("Decisions over the steps of {}", names.join("; ")),
    );
    for (i, search) in searches.iter().enumerate() {
        let (x, y) = ((i % columns) as f64 * width, (i / columns) as f64 * height);
        svg.text(
            "strong",
            (x + width / 2.0, y + 16.0),
            Anchor::Middle,
            &search.name,
        );
        let picture = decisions(
            &search.name,
            &search.history,
            &search.selection.groups,
            &search.selection.kept,
        );
        svg.nest(&picture, (x, y + HEADING), SIZE);
    }
    svg.finish()
}
