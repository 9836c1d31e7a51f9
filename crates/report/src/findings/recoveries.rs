//! What recovery does: with a teacher or without, and from a good or a bad start.

use std::collections::BTreeMap;

use super::means::means;
use super::measure::fine_tuned;
use super::rules::compare;
use super::{MANY, Verdict};
use crate::class::{classes, comparable, masks, prefix, same_work};
use crate::comparisons::LEVEL;
use crate::correlation::rank_correlation;
use crate::results::{Recovery, ResultRow, Results};
use crate::statistics::{Moments, Paired};
use crate::svg::short;

/// Masked distillation against fine-tuning of the same mask with the same budget: mask by mask, or for each class where
/// there are many.
pub(super) fn distillation(results: &Results) -> Vec<(Verdict, String)> {
    let one = means(results);
    let kd = |r: &&ResultRow| r.recovery == Recovery::MaskedKd;
    let answers: Vec<_> = (one.rows.iter().filter(kd))
        .filter_map(|kd| Some(compare(kd, fine_tuned(kd, &one)?, &one)))
        .collect();
    if answers.len() <= MANY {
        return answers;
    }
    classes(results.rows.iter().filter(kd), same_work)
        .iter()
        .filter_map(|class| over_masks(class, results))
        .collect()
}

/// A class of distilled rows against the same masks fine-tuned, in a sentence.
fn over_masks(class: &[&ResultRow], results: &Results) -> Option<(Verdict, String)> {
    let pair = |kd: &&ResultRow| {
        let tuned = fine_tuned(kd, results)?;
        Some((kd.repetition(), (kd.score()?, tuned.score()?)))
    };
    let pairs: Vec<(u64, (f64, f64))> = class.iter().filter_map(pair).collect();
    let (kd, tuned): (Vec<f64>, Vec<f64>) = pairs.iter().map(|p| p.1).unzip();
    let (kd_mean, tuned_mean) = (Moments::of(&kd)?.mean, Moments::of(&tuned)?.mean);
    let wins = pairs.iter().filter(|(_, (kd, tuned))| kd < tuned).count();
    // The masks of a repetition are taken together, so that the repetitions are what is independent.
    let mut repetitions: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    for (repetition, pair) in &pairs {
        repetitions.entry(*repetition).or_default().push(*pair);
    }
    let mean = |all: &Vec<(f64, f64)>| {
        let n = all.len() as f64;
        let (a, b): (Vec<f64>, Vec<f64>) = all.iter().copied().unzip();
        (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n)
    };
    let test = Paired::of(&repetitions.values().map(mean).collect::<Vec<_>>());
    let (verdict, tested) = match test {
        Some(t) if t.p >= LEVEL => (Verdict::Unclear, format!("p = {:.3}, within noise", t.p)),
        Some(t) => {
            let verdict = if t.difference < 0.0 {
                Verdict::Yes
            } else {
                Verdict::No
            };
            (verdict, format!("p = {:.3}", t.p))
        }
        None => (Verdict::Unclear, "no test".into()),
    };
    let name = prefix(class, results, false);
    let text = format!(
        "{name}mean FID {} with masked KD against {} fine-tuned over {} pairs of equal masks, of which {wins} are better with KD; \
         paired test over {} seeds: {tested}.",
        short(kd_mean),
        short(tuned_mean),
        pairs.len(),
        repetitions.len()
    );
    Some((verdict, text))
}

/// Rank correlation of the losses before recovery with the quality after it, for each class of comparable rows.
pub(super) fn calibration(results: &Results) -> Vec<(Verdict, String)> {
    let tuned = results.rows.iter().filter(|r| {
        r.recovery == Recovery::FineTuning && r.calibration_loss.is_some() && r.score().is_some()
    });
    let answer = |class: Vec<&ResultRow>| {
        let points: Vec<(f64, f64)> = class
            .iter()
            .filter_map(|r| Some((r.calibration_loss?, r.score()?)))
            .collect();
        let rho = rank_correlation(&points)?;
        let masks = masks(class.iter().copied());
        // The 5 % point of Spearman's rho (two-sided) is about 1.96 / sqrt(n - 1). A mask that was recovered several times is
        // one mask.
        let needed = 1.96 / (masks.max(2) as f64 - 1.0).sqrt();
        let verdict = match rho {
            r if r >= needed => Verdict::Yes,
            r if r <= -needed => Verdict::No,
            _ => Verdict::Unclear,
        };
        let meaning = match verdict {
            Verdict::Yes => "masks that hurt less before recovery are also better after it",
            Verdict::No => "masks that hurt less before recovery are worse after it",
            _ => "no clear relation",
        };
        let name = prefix(&class, results, true);
        let text = format!(
            "{name}{meaning}: rank correlation of {} between calibration loss and FID over {} fine-tuned recoveries of {masks} masks \
             (beyond ±{} it would be unlikely by chance).",
            short(rho),
            points.len(),
            short(needed.min(1.0))
        );
        Some((verdict, text))
    };
    classes(tuned, comparable)
        .into_iter()
        .filter_map(answer)
        .collect()
}
