//! Made-up results for tests.

use crate::aggregate::Aggregate;
use crate::results::Machine;
use crate::results::{Cost, Recovery, ResultRow, Results};

fn row(
    id: &str,
    name: &str,
    criterion: &str,
    pattern: Option<&str>,
    recovery: Recovery,
    fid: f64,
) -> ResultRow {
    let dense = criterion == "dense";
    let depth = if dense { 16 } else { 8 };
    let recovered = if recovery == Recovery::MaskedKd {
        15.0
    } else {
        10.0
    };
    ResultRow {
        id: id.into(),
        name: name.into(),
        criterion: criterion.into(),
        pattern: pattern.map(Into::into),
        recovery,
        seed: 0,
        sampling_steps: 25,
        kept_layers: if dense {
            (0..16).collect()
        } else {
            (0..8).map(|i| 2 * i).collect()
        },
        depth,
        parameters: depth as u64 * 100_000,
        calibration_loss: (!dense).then_some(0.1 + fid / 200.0),
        held_out_loss: Some(if dense { 0.02 } else { 0.02 + fid / 2000.0 }),
        held_out_standard_error: Some(0.0004),
        fid: Some(fid),
        sfid: None,
        inception_score: Some(8.5),
        precision: Some(0.8),
        recall: Some(0.5),
        kid: Some(0.01),
        accuracy: Some(0.9),
        images_per_second: Some(if dense { 20.0 } else { 38.0 }),
        failed: None,
        stages: [("sampling", 30.0), ("recovery", recovered), ("loss", 1.0)]
            .into_iter()
            .filter(|(stage, _)| !dense || *stage != "recovery")
            .map(|(stage, seconds)| {
                let peak_rss_bytes = Some(1 << 29);
                (
                    stage.into(),
                    Cost {
                        seconds,
                        peak_rss_bytes,
                    },
                )
            })
            .collect(),
        ..ResultRow::default()
    }
}

/// Two dense rows, random masks with FID 20, 24, 28 and 32, oracle and learned at two patterns.
pub(crate) fn results() -> Results {
    use Recovery::{FineTuning, MaskedKd, None as Uncut};
    let mut rows = vec![
        row("dense", "dense teacher", "dense", None, Uncut, 4.0),
        row(
            "dense-12-steps",
            "dense teacher, 12 sampling steps",
            "dense",
            None,
            Uncut,
            7.0,
        ),
    ];
    rows[1].sampling_steps = 12;
    rows[1].images_per_second = Some(40.0);
    for (i, fid) in [28.0, 20.0, 32.0, 24.0].into_iter().enumerate() {
        let (id, name) = (
            format!("random-1-2-seed-{i}-ft"),
            format!("random 1:2, seed {i}, fine-tuned"),
        );
        rows.push(row(&id, &name, "random", Some("1:2"), FineTuning, fid));
        rows[2 + i].seed = i as u64;
    }
    rows.push(row(
        "oracle-ft",
        "oracle (BK-SDM), fine-tuned",
        "oracle",
        None,
        FineTuning,
        25.0,
    ));
    rows.push(row(
        "oracle-kd",
        "oracle (BK-SDM), masked KD",
        "oracle",
        None,
        MaskedKd,
        19.0,
    ));
    for (pattern, slug, fid) in [("1:2", "1-2", 18.0), ("2:4", "2-4", 17.0)] {
        let of = |what: &str, tail: &str| {
            (
                format!("learned-{slug}-{what}"),
                format!("learned {pattern} (lora), {tail}"),
            )
        };
        let (id, name) = of("ft", "fine-tuned");
        rows.push(row(&id, &name, "learned", Some(pattern), FineTuning, fid));
        let (id, name) = of("kd", "masked KD");
        rows.push(row(
            &id,
            &name,
            "learned",
            Some(pattern),
            MaskedKd,
            fid - 4.0,
        ));
    }
    Results {
        preset: "made-up".into(),
        settings: serde_json::json!({"seed": 0}),
        family: "DiT".into(),
        teacher: "assets/teacher".into(),
        machine: Machine {
            cores: 2,
            os: "TestOS <1>".into(),
            memory_bytes: Some(8 << 30),
            ..Machine::default()
        },
        features: "shapes-classifier (not Inception)".into(),
        reference_count: Some(2000),
        sample_count: Some(600),
        seconds: 840.0,
        wall_seconds: 900.0,
        peak_rss_bytes: Some(1 << 30),
        warnings: vec!["few samples".into()],
        random: Aggregate::of(&rows),
        commands: vec!["target/release/tinyfusion learn assets/teacher 'a b'".into()],
        rows,
        study: None,
    }
}

