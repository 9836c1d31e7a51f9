use tinyfusion_core::{Error, Result};

use super::{BlockScore, Choice};

/// The blocks of the highest scores within each group (over the whole network where any will do), ascending.
/// Of equal ones the earlier stays.
pub(super) fn keep_highest(
    choice: &Choice,
    scores: &[BlockScore],
    criterion: &str,
) -> Result<Vec<usize>> {
    if let Some(bad) = scores.iter().find(|s| s.score.is_nan()) {
        return Err(Error::run(format!(
            "{criterion}: the score of block {} is not a number; are there NaN or infinite values in the model's weights?",
            bad.block
        )));
    }
    let mut kept = Vec::with_capacity(choice.keeps());
    for (start, group) in choice.pools(scores.len()) {
        let mut pool: Vec<&BlockScore> = scores[start..start + group.m].iter().collect();
        pool.sort_by(|a, b| b.score.total_cmp(&a.score)); // stable: the earlier of equals first
        kept.extend(pool.iter().take(group.n).map(|s| s.block));
    }
    kept.sort_unstable();
    Ok(kept)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tinyfusion_core::Group;

    use super::*;

    fn scores(values: &[f64]) -> Vec<BlockScore> {
        let score = |(block, &score)| BlockScore {
            block,
            score,
            standard_error: None,
        };
        values.iter().enumerate().map(score).collect()
    }

    #[test]
    fn the_highest_stay_within_their_groups() {
        let scores = scores(&[0.5, 0.4, 0.1, 0.1, 0.3, -0.2]);
        let pairs = Choice::Groups(vec![Group { n: 1, m: 2 }; 3]);
        assert_eq!(keep_highest(&pairs, &scores, "x").unwrap(), [0, 2, 4]);
        assert_eq!(
            keep_highest(&Choice::Any(3), &scores, "x").unwrap(),
            [0, 1, 4]
        );
    }

    #[test]
    fn a_score_that_is_no_number_is_an_error() {
        let error = keep_highest(&Choice::Any(1), &scores(&[0.1, f64::NAN]), "x").unwrap_err();
        assert!(error.to_string().contains("block 1"), "{error}");
    }
}
