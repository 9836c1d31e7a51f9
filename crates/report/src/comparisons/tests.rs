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

fn compared(rows: &[ResultRow]) -> Vec<Comparison> {
    let mut all = crate::sample::results();
    all.rows = rows.to_vec();
    comparisons(&all)
}

fn against(rows: &[ResultRow], rival: &str) -> Comparison {
    compared(rows)
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
    assert!(loses.text.ends_with(": it loses."), "{}", loses.text);
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
    let every = compared(&all);
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
    assert!(compared(&one).is_empty());
}

#[test]
fn only_what_was_recovered_alike_is_a_rival() {
    let mut other = rows("oracle", &some(&[10.0, 12.0, 13.0]));
    for row in &mut other {
        row.budget_steps = Some(500);
    }
    let dense = rows("dense", &some(&[1.0, 2.0, 4.0]));
    let all = [rows("learned", &some(&[8.0, 9.0, 9.5])), other, dense].concat();
    assert!(compared(&all).is_empty());
}

#[test]
fn width_is_a_rival_where_its_parameters_agree() {
    let mut width = rows("width", &some(&[10.0, 12.0, 13.0]));
    let mut learned = rows("learned", &some(&[8.0, 9.0, 9.5]));
    learned.iter_mut().for_each(|r| r.parameters = 637_488);
    for (parameters, expected) in [(637_984, 2), (700_000, 0)] {
        for row in &mut width {
            (row.depth, row.parameters) = (16, parameters);
        }
        let all = compared(&[learned.clone(), width.clone()].concat());
        assert_eq!(all.len(), expected, "{parameters}");
        assert!(all.iter().all(|c| c.rival == "width, fine-tuned"));
    }
}

#[test]
fn who_loses_seeds_does_not_win() {
    let good = some(&[8.0, 9.0, 10.0, 8.5]);
    let bad = some(&[18.0, 19.1, 20.05, 18.6]);
    let lost = |fids: &[Option<f64>]| [&fids[..3], &[None]].concat();
    for (learned, oracle, verdict) in [
        (good.clone(), bad.clone(), Verdict::Yes),
        (lost(&good), bad.clone(), Verdict::Unclear),
        // It loses all the same.
        (lost(&bad), good.clone(), Verdict::No),
        (bad.clone(), lost(&good), Verdict::Unclear),
        (good.clone(), lost(&bad), Verdict::Yes),
    ] {
        let c = against(
            &[rows("learned", &learned), rows("oracle", &oracle)].concat(),
            "oracle",
        );
        assert_eq!(c.verdict, verdict, "{}", c.text);
        let capped = c.text.contains("no win over the seeds that are left");
        assert_eq!(capped, verdict == Verdict::Unclear, "{}", c.text);
    }
}

#[test]
fn in_a_study_only_rows_of_equal_work_are_compared() {
    let r = crate::sample::study();
    let all = comparisons(&r);
    // 8 blocks, fine-tuned: random, oracle, width; distilled: oracle, width; 11 blocks: 2 and 1. Two budgets, two measures.
    assert_eq!(all.len(), (3 + 2 + 2 + 1) * 2 * 2);
    for c in &all {
        let of = |name: &str| {
            let steps = if name.contains("600") { 600 } else { 200 };
            (name.contains("masked KD"), steps)
        };
        assert_eq!(of(&c.method), of(&c.rival), "{} {}", c.method, c.rival);
        let deep = c.method.contains("3:4");
        assert!(!(deep && c.rival.contains("2:4")), "{}", c.rival);
        assert!(!(deep && c.rival.contains("width")), "{}", c.rival);
    }
}

/// Two recoveries of one mask at two batch sizes over three seeds.
fn batches() -> Results {
    let mut all = crate::sample::results();
    all.rows.clear();
    for (label, fids) in [
        ("reference recipe", [20.0, 21.0, 22.5]),
        ("robust recipe", [10.0, 11.2, 12.4]),
    ] {
        for x in [16.0, 64.0] {
            for mut row in rows("fixed", &some(&fids)) {
                row.group = Some(format!("{label}-{x}"));
                row.name = format!("mask, {label}, {x}");
                row.recovery_label = Some(label.into());
                row.x = Some(x);
                row.fid = row.fid.map(|f| f + x * (row.seed as f64 + 1.0) / 100.0);
                all.rows.push(row);
            }
        }
    }
    all.study = serde_json::from_value(serde_json::json!({
        "kind": "batch-size", "x_name": "batch size",
        "against": [{"column": "recovery", "value": "reference recipe"}],
    }))
    .unwrap();
    all
}

#[test]
fn a_study_is_tested_against_the_baseline_that_it_names() {
    let mut r = batches();
    let all = comparisons(&r);
    let of: Vec<(&str, &str)> = all[..2]
        .iter()
        .map(|c| (c.method.as_str(), c.rival.as_str()))
        .collect();
    // Each batch size against its own.
    assert_eq!(
        of,
        [
            ("mask, robust recipe, 16", "mask, reference recipe, 16"),
            ("mask, robust recipe, 64", "mask, reference recipe, 64")
        ]
    );
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|c| c.verdict == Verdict::Yes));
    // One family over both batch sizes.
    let (raw, held): (Vec<f64>, Vec<f64>) = all[..2]
        .iter()
        .map(|c| (c.test.unwrap().p, c.corrected.unwrap()))
        .unzip();
    assert_eq!(holm(&raw), held);
    assert!(held[0] > raw[0]);
    assert_eq!(
        heading(&r),
        "Tested against the baseline: recovery reference recipe"
    );
    // Another mask is not compared, whatever its recovery.
    for row in r.rows.iter_mut().filter(|r| r.name.contains("robust")) {
        row.kept_layers = vec![1];
    }
    assert!(comparisons(&r).is_empty());
    assert!(
        untested(&r)
            .unwrap()
            .starts_with("No row differs from a baseline")
    );
}

#[test]
fn routes_are_compared_where_they_were_recovered_alike() {
    let mut r = batches();
    for row in &mut r.rows {
        let route = if row.x == Some(16.0) {
            "16→4"
        } else {
            "16→8→4"
        };
        row.labels = [("route".to_string(), route.to_string())].into();
        // The masks of two routes differ, and so may their patterns.
        row.kept_layers = vec![route.len()];
        row.x = None;
    }
    r.study.as_mut().unwrap().against = vec![Against {
        column: "route".into(),
        value: "16→4".into(),
    }];
    let all = comparisons(&r);
    let of: Vec<(&str, &str)> = all[..2]
        .iter()
        .map(|c| (c.method.as_str(), c.rival.as_str()))
        .collect();
    assert_eq!(
        of,
        [
            ("mask, reference recipe, 64", "mask, reference recipe, 16"),
            ("mask, robust recipe, 64", "mask, robust recipe, 16")
        ]
    );
}

#[test]
fn why_nothing_is_tested_depends_on_the_study() {
    let mut r = batches();
    r.rows.retain(|row| row.seed == 0);
    assert!(untested(&r).unwrap().contains("single seed"));
    // No baseline and nothing learned: there is nothing to be compared.
    r.study = None;
    assert_eq!(untested(&r), None);
    r.rows = rows("learned", &some(&[1.0, 2.0]));
    assert!(
        untested(&r)
            .unwrap()
            .contains("No row of another criterion")
    );
    r.rows.truncate(1);
    assert!(untested(&r).unwrap().contains("single seed"));
}
