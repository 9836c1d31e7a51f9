//! Seeds of a method as one row.

use crate::groups::{Group, groups};
use crate::measure::Measure;
use crate::results::{ResultRow, Results};

/// The results with one row for each method, of which the numbers are means over its seeds. The random masks stay as they
/// are: their spread is asked for.
pub(super) fn means(results: &Results) -> Results {
    let one = |group: Group<'_>| -> Vec<ResultRow> {
        if group.first().criterion == "random" || group.rows.len() == 1 {
            return group.rows.into_iter().cloned().collect();
        }
        vec![mean(&group)]
    };
    let rows = groups(&results.rows).into_iter().flat_map(one).collect();
    Results {
        rows,
        ..results.clone()
    }
}

/// Where seeds diverged or failed, so did the method: the seeds that are left would flatter it.
fn mean(group: &Group<'_>) -> ResultRow {
    let lost = (group.rows.iter().find(|r| r.diverged()))
        .or_else(|| group.rows.iter().find(|r| r.failed.is_some()));
    let n = group.rows.len();
    if let Some(row) = lost {
        let count = group
            .rows
            .iter()
            .filter(|r| r.diverged() == row.diverged() && (row.diverged() || r.failed.is_some()));
        return ResultRow {
            name: format!("{} (in {} of {n} seeds)", group.name, count.count()),
            ..(*row).clone()
        };
    }
    let over = |measure: Measure| measure.over(group.rows.iter().copied()).map(|m| m.mean);
    ResultRow {
        name: format!("{} (mean of {n} seeds)", group.name),
        calibration_loss: over(Measure::CalibrationLoss),
        held_out_loss: over(Measure::HeldOutLoss),
        held_out_standard_error: None,
        fid: over(Measure::Fid),
        images_per_second: over(Measure::Speed),
        ..group.first().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::study;

    #[test]
    fn seeds_are_averaged_and_random_masks_are_not() {
        let mut r = study();
        let one = means(&r);
        assert_eq!(one.rows.len(), groups(&r.rows).len() + 3 * 4);
        let learned = |r: &Results| {
            r.rows
                .iter()
                .find(|r| r.id == "learned-2-4-ft-200-steps")
                .unwrap()
                .clone()
        };
        let row = learned(&one);
        assert!(row.name.ends_with("(mean of 2 seeds)"), "{}", row.name);
        assert!((row.fid.unwrap() - 57.06).abs() < 1e-9);
        let at = r
            .rows
            .iter()
            .position(|r| r.id == "learned-2-4-ft-200-steps")
            .unwrap();
        r.rows[at].held_out_loss = None;
        let row = learned(&means(&r));
        assert!(row.diverged() && row.score().is_none());
        assert!(row.name.ends_with("(in 1 of 2 seeds)"), "{}", row.name);
    }
}
