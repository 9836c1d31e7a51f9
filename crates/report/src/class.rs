//! Which rows may be compared with one another: the one rule, for aggregates, findings, tests and plots.

use std::collections::BTreeSet;

use crate::results::{ResultRow, Results};
use crate::svg::short;

/// The criterion of models whose blocks are narrower, all of them kept.
pub(crate) const WIDTH: &str = "width";

/// A model pruned in width is as large as another whose parameters differ by no more than this part.
const SAME_PARAMETERS: f64 = 0.02;

/// Whether two cut models are of one size: equally deep or, where one of them is pruned in width, with as many parameters.
pub(crate) fn same_size(a: &ResultRow, b: &ResultRow) -> bool {
    if a.criterion != WIDTH && b.criterion != WIDTH {
        return a.depth == b.depth;
    }
    let (a, b) = (a.parameters as f64, b.parameters as f64);
    (a - b).abs() <= SAME_PARAMETERS * a.max(b)
}

/// Whether two rows differ in nothing but the mask and the kind of recovery: one size, one sampler, one budget, one x.
pub(crate) fn same_work(a: &ResultRow, b: &ResultRow) -> bool {
    same_size(a, b)
        && a.sampling_steps == b.sampling_steps
        && (a.budget_steps, a.samples_seen) == (b.budget_steps, b.samples_seen)
        && a.x == b.x
}

/// Whether two rows differ in nothing but the mask (and the seed): [`same_work`], recovered in the same way.
pub(crate) fn comparable(a: &ResultRow, b: &ResultRow) -> bool {
    same_work(a, b) && a.recovery_label() == b.recovery_label()
}

/// Whether two rows are recoveries of one cut model.
pub(crate) fn same_mask(a: &ResultRow, b: &ResultRow) -> bool {
    (&a.criterion, &a.pattern, &a.kept_layers) == (&b.criterion, &b.pattern, &b.kept_layers)
        && (a.seed, a.repetition()) == (b.seed, b.repetition())
}

/// The rows in classes of which all are `alike`, in the order in which they begin.
pub(crate) fn classes<'a>(
    rows: impl IntoIterator<Item = &'a ResultRow>,
    alike: impl Fn(&ResultRow, &ResultRow) -> bool,
) -> Vec<Vec<&'a ResultRow>> {
    let mut classes: Vec<Vec<&ResultRow>> = Vec::new();
    for row in rows {
        match classes.iter_mut().find(|c| alike(c[0], row)) {
            Some(class) => class.push(row),
            None => classes.push(vec![row]),
        }
    }
    classes
}

/// How many masks there are among `rows`: a mask that was recovered several times counts once. Models pruned in width
/// keep all blocks, so that their method stands for the mask.
pub(crate) fn masks<'a>(rows: impl IntoIterator<Item = &'a ResultRow>) -> usize {
    let mask = |r: &'a ResultRow| {
        let narrow = (r.criterion == WIDTH).then_some((r.parameters, r.repetition()));
        (&r.kept_layers, narrow)
    };
    rows.into_iter().map(mask).collect::<BTreeSet<_>>().len()
}

