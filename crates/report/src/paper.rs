//! The paper's own numbers, to stand beside ours.

use crate::svg::short;

/// A row of the paper's table for DiT-XL/2 on ImageNet at 256×256 (TinyFusion, arXiv 2412.01199,
/// table 1): name, depth, recovery or training steps, IS, FID, precision, recall, iterations per second.
struct PaperRow {
    name: &'static str,
    depth: &'static str,
    steps: &'static str,
    inception_score: f64,
    fid: f64,
    precision: f64,
    recall: f64,
    speed: f64,
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

/// A table of the paper, with what is said wherever it is shown.
pub(crate) struct Table {
    pub(crate) label: &'static str,
    /// All but the first hold numbers.
    pub(crate) columns: &'static [&'static str],
    pub(crate) lines: Vec<Vec<String>>,
    pub(crate) note: Option<&'static str>,
}

/// What the paper has of a family: table 1 for DiT, its part of table 2 for the others.
pub(crate) fn of(family: &str) -> Table {
    if family != "DiT" {
        return table_2(&[family]);
    }
    let line = |r: &PaperRow| {
        let numbers = [r.fid, r.inception_score, r.precision, r.recall, r.speed].map(short);
        let names = [r.name, r.depth, r.steps].map(String::from);
        names.into_iter().chain(numbers).collect()
    };
    Table {
        label: LABEL,
        columns: &[
            "method",
            "depth",
            "steps of training",
            "FID",
            "IS",
            "P",
            "R",
            "it/s",
        ],
        lines: ROWS.iter().map(line).collect(),
        note: Some(RANDOM),
    }
}

/// The rows of these families, as in the paper's table 2.
pub(crate) fn table_2(families: &[&str]) -> Table {
    let line = |r: &FamilyRow| {
        let names = [r.name, r.depth, r.parameters, r.training].map(String::from);
        names
            .into_iter()
            .chain([r.fid, r.inception_score].map(short))
            .collect()
    };
    Table {
        label: FAMILIES_LABEL,
        columns: &["method", "depth", "params", "training", "FID", "IS"],
        lines: FAMILIES
            .iter()
            .filter(|r| families.contains(&r.family))
            .map(line)
            .collect(),
        note: None,
    }
}

const LABEL: &str = "The paper's numbers: DiT-XL/2 on ImageNet-256, 50,000 samples, Inception features. \
Another model, other data and other features: only the order of the methods can be compared with ours, not the values.";

const FAMILIES_LABEL: &str = "The paper's numbers: large models on ImageNet-256, 50,000 samples, Inception features. Other models, \
other data, longer recoveries and other features: what a cut costs can be compared with ours in kind, not the values.";

/// A model of a family (the same paper; DiT as in table 1, the others as in table 2).
struct FamilyRow {
    family: &'static str,
    name: &'static str,
    depth: &'static str,
    parameters: &'static str,
    training: &'static str,
    fid: f64,
    inception_score: f64,
}

const fn model(
    family: &'static str,
    [name, depth, parameters, training]: [&'static str; 4],
    fid: f64,
    inception_score: f64,
) -> FamilyRow {
    FamilyRow {
        family,
        name,
        depth,
        parameters,
        training,
        fid,
        inception_score,
    }
}

/// Dense models, and what is left of half their depth.
const FAMILIES: &[FamilyRow] = &[
    model(
        "DiT",
        ["DiT-XL/2, dense", "28", "675M", "7000K steps"],
        2.27,
        278.24,
    ),
    model(
        "DiT",
        [
            "TinyDiT-D14 (learned, masked KD)",
            "28 → 14",
            "340M",
            "500K steps",
        ],
        2.86,
        234.50,
    ),
    model("SiT", ["SiT-XL/2, dense", "28", "–", "–"], 2.06, 277.5),
    model(
        "SiT",
        ["TinySiT-D14 (learned)", "28 → 14", "340M", "100 epochs"],
        3.02,
        220.1,
    ),
    model("MAR", ["MAR-Large, dense", "32", "479M", "–"], 1.78, 296.0),
    model("MAR", ["MAR-Base, dense", "24", "208M", "–"], 2.31, 281.7),
    model(
        "MAR",
        ["TinyMAR-D16 (learned)", "32 → 16", "277M", "40 epochs"],
        2.28,
        283.4,
    ),
];

/// Half the depth of DiT-XL/2, and what it is measured against.
const ROWS: &[PaperRow] = &[
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
const RANDOM: &str = "Random masks in the paper (figure on calibration loss, fine-tuned 100K): the mask of median loss \
reaches FID 6.45, that of least loss 20.69.";
