//! The layer map, the settings and what they refuse.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use tinyfusion_core::{BlockLayout, Group, Selection};
use tinyfusion_distill::{
    BetaSchedule, DistillConfig, FeatureLoss, KnowledgeConfig, LayerMap, Recipe,
};
use tinyfusion_train::{FitConfig, LrScaling};

/// A selection that keeps the first n of every group.
fn selection(groups: &[(usize, usize)]) -> Selection {
    let mut kept = Vec::new();
    let mut start = 0;
    for (n, m) in groups {
        kept.extend(start..start + n);
        start += m;
    }
    let groups = groups.iter().map(|&(n, m)| Group { n, m }).collect();
    Selection {
        groups,
        ..Selection::from_indices(&BlockLayout::single(start), kept).unwrap()
    }
    .validated()
    .unwrap()
}

fn map(groups: &[(usize, usize)]) -> LayerMap {
    LayerMap::group_ends(&selection(groups)).unwrap()
}

#[test]
fn group_ends_are_the_tables_of_the_reference() {
    // D14 of DiT-XL and D7 of D14: 1:2 throughout.
    for student in [14, 7] {
        let want: Vec<_> = (0..student).map(|i| (i, 2 * i + 1)).collect();
        assert_eq!(map(&vec![(1, 2); student]).pairs(), want);
    }
    // D19 of DiT-XL: 3:4, with 2:4 in the third and the fifth group.
    let d19 = map(&[(3, 4), (3, 4), (2, 4), (3, 4), (2, 4), (3, 4), (3, 4)]);
    assert_eq!(d19.student_blocks(), [2, 5, 7, 10, 12, 15, 18]);
    assert_eq!(d19.teacher_blocks(), [3, 7, 11, 15, 19, 23, 27]);
}

#[test]
fn every_pattern_has_a_map_that_ends_with_both_networks() {
    for groups in [
        vec![(2, 4); 7],
        vec![(7, 14); 2],
        vec![(14, 28)],
        vec![(0, 2), (2, 2), (1, 4)],
        vec![(4, 4), (1, 3)],
    ] {
        let map = map(&groups);
        let (student, teacher) = groups
            .iter()
            .fold((0, 0), |sum, g| (sum.0 + g.0, sum.1 + g.1));
        assert_eq!(
            map.pairs().last(),
            Some(&(student - 1, teacher - 1)),
            "{groups:?}"
        );
        assert_eq!(map.pairs().len(), groups.iter().filter(|g| g.0 > 0).count());
        // The student's block at a group end is the last one kept up to the teacher's group end.
        let kept = selection(&groups).kept;
        for &(student, teacher) in map.pairs() {
            assert_eq!(kept.iter().filter(|k| **k <= teacher).count(), student + 1);
        }
        map.check(&BlockLayout::single(student), &BlockLayout::single(teacher))
            .unwrap();
    }
}

#[test]
fn every_block_is_compared_before_what_its_successor_was_trained_on() {
    let of = |stages: &[usize], kept: &[usize]| {
        let layout = BlockLayout::stages(stages.to_vec());
        let selection = Selection::from_indices(&layout, kept.to_vec()).unwrap();
        LayerMap::every_block(&selection, &layout)
            .unwrap()
            .pairs()
            .to_vec()
    };
    assert_eq!(
        of(&[8], &[1, 2, 5, 6]),
        [(0, 1), (1, 4), (2, 5), (3, 7)],
        "blocks 3 and 4 are gone behind 2, and 7 behind 6"
    );
    // The last of a stage has done what the whole stage does.
    assert_eq!(of(&[4, 4], &[0, 2, 5]), [(0, 1), (1, 3), (2, 7)]);
    assert_eq!(of(&[2], &[0, 1]), [(0, 0), (1, 1)], "nothing was cut");
    // With one kept in every pair it depends on which; group ends do not.
    assert_eq!(of(&[4], &[0, 3]), [(0, 2), (1, 3)]);
}

#[test]
fn a_teacher_that_the_student_was_not_cut_from_is_aligned_by_groups() {
    let quarter = LayerMap::groups(&[Group { n: 1, m: 2 }; 4]).unwrap();
    assert_eq!(quarter.pairs(), [(0, 1), (1, 3), (2, 5), (3, 7)]);
    quarter
        .check(&BlockLayout::single(4), &BlockLayout::single(8))
        .unwrap();
    assert!(LayerMap::groups(&[]).is_err());
}

#[test]
fn a_map_for_other_networks_is_refused() {
    let map = map(&[(1, 2); 4]);
    let depth = BlockLayout::single;
    let of_student = map.check(&depth(5), &depth(8)).unwrap_err().to_string();
    assert!(
        of_student.contains("student has 5 instead of 4") && of_student.contains("selection"),
        "{of_student}"
    );
    let of_teacher = map.check(&depth(4), &depth(16)).unwrap_err().to_string();
    assert!(
        of_teacher.contains("teacher has 16 instead of 8"),
        "{of_teacher}"
    );
}

