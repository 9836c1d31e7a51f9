//! The paper's own numbers, to stand beside ours.

use super::svg::short;

/// A row of the paper's table for DiT-XL/2 on ImageNet at 256×256 (TinyFusion, arXiv 2412.01199,
/// table 1): name, depth, recovery or training steps, IS, FID, precision, recall, iterations per second.
pub(crate) struct PaperRow {
    pub(crate) name: &'static str,
    pub(crate) depth: &'static str,
    pub(crate) steps: &'static str,
    pub(crate) inception_score: f64,
    pub(crate) fid: f64,
    pub(crate) precision: f64,
    pub(crate) recall: f64,
    pub(crate) speed: f64,
}

const fn row(
    name: &'static str,
    depth: &'static str,
    steps: &'static str,
    [inception_score, fid, precision, recall, speed]: [f64; 5],
) -> PaperRow {
    PaperRow {
        name,
        depth,
        steps,
        inception_score,
        fid,
        precision,
        recall,
        speed,
    }
}

/// Names of the columns; all but the first hold numbers.
pub(crate) const COLUMNS: &[&str] = &[
    "method",
    "depth",
    "steps of training",
    "FID",
    "IS",
    "P",
    "R",
    "it/s",
];

/// The table's cells, line by line.
pub(crate) fn lines() -> impl Iterator<Item = Vec<String>> {
    ROWS.iter().map(|r| {
        let numbers = [r.fid, r.inception_score, r.precision, r.recall, r.speed].map(short);
        let names = [r.name, r.depth, r.steps].map(String::from);
        names.into_iter().chain(numbers).collect()
    })
}

/// Said wherever the table is shown.
pub(crate) const LABEL: &str = "The paper's numbers: DiT-XL/2 on ImageNet-256, 50,000 samples, Inception features. \
Another model, other data and other features: only the order of the methods can be compared with ours, not the values.";

/// Half the depth of DiT-XL/2, and what it is measured against.
pub(crate) const ROWS: &[PaperRow] = &[
    row(
        "DiT-XL/2, dense",
        "28",
        "7000K",
        [278.24, 2.27, 0.83, 0.57, 6.91],
    ),
    row(
        "ShortGPT",
        "28 → 14",
        "100K",
        [66.10, 22.28, 0.63, 0.56, 13.54],
    ),
    row(
        "Flux-Lite",
        "28 → 14",
        "100K",
        [54.54, 25.92, 0.62, 0.55, 13.54],
    ),
    row(
        "Sensitivity",
        "28 → 14",
        "100K",
        [70.36, 21.15, 0.63, 0.57, 13.54],
    ),
    row(
        "Oracle (BK-SDM)",
        "28 → 14",
        "100K",
        [141.18, 7.43, 0.75, 0.55, 13.54],
    ),
    row(
        "Learned (TinyFusion)",
        "28 → 14",
        "100K",
        [151.88, 5.73, 0.80, 0.55, 13.54],
    ),
    row(
        "Learned (TinyFusion)",
        "28 → 14",
        "500K",
        [198.85, 3.92, 0.78, 0.58, 13.54],
    ),
    row(
        "Learned (TinyFusion), masked KD",
        "28 → 14",
        "100K",
        [207.27, 3.73, 0.81, 0.54, 13.54],
    ),
    row(
        "Learned (TinyFusion), masked KD",
        "28 → 14",
        "500K",
        [234.50, 2.86, 0.82, 0.55, 13.54],
    ),
];

/// The paper's random control, which its table 1 does not have.
pub(crate) const RANDOM: &str = "Random masks in the paper (figure on calibration loss, fine-tuned 100K): the mask of median loss \
reaches FID 6.45, that of least loss 20.69.";
