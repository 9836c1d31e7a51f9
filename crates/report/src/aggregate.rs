//! The random masks taken together.

use serde::{Deserialize, Serialize};

use crate::class::{classes, comparable};
use crate::groups::groups;
use crate::results::{ResultRow, Results};

/// Median and spread of one number over the random masks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle number.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one number, all finite.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut v = values.to_vec();
        v.sort_by(f64::total_cmp);
        let (min, max) = (*v.first()?, *v.last()?);
        let median = f64::midpoint(v[(v.len() - 1) / 2], v[v.len() / 2]);
        Some(Self { median, min, max })
    }

    /// Largest less smallest.
    pub fn width(self) -> f64 {
        self.max - self.min
    }
}

/// The random masks of one pattern with equal work and recovery, as one row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Aggregate {
    /// For people.
    pub name: String,
    /// [`ResultRow::id`] of all of them, those that diverged or failed included.
    pub ids: Vec<String>,
    /// Masks with numbers: those that neither diverged nor failed.
    pub count: usize,
    /// Over `calibration_loss` of the rows.
    pub calibration_loss: Option<Spread>,
    /// Over `held_out_loss` of the rows.
    pub held_out_loss: Option<Spread>,
    /// Over `fid` of the rows.
    pub fid: Option<Spread>,
    /// Over `inception_score` of the rows.
    pub inception_score: Option<Spread>,
    /// Over `precision` of the rows.
    pub precision: Option<Spread>,
    /// Over `recall` of the rows.
    pub recall: Option<Spread>,
    /// Over `kid` of the rows.
    pub kid: Option<Spread>,
    /// Over `accuracy` of the rows.
    pub accuracy: Option<Spread>,
    /// Over `images_per_second` of the rows.
    pub images_per_second: Option<Spread>,
}

impl Aggregate {
    /// Of the recovered random masks among `rows`: one for every class of comparable rows and every pattern, in the order in
    /// which they begin. A class of which no mask was measured has none.
    pub fn of(rows: &[ResultRow]) -> Vec<Self> {
        let random = rows.iter().filter(|r| r.criterion == "random");
        let alike = |a: &ResultRow, b: &ResultRow| comparable(a, b) && a.pattern == b.pattern;
        classes(random, alike)
            .iter()
            .filter_map(|class| Self::of_class(class))
            .collect()
    }

    fn of_class(class: &[&ResultRow]) -> Option<Self> {
        let (random, lost): (Vec<&ResultRow>, Vec<&ResultRow>) = class
            .iter()
            .copied()
            .partition(|r| !r.diverged() && r.failed.is_none());
        let first = random.first()?;
        let over = |f: &dyn Fn(&ResultRow) -> Option<f64>| {
            Spread::of(
                &random
                    .iter()
                    .filter_map(|r| f(r))
                    .filter(|x| x.is_finite())
                    .collect::<Vec<_>>(),
            )
        };
        Some(Self {
            name: name(first, random.len(), lost.len()),
            ids: class.iter().map(|r| r.id.clone()).collect(),
            count: random.len(),
            calibration_loss: over(&|r| r.calibration_loss),
            held_out_loss: over(&|r| r.held_out_loss),
            fid: over(&|r| r.fid),
            inception_score: over(&|r| r.inception_score),
            precision: over(&|r| r.precision),
            recall: over(&|r| r.recall),
            kid: over(&|r| r.kid),
            accuracy: over(&|r| r.accuracy),
            images_per_second: over(&|r| r.images_per_second),
        })
    }

    /// The rows that it is of.
    pub(crate) fn rows<'a>(&self, results: &'a Results) -> Vec<&'a ResultRow> {
        let own = |r: &&ResultRow| self.ids.contains(&r.id);
        results.rows.iter().filter(own).collect()
    }
}

/// The random masks among the aggregates that are `alike` to a row: those from the row's own pattern, or else the first.
pub(crate) fn control<'a>(
    row: &ResultRow,
    results: &'a Results,
    alike: fn(&ResultRow, &ResultRow) -> bool,
) -> Option<(&'a Aggregate, Vec<&'a ResultRow>)> {
    let all = results.random.iter().map(|a| (a, a.rows(results)));
    let mut controls: Vec<_> = all
        .filter(|(_, masks)| masks.first().is_some_and(|r| alike(row, r)))
        .collect();
    let own = (controls.iter()).position(|(_, masks)| masks[0].pattern == row.pattern);
    let at = own.unwrap_or(0);
    (at < controls.len()).then(|| controls.swap_remove(at))
}