#[test]
fn malformed_maps_are_refused() {
    for (pairs, complaint) in [
        (vec![], "no blocks"),
        (vec![(0, 1), (2, 3)], "student block 2"),
        (vec![(0, 4)], "teacher block 4"),
        (vec![(1, 1), (0, 3)], "ascend"),
        (vec![(0, 1), (1, 1)], "ascend"),
    ] {
        let error = LayerMap::new(2, 4, pairs).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
    }
}

#[test]
fn beta_falls_to_zero_by_the_step() {
    let k = KnowledgeConfig {
        beta: 0.5,
        ..KnowledgeConfig::default()
    };
    assert_eq!(
        (
            k.beta_at(0, 5),
            k.beta_at(1, 5),
            k.beta_at(2, 5),
            k.beta_at(4, 5)
        ),
        (0.5, 0.375, 0.25, 0.0)
    );
    assert_eq!(k.beta_at(0, 1), 0.5, "a run of one step has the first β");
}

#[test]
fn beta_falls_by_the_epoch_as_the_reference_does() {
    let schedule = BetaSchedule::PerEpoch {
        steps_per_epoch: 10,
    };
    // Five epochs, the last one cut short: factors 1, 3/4, 1/2, 1/4, 0.
    let factors: Vec<f64> = [0, 9, 10, 25, 39, 40, 44]
        .map(|s| schedule.factor(s, 45))
        .into();
    assert_eq!(factors, [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]);
    let k = KnowledgeConfig {
        beta_schedule: schedule,
        ..KnowledgeConfig::default()
    };
    k.validate(11).unwrap();
    let error = k.validate(10).unwrap_err().to_string();
    assert!(
        error.contains("not longer than one epoch") && error.contains("per-step"),
        "{error}"
    );
}

#[test]
fn settings_survive_a_file() {
    let knowledge = KnowledgeConfig {
        features: FeatureLoss::Joint,
        beta_schedule: BetaSchedule::PerEpoch { steps_per_epoch: 7 },
        ..KnowledgeConfig::default()
    };
    let robust = Recipe::robust().config(600, 64, 1e-2);
    let text = toml::to_string(&robust).unwrap();
    assert!(text.contains("ema-rampup = 0.05"), "{text}");
    assert_eq!(toml::from_str::<DistillConfig>(&text).unwrap(), robust);
    for knowledge in [None, Some(KnowledgeConfig::default()), Some(knowledge)] {
        let config = DistillConfig {
            seed: 3,
            knowledge,
            ..DistillConfig::default()
        };
        let text = toml::to_string(&config).unwrap();
        assert_eq!(
            toml::from_str::<DistillConfig>(&text).unwrap(),
            config,
            "{text}"
        );
    }
}