/// A study of two depths, two budgets and two seeds: random masks, oracle, learned, and at 8 blocks width.
///
/// FID is 60 for 8 blocks and 200 steps, 30 less for 11 blocks, 20 less for 600 steps. To that come the number of a random
/// mask, 0 to 3, for the oracle −2, learned −3, width −1, a tenth for the second seed, and for masked KD −5.
pub(crate) fn study() -> Results {
    use Recovery::{FineTuning, MaskedKd};
    let mut all = results();
    all.rows.truncate(2);
    for (depth, pattern, slug, base) in [(8, "2:4", "2-4", 60.0), (11, "3:4", "3-4", 30.0)] {
        for (steps, base) in [(200, base), (600, base - 20.0)] {
            let mut add = |mask: &str, name: &str, seed: u64, recovery, fid: f64| {
                let criterion = mask.split('-').next().unwrap_or(mask);
                let (tail, words) = match recovery {
                    MaskedKd => ("kd", "masked KD"),
                    _ => ("ft", "fine-tuned"),
                };
                let id = match seed {
                    0 if criterion != "random" => format!("{mask}-{tail}-{steps}-steps"),
                    seed => format!("{mask}-seed-{seed}-{tail}-{steps}-steps"),
                };
                let name = match seed {
                    0 if criterion != "random" => format!("{name}, {words}, {steps} steps"),
                    seed => format!("{name}, seed {seed}, {words}, {steps} steps"),
                };
                let of = ["learned", "random"].contains(&criterion);
                let pattern = of.then_some(pattern);
                let mut row = row(&id, &name, criterion, pattern, recovery, base + fid);
                row.seed = seed;
                row.repetition = Some(if criterion == "random" {
                    seed / 2
                } else {
                    seed
                });
                row.group = Some(format!("{mask}-{tail}-{steps}-steps"));
                row.depth = if criterion == "width" { 16 } else { depth };
                row.parameters = 100_000 * depth as u64 + u64::from(criterion == "width");
                row.kept_layers = (0..depth).map(|i| i + criterion.len() % 3).collect();
                row.kept_layers[0] += usize::from(criterion == "random") * seed as usize;
                row.budget_steps = Some(steps);
                row.samples_seen = Some(16 * steps);
                all.rows.push(row);
            };
            for seed in 0..4 {
                let (id, name) = (format!("random-{slug}"), format!("random {pattern}"));
                add(&id, &name, seed, FineTuning, seed as f64);
            }
            for seed in 0..2 {
                // Seeds do not move every method alike, or there were no noise to test by.
                let bump = 0.1 * seed as f64;
                for (recovery, gain) in [(FineTuning, 0.0), (MaskedKd, -5.0)] {
                    let oracle = format!("oracle-{depth}");
                    add(
                        &oracle,
                        "oracle (BK-SDM)",
                        seed,
                        recovery,
                        gain - 2.0 + bump,
                    );
                    let (id, name) = (format!("learned-{slug}"), format!("learned {pattern}"));
                    add(&id, &name, seed, recovery, gain - 3.0 + 1.2 * bump);
                    if depth == 8 {
                        add(
                            "width-half",
                            "width",
                            seed,
                            recovery,
                            gain - 1.0 + 1.4 * bump,
                        );
                    }
                }
            }
        }
    }
    all.random = Aggregate::of(&all.rows);
    all.study = Some(crate::Study {
        kind: crate::Kind::Table1,
        title: None,
        columns: Vec::new(),
        x_name: None,
        against: Vec::new(),
    });
    all
}
