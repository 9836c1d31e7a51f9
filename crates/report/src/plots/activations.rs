//! Histograms of hidden states, layer by layer.

use serde::Deserialize;

use crate::svg::{Anchor, Scale, Svg, short};

/// What `tinyfusion activations --json` writes, as far as it is drawn.
#[derive(Debug, Clone, Deserialize)]
pub struct Activations {
    /// From the first block to the last.
    pub layers: Vec<Layer>,
}

/// The hidden states after one block.
#[derive(Debug, Clone, Deserialize)]
pub struct Layer {
    /// Index of the block.
    pub layer: usize,
    /// Bounds of the bins, ascending, one more than there are counts.
    pub edges: Vec<f64>,
    /// Values in each bin.
    pub counts: Vec<u64>,
    /// Mean of all values.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
    /// The largest absolute value.
    pub max_abs: f64,
    /// How many values are far from the mean.
    #[serde(default)]
    pub beyond: Vec<Beyond>,
}

/// The share of values at least so many standard deviations from the mean.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Beyond {
    /// Standard deviations.
    pub sigma: f64,
    /// From 0 to 1.
    pub share: f64,
}

impl Activations {
    /// What is wrong with the numbers, if anything is.
    pub fn check(&self) -> Result<(), String> {
        if self.layers.is_empty() {
            return Err("`layers` is empty".into());
        }
        for l in &self.layers {
            if l.edges.len() != l.counts.len() + 1 {
                return Err(format!(
                    "layer {}: expected {} `edges` around {} `counts`, found {}",
                    l.layer,
                    l.counts.len() + 1,
                    l.counts.len(),
                    l.edges.len()
                ));
            }
            let ascends = |w: &[f64]| w[0] < w[1];
            if !l.edges.windows(2).all(ascends) || !l.edges.iter().all(|e| e.is_finite()) {
                return Err(format!(
                    "layer {}: `edges` have to ascend and be finite",
                    l.layer
                ));
            }
        }
        Ok(())
    }
}

const COLUMNS: usize = 4;
const PANEL: (f64, f64) = (240.0, 150.0);

/// A histogram per layer over the same axes: values to the right, linear around zero and logarithmic far from it (asinh), as
/// the bins of the measurement; counts upwards, logarithmic.
pub fn activations(name: &str, data: &Activations) -> String {
    let layers = &data.layers;
    let columns = layers.len().clamp(1, COLUMNS);
    let (width, height) = (
        PANEL.0 * columns as f64,
        PANEL.1 * layers.len().div_ceil(columns).max(1) as f64,
    );
    let mut svg = Svg::new(
        width,
        height + 24.0,
        &format!("Hidden states of {name}, one histogram per block"),
    );
    // Of the bins that hold anything: their bounds reach much farther.
    let ends = layers
        .iter()
        .flat_map(filled)
        .flat_map(|(low, high, _)| [low, high]);
    let reach = ends.map(f64::abs).fold(1e-9, f64::max);
    let most = layers
        .iter()
        .flat_map(|l| &l.counts)
        .copied()
        .max()
        .unwrap_or(1)
        .max(2);
    for (i, layer) in layers.iter().enumerate() {
        let corner = (
            (i % columns) as f64 * PANEL.0,
            (i / columns) as f64 * PANEL.1,
        );
        panel(&mut svg, layer, corner, reach, most as f64);
    }
    svg.text(
        "name",
        (width / 2.0, height + 14.0),
        Anchor::Middle,
        "value (asinh scale); height: count (log scale)",
    );
    svg.finish()
}

/// Bins that hold something: bounds and count.
fn filled(layer: &Layer) -> impl Iterator<Item = (f64, f64, u64)> {
    let bins = layer.edges.windows(2).zip(&layer.counts);
    bins.filter(|(_, count)| **count > 0)
        .map(|(e, count)| (e[0], e[1], *count))
}

fn panel(svg: &mut Svg, layer: &Layer, (left, top): (f64, f64), reach: f64, most: f64) {
    let (from, to, base, roof) = (
        left + 12.0,
        left + PANEL.0 - 12.0,
        top + PANEL.1 - 22.0,
        top + 34.0,
    );
    let x = Scale::exact(-reach.asinh(), reach.asinh(), from, to);
    // One count has a height, too.
    let y = Scale::exact(-0.3, most.log10(), base, roof);
    svg.text(
        "strong",
        (from, top + 14.0),
        Anchor::Start,
        &format!("block {}", layer.layer),
    );
    let numbers = format!("σ {}, largest {}", short(layer.std), short(layer.max_abs));
    svg.text("tick", (to, top + 14.0), Anchor::End, &numbers);
    if let Some(b) = layer.beyond.last() {
        let share = format!("{} % beyond {}σ", short(100.0 * b.share), short(b.sigma));
        svg.text("tick", (to, top + 28.0), Anchor::End, &share);
    }
    for (low, high, count) in filled(layer) {
        let (a, b) = (x.at(low.asinh()), x.at(high.asinh()));
        let height = base - y.at((count as f64).log10());
        svg.rect("f3 bin", (a, base - height), (b - a, height), 1.0);
    }
    svg.line("axis", (from, base), (to, base));
    for value in [-reach, 0.0, reach] {
        svg.text(
            "tick",
            (x.at(value.asinh()), base + 14.0),
            Anchor::Middle,
            &short(value),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> Layer {
        Layer {
            layer: 3,
            edges: vec![-100.0, -1.0, 0.0, 1.0, 100.0],
            counts: vec![0, 1000, 1000, 1],
            mean: 0.0,
            std: 0.5,
            max_abs: 50.0,
            beyond: vec![Beyond {
                sigma: 8.0,
                share: 0.0005,
            }],
        }
    }

    #[test]
    fn every_filled_bin_is_a_bar_as_high_as_the_logarithm_of_its_count() {
        let data = Activations {
            layers: vec![layer(), layer()],
        };
        data.check().unwrap();
        let text = activations("a < b", &data);
        let xml = roxmltree::Document::parse(&text).unwrap();
        let heights: Vec<f64> = xml
            .descendants()
            .filter(|n| n.attribute("class") == Some("f3 bin"))
            .map(|n| n.attribute("height").unwrap().parse().unwrap())
            .collect();
        assert_eq!(heights.len(), 6);
        // log10: 3, 3, 0, from a floor of −0.3.
        assert!(
            (heights[0] / heights[2] - 3.3 / 0.3).abs() < 0.01,
            "{heights:?}"
        );
        assert!(text.contains("0.05 % beyond 8σ"));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let mut bad = layer();
        bad.counts.pop();
        let error = Activations { layers: vec![bad] }.check().unwrap_err();
        assert_eq!(
            error,
            "layer 3: expected 4 `edges` around 3 `counts`, found 5"
        );
        let mut bad = layer();
        bad.edges[1] = -200.0;
        assert!(
            Activations { layers: vec![bad] }
                .check()
                .unwrap_err()
                .contains("ascend")
        );
        assert!(Activations { layers: vec![] }.check().is_err());
    }
}