#[test]
fn settings_are_read_in_kebab_case_and_strictly() {
    let text = "
        seed = 5
        lr = { peak = 1e-3, last = 1e-4, warmup = 10 }
        [fit]
        steps = 50
        [knowledge]
        alpha-kd = 0.5
        features = 'all'
        beta-schedule = { per-epoch = { steps-per-epoch = 20 } }
    ";
    let config: DistillConfig = toml::from_str(text).unwrap();
    let k = config.knowledge.clone().unwrap();
    assert_eq!(
        (config.fit.steps, k.alpha_kd, k.features),
        (50, 0.5, FeatureLoss::All)
    );
    assert_eq!(
        k.beta_schedule,
        BetaSchedule::PerEpoch {
            steps_per_epoch: 20
        }
    );
    assert_eq!(
        (k.sigma, k.beta),
        (2.0, 1e-2),
        "what is not said has the reference's value"
    );
    config.validate().unwrap();
    for wrong in [
        "sed = 1",
        "[knowledge]\nalpha = 1.0",
        "[knowledge]\nfeatures = 'some'",
        "[knowledge]\nbeta-schedule = 'none'",
    ] {
        assert!(toml::from_str::<DistillConfig>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    let base = KnowledgeConfig::default;
    for (knowledge, name) in [
        (
            KnowledgeConfig {
                alpha_kd: 1.1,
                ..base()
            },
            "alpha-kd",
        ),
        (
            KnowledgeConfig {
                sigma: 0.0,
                ..base()
            },
            "sigma",
        ),
        (
            KnowledgeConfig {
                sigma: f64::INFINITY,
                ..base()
            },
            "sigma",
        ),
        (
            KnowledgeConfig {
                beta: -1.0,
                ..base()
            },
            "beta",
        ),
        (
            KnowledgeConfig {
                beta: f64::NAN,
                ..base()
            },
            "beta",
        ),
        (
            KnowledgeConfig {
                beta_schedule: BetaSchedule::PerEpoch { steps_per_epoch: 0 },
                ..base()
            },
            "steps-per-epoch",
        ),
    ] {
        let error = DistillConfig {
            knowledge: Some(knowledge),
            ..DistillConfig::default()
        }
        .validate()
        .unwrap_err()
        .to_string();
        assert!(error.contains(name), "{error}");
    }
    let mut config = DistillConfig::default();
    config.lr.peak = f64::NAN;
    assert!(
        config
            .validate()
            .unwrap_err()
            .to_string()
            .contains("lr.peak")
    );
}

#[test]
fn feature_losses_have_names() {
    for (name, which) in [
        ("none", FeatureLoss::None),
        ("all", FeatureLoss::All),
        ("masked", FeatureLoss::Masked),
        ("joint", FeatureLoss::Joint),
    ] {
        assert_eq!(name.parse::<FeatureLoss>().unwrap(), which);
        assert_eq!(serde_json::to_value(which).unwrap(), name);
    }
    assert!(
        "soft"
            .parse::<FeatureLoss>()
            .unwrap_err()
            .to_string()
            .contains("masked")
    );
}

#[test]
fn the_robust_recipe_is_the_same_at_every_batch_size() {
    let samples = 1 << 16;
    let at = |batch: usize| Recipe::robust().config(samples / batch as u64, batch, 1e-2);
    let one = at(1);
    for batch in [4, 16, 64, 256] {
        let config = at(batch);
        config.validate().unwrap();
        assert_eq!(config.lr, one.lr, "batch {batch}");
        let (few, many) = (&config.fit, &one.fit);
        // What an average keeps over 4096 samples, at the end of a long run and on the way up.
        let kept = |fit: &FitConfig, from: u64| -> f64 {
            let steps = |n| n / fit.batch_size as u64;
            (steps(from)..steps(from + 4096))
                .map(|u| fit.ema_at(u))
                .product()
        };
        let (long, few_long) = (kept(many, 1 << 26), kept(few, 1 << 26));
        assert!((long - few_long).abs() < 1e-9, "batch {batch}");
        assert!((long - 0.5f64.powf(4096.0 / 1.8e6)).abs() < 1e-9, "{long}");
        let (early, few_early) = (kept(many, 1 << 15), kept(few, 1 << 15));
        assert!(early < 0.5, "the ramp-up rules here: {early}");
        assert!(
            (early / few_early - 1.0).abs() < 0.01,
            "{early}, batch {batch}: {few_early}"
        );
        assert_eq!(few.start_left(), 0.0);
        // β after half the samples.
        let half = |c: &DistillConfig| {
            let steps = c.fit.steps;
            c.knowledge.as_ref().unwrap().beta_at(steps / 2, steps)
        };
        assert!(
            (half(&config) - half(&one)).abs() < 1e-2 * 1e-2,
            "batch {batch}"
        );
    }
}

#[test]
fn the_reference_recipe_has_the_values_of_the_public_code() {
    let config = Recipe::reference().config(100_000, 256, 1e-2);
    config.validate().unwrap();
    assert_eq!(
        (config.lr.peak, config.lr.last, config.lr.warmup),
        (2e-4, 1e-4, 0)
    );
    assert_eq!((config.fit.ema, config.fit.ema_rampup), (0.9999, None));
    assert_eq!(config.fit.clip, Some(1.0));
    let k = config.knowledge.unwrap();
    assert_eq!(
        (k.alpha_kd, k.sigma, k.features),
        (0.9, 2.0, FeatureLoss::Masked)
    );
    // Twenty epochs of 5,000 steps: the second has 18/19 of β, the last none.
    let found = [0, 4_999, 5_000, 94_999, 95_000, 99_999].map(|s| k.beta_at(s, 100_000) / 1e-2);
    let wanted = [1.0, 1.0, 18.0 / 19.0, 1.0 / 19.0, 0.0, 0.0];
    for (found, wanted) in found.iter().zip(wanted) {
        assert!((found - wanted).abs() < 1e-12, "{found}, wanted {wanted}");
    }
    // Its quirk: the decay is per step, so that a larger batch with fewer steps keeps the start.
    let larger = Recipe::reference().config(6_250, 4096, 1e-2);
    assert_eq!(larger.lr, config.lr);
    assert!(config.fit.start_left() < 1e-4 && larger.fit.start_left() > 0.5);
}

#[test]
fn a_recipe_carries_its_learning_rate_by_its_rule() {
    let recipe = Recipe {
        lr_scaling: LrScaling::Sqrt,
        ..Recipe::robust()
    };
    let lr = recipe.config(100, 256, 1e-2).lr;
    assert!(
        (lr.peak - 1e-3).abs() < 1e-15 && (lr.last - 1e-4).abs() < 1e-15,
        "{lr:?}"
    );
}