/// `random 1:2, seed 0, fine-tuned` as `random 1:2, median of 4, fine-tuned`.
fn name(first: &ResultRow, count: usize, lost: usize) -> String {
    let group = groups(std::slice::from_ref(first)).swap_remove(0).name;
    let mask = match &first.pattern {
        Some(pattern) => format!("random {pattern}"),
        None => "random any".into(),
    };
    let lost = match lost {
        0 => String::new(),
        n => format!(" ({n} more diverged or failed)"),
    };
    // A mask with a name of its own keeps it.
    let (mask, tail) = match group.strip_prefix(&mask) {
        Some(tail) => (mask.as_str(), tail),
        None => (group.as_str(), ""),
    };
    format!("{mask}, median of {count}{lost}{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::study;

    #[test]
    fn the_spread_is_that_of_sorted_numbers() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(
            (spread.median, spread.min, spread.max, spread.width()),
            (2.5, 1.0, 4.0, 3.0)
        );
        assert_eq!(Spread::of(&[7.0, 5.0, 9.0]).unwrap().median, 7.0);
        assert!(Spread::of(&[]).is_none());
    }

    #[test]
    fn every_class_has_an_aggregate_of_its_own() {
        let r = study();
        let all = Aggregate::of(&r.rows);
        let told: Vec<(&str, usize, f64)> = all
            .iter()
            .map(|a| (a.name.as_str(), a.count, a.fid.unwrap().median))
            .collect();
        // Two masks for each of two seeds; deeper and longer is better, and is not mixed in.
        assert_eq!(
            told,
            [
                ("random 2:4, median of 4, fine-tuned, 200 steps", 4, 61.5),
                ("random 2:4, median of 4, fine-tuned, 600 steps", 4, 41.5),
                ("random 3:4, median of 4, fine-tuned, 200 steps", 4, 31.5),
                ("random 3:4, median of 4, fine-tuned, 600 steps", 4, 11.5),
            ]
        );
        assert!(all.iter().all(|a| a.rows(&r).len() == 4));
    }

    #[test]
    fn the_control_is_of_the_rows_own_class_and_pattern() {
        let mut r = study();
        let row = |r: &Results, id: &str| r.rows.iter().find(|x| x.id == id).unwrap().clone();
        let learned = row(&r, "learned-3-4-seed-1-ft-600-steps");
        let (_, masks) = control(&learned, &r, comparable).unwrap();
        assert!(
            masks
                .iter()
                .all(|m| m.depth == 11 && m.budget_steps == Some(600))
        );
        let kd = row(&r, "learned-3-4-seed-1-kd-600-steps");
        assert!(control(&kd, &r, comparable).is_none());
        assert!(control(&kd, &r, crate::class::same_work).is_some());
        // Masks of another pattern in the same class stand in only where there are none of the own one.
        for (i, row) in r
            .rows
            .iter_mut()
            .filter(|r| r.criterion == "random")
            .enumerate()
        {
            row.pattern = Some(if i % 2 == 0 {
                "1:4".into()
            } else {
                "3:4".into()
            });
        }
        r.random = Aggregate::of(&r.rows);
        let (_, masks) = control(&learned, &r, comparable).unwrap();
        assert!(
            masks.iter().all(|m| m.pattern.as_deref() == Some("3:4")),
            "{masks:?}"
        );
    }

    #[test]
    fn files_of_the_older_schema_are_read() {
        let mut value = serde_json::to_value(study()).unwrap();
        for old in [
            serde_json::Value::Null,
            serde_json::json!({"name": "x", "count": 3}),
        ] {
            value["random"] = old;
            let read: Results = serde_json::from_value(value.clone()).unwrap();
            assert!(read.random.is_empty());
        }
        let new = serde_json::to_value(study()).unwrap();
        let read: Results = serde_json::from_value(new).unwrap();
        assert_eq!(read.random.len(), 4);
    }
}
