use super::*;
use crate::results::{Cost, Recovery};

/// FID of a criterion at seeds 0, 1, …; none: diverged.
fn rows(criterion: &str, fids: &[Option<f64>]) -> Vec<ResultRow> {
    let cost = Cost {
        seconds: 1.0,
        peak_rss_bytes: None,
    };
    let row = |(seed, fid): (usize, &Option<f64>)| ResultRow {
        id: format!("{criterion}-seed-{seed}-ft"),
        name: format!("{criterion}, seed {seed}, fine-tuned"),
        criterion: criterion.into(),
        recovery: Recovery::FineTuning,
        seed: seed as u64,
        depth: 8,
        fid: *fid,
        held_out_loss: fid.map(|f| f / 1000.0),
        stages: [("loss".to_string(), cost)].into(),
        ..ResultRow::default()
    };
    fids.iter().enumerate().map(row).collect()
}

fn some(fids: &[f64]) -> Vec<Option<f64>> {
    fids.iter().copied().map(Some).collect()
}

fn against(rows: &[ResultRow], rival: &str) -> Comparison {
    comparisons(rows)
        .into_iter()
        .find(|c| c.rival.starts_with(rival) && c.measure == Measure::Fid)
        .unwrap()
}

#[test]
fn learned_may_win_lose_or_be_within_noise() {
    let all = [
        rows("learned", &some(&[10.0, 11.0, 12.0])),
        rows("oracle", &some(&[20.0, 21.1, 22.05])),
        rows("random", &some(&[5.0, 6.1, 7.05])),
        rows("sensitivity", &some(&[8.0, 13.0, 12.5])),
    ]
    .concat();
    let wins = against(&all, "oracle");
    assert_eq!(wins.verdict, Verdict::Yes);
    assert!(
        wins.text.starts_with(
            "FID: learned, fine-tuned is better than oracle, fine-tuned by 10.05 (95 % CI 9.9"
        ),
        "{}",
        wins.text
    );
    let loses = against(&all, "random");
    assert_eq!(loses.verdict, Verdict::No);
    assert!(loses.text.ends_with(": learned loses."), "{}", loses.text);
    assert!(loses.text.contains("is worse than random"));
    let noise = against(&all, "sensitivity");
    assert_eq!(noise.verdict, Verdict::Unclear);
    assert!(noise.text.ends_with(": within noise."), "{}", noise.text);
    let [.., difference, interval, p, verdict] = noise.cells();
    assert_eq!(
        (difference.as_str(), verdict.as_str()),
        ("−0.1667", "Not clear")
    );
    assert!(
        interval.starts_with('−') && interval.contains(" to +"),
        "{interval}"
    );
    assert!(p.parse::<f64>().unwrap() > LEVEL, "{p}");
    // Three rivals by two measures, each corrected among the rivals alone.
    let every = comparisons(&all);
    assert_eq!(every.len(), 6);
    let (raw, held): (Vec<f64>, Vec<f64>) = every[..3]
        .iter()
        .map(|c| (c.test.unwrap().p, c.corrected.unwrap()))
        .unzip();
    assert_eq!(holm(&raw), held);
}

#[test]
fn the_interval_is_that_of_the_difference() {
    let all = [
        rows("learned", &some(&[8.0, 9.0, 10.0])),
        rows("oracle", &some(&[10.0, 12.0, 14.0])),
    ]
    .concat();
    // As by hand in `statistics`: −3 ± 4.3027 / √3, p 0.035.
    let c = against(&all, "oracle");
    let expected = "by 3 (95 % CI 0.5159 to 5.484, p = 0.035, 3 seeds).";
    assert!(c.text.ends_with(expected), "{}", c.text);
}

#[test]
fn several_masks_of_a_repetition_count_as_their_mean() {
    let mut random = rows("random", &some(&[9.0, 11.0, 11.0, 15.0]));
    for (i, row) in random.iter_mut().enumerate() {
        row.repetition = Some(i as u64 / 2);
    }
    let all = [rows("learned", &some(&[8.0, 8.0])), random].concat();
    let test = against(&all, "random").test.unwrap();
    // Pairs (8, 10) and (8, 13).
    assert_eq!((test.n, test.difference), (2, -3.5));
}

#[test]
fn a_seed_without_a_number_is_named_and_one_seed_is_no_test() {
    let all = [
        rows("learned", &[Some(8.0), None, Some(9.0)]),
        rows("oracle", &some(&[10.0, 12.0, 12.5])),
    ]
    .concat();
    let c = against(&all, "oracle");
    assert_eq!(c.test.unwrap().n, 2);
    assert!(
        c.text
            .contains("Left out, without a number: seed 1 (learned, fine-tuned has no number)"),
        "{}",
        c.text
    );
    let few = [
        rows("learned", &some(&[8.0, 9.0])),
        rows("oracle", &some(&[10.0])),
    ]
    .concat();
    let c = against(&few, "oracle");
    assert_eq!(c.verdict, Verdict::Unknown);
    assert!(c.text.contains("1 seed in common, no test"), "{}", c.text);
    let [.., difference, interval, p, verdict] = c.cells();
    assert_eq!([difference, interval, p], ["–"; 3]);
    assert_eq!(verdict, "No answer: 1 seed in common, no test");
    let one = [
        rows("learned", &some(&[8.0])),
        rows("oracle", &some(&[10.0])),
    ]
    .concat();
    assert!(comparisons(&one).is_empty());
}

#[test]
fn only_what_was_recovered_alike_is_a_rival() {
    let mut other = rows("oracle", &some(&[10.0, 12.0, 13.0]));
    for row in &mut other {
        row.budget_steps = Some(500);
    }
    let dense = rows("dense", &some(&[1.0, 2.0, 4.0]));
    let all = [rows("learned", &some(&[8.0, 9.0, 9.5])), other, dense].concat();
    assert!(comparisons(&all).is_empty());
}