/// What tells a class from the other rows that are no dense model, in words: `8 blocks, 200 steps`; nothing where all are
/// alike. The recovery is named only on demand.
pub(crate) fn words(class: &[&ResultRow], results: &Results, recovery: bool) -> String {
    // Of a width row the depth says nothing.
    let Some(row) = (class.iter().find(|r| r.criterion != WIDTH)).or(class.first()) else {
        return String::new();
    };
    let others = || results.rows.iter().filter(|r| r.criterion != "dense");
    let varies = |alike: &dyn Fn(&ResultRow) -> bool| others().any(|r| !alike(r));
    let mut words = Vec::new();
    if varies(&|r| same_size(row, r)) {
        words.push(if row.criterion == WIDTH {
            format!("{} parameters", crate::table::parameters(row.parameters))
        } else {
            format!("{} blocks", row.depth)
        });
    }
    if varies(&|r| r.sampling_steps == row.sampling_steps) {
        words.push(format!("{} sampling steps", row.sampling_steps));
    }
    if recovery && varies(&|r| r.recovery_label() == row.recovery_label()) {
        words.push(row.recovery_label().into());
    }
    if varies(&|r| r.x == row.x) {
        let name = results.study.as_ref().and_then(|s| s.x_name.as_deref());
        let name = name.unwrap_or("x");
        words.push(
            row.x
                .map_or(format!("no {name}"), |x| format!("{name} {}", short(x))),
        );
    }
    match (row.budget_steps, row.samples_seen) {
        (Some(steps), _) if varies(&|r| r.budget_steps == row.budget_steps) => {
            words.push(format!("{steps} steps"));
        }
        (_, Some(samples)) if varies(&|r| r.samples_seen == row.samples_seen) => {
            words.push(format!("{samples} samples seen"));
        }
        _ => {}
    }
    words.join(", ")
}

/// [`words`] to begin a sentence with: `8 blocks, 200 steps: `, or nothing.
pub(crate) fn prefix(class: &[&ResultRow], results: &Results, recovery: bool) -> String {
    match words(class, results, recovery) {
        name if name.is_empty() => name,
        name => format!("{name}: "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{results, study};

    #[test]
    fn a_row_is_comparable_only_with_what_had_the_same_work() {
        let base = ResultRow {
            criterion: "learned".into(),
            depth: 8,
            parameters: 1000,
            sampling_steps: 25,
            budget_steps: Some(200),
            samples_seen: Some(3200),
            x: Some(16.0),
            recovery_label: Some("fine-tuned".into()),
            ..ResultRow::default()
        };
        let changed = |change: fn(&mut ResultRow)| {
            let mut other = base.clone();
            change(&mut other);
            (comparable(&base, &other), same_work(&base, &other))
        };
        assert_eq!(changed(|r| r.criterion = "oracle".into()), (true, true));
        assert_eq!(changed(|r| r.depth = 11), (false, false));
        assert_eq!(changed(|r| r.sampling_steps = 12), (false, false));
        assert_eq!(changed(|r| r.budget_steps = Some(600)), (false, false));
        assert_eq!(changed(|r| r.samples_seen = None), (false, false));
        assert_eq!(changed(|r| r.x = None), (false, false));
        let kd = changed(|r| r.recovery_label = Some("masked KD".into()));
        assert_eq!(kd, (false, true));
    }

    #[test]
    fn width_is_as_large_as_what_has_its_parameters() {
        let row = |criterion: &str, depth, parameters| ResultRow {
            criterion: criterion.into(),
            depth,
            parameters,
            ..ResultRow::default()
        };
        let learned = row("learned", 8, 1000);
        assert!(same_size(&learned, &row("width", 16, 1019)));
        assert!(!same_size(&learned, &row("width", 16, 1030)));
        // Blocks are of one size: between depths the parameters do not matter.
        assert!(same_size(&learned, &row("oracle", 8, 1500)));
        assert!(!same_size(&learned, &row("oracle", 9, 1001)));
    }

    #[test]
    fn a_class_is_named_by_what_varies() {
        let r = study();
        let students = || r.rows.iter().filter(|r| r.criterion != "dense");
        let of = |alike: fn(&ResultRow, &ResultRow) -> bool, recovery| -> Vec<String> {
            let classes = classes(students(), alike);
            classes.iter().map(|c| words(c, &r, recovery)).collect()
        };
        let expected = [
            "8 blocks, 200 steps",
            "8 blocks, 600 steps",
            "11 blocks, 200 steps",
            "11 blocks, 600 steps",
        ];
        assert_eq!(of(same_work, false), expected);
        assert_eq!(of(comparable, true).len(), 8);
        assert_eq!(of(comparable, true)[0], "8 blocks, fine-tuning, 200 steps");
        // Where all rows are alike there is nothing to say.
        let r = results();
        assert_eq!(words(&[&r.rows[3]], &r, false), "");
    }
}
