//! Whole runs on toy stacks: they recover, resume bit for bit and leave the caller's weights alone.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use common::{
    TEACHER, bits, config, held_out, judge, layer_map, log, mean, objective, run_student,
    student_weights, teacher_weights,
};
use tinyfusion_core::Error;
use tinyfusion_core::toy::ToyImage;
use tinyfusion_distill::{FeatureLoss, KnowledgeConfig, LayerMap, Teacher, losses};
use tinyfusion_testing::flat;

#[test]
fn fine_tuning_lowers_the_loss_and_leaves_the_weights_alone() {
    let weights = student_weights();
    let before = bits(&weights);
    let folder = tempfile::tempdir().unwrap();
    let outcome = run_student(&config(60, None), &weights, None, folder.path(), None).unwrap();
    assert_eq!(bits(&weights), before, "the caller's weights were changed");
    assert!(
        bits(&outcome.averages)
            .iter()
            .zip(&before)
            .all(|(a, b)| a.0 == b.0 && a.1 != b.1)
    );
    let knowledge = KnowledgeConfig::default();
    let (start, end) = (
        mean(&judge(&weights, &knowledge).diff),
        mean(&judge(&outcome.averages, &knowledge).diff),
    );
    assert!(end < 0.7 * start, "held-out loss {start} → {end}");
    let log = log(folder.path());
    assert_eq!(log.len(), 60);
    assert!(
        log.iter()
            .all(|l| l["diff"] == l["loss"] && l.get("kd").is_none() && l.get("rep").is_none())
    );
}

#[test]
fn a_deeper_teacher_teaches_outputs_and_features() {
    let net = ToyImage::new(TEACHER, &teacher_weights()).unwrap();
    let teacher = Teacher {
        net: &net,
        layers: Some(layer_map()),
    };
    for features in [
        FeatureLoss::None,
        FeatureLoss::All,
        FeatureLoss::Masked,
        FeatureLoss::Joint,
    ] {
        let knowledge = KnowledgeConfig {
            features,
            beta: 0.5,
            ..KnowledgeConfig::default()
        };
        let weights = student_weights();
        let folder = tempfile::tempdir().unwrap();
        let config = config(60, Some(knowledge.clone()));
        let outcome = run_student(&config, &weights, Some(&teacher), folder.path(), None).unwrap();
        let (start, end) = (
            judge(&weights, &knowledge),
            judge(&outcome.averages, &knowledge),
        );
        let (kd_start, kd_end) = (mean(&start.kd.unwrap()), mean(&end.kd.unwrap()));
        assert!(
            kd_end < 0.7 * kd_start,
            "{features:?}: L_KD {kd_start} → {kd_end}"
        );
        if let (Some(start), Some(end)) = (start.rep, end.rep) {
            assert!(
                mean(&end) < mean(&start),
                "{features:?}: L_rep {} → {}",
                mean(&start),
                mean(&end)
            );
        }

        // The logged parts make the logged loss.
        for (step, line) in log(folder.path()).iter().enumerate() {
            let part = |name: &str| line[name].as_f64();
            assert_eq!(part("rep").is_some(), features != FeatureLoss::None);
            let beta = knowledge.beta_at(step as u64, 60);
            assert!((part("beta").unwrap_or(beta) - beta).abs() < 1e-12);
            let want = 0.9 * part("kd").unwrap()
                + 0.1 * part("diff").unwrap()
                + beta * part("rep").unwrap_or(0.0);
            let found = part("loss").unwrap();
            assert!(
                (found - want).abs() < 1e-5 * want,
                "step {step}: {found} and {want}"
            );
        }
    }
}

#[test]
fn a_resumed_run_is_the_unbroken_run_bit_for_bit() {
    let net = ToyImage::new(TEACHER, &teacher_weights()).unwrap();
    let teacher = Teacher {
        net: &net,
        layers: Some(layer_map()),
    };
    let weights = student_weights();
    for knowledge in [
        None,
        Some(KnowledgeConfig {
            beta: 0.5,
            ..KnowledgeConfig::default()
        }),
    ] {
        let config = config(11, knowledge);
        let teacher = config.knowledge.as_ref().map(|_| &teacher);
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let unbroken = run_student(&config, &weights, teacher, whole.path(), None).unwrap();
        for stop_at in [2, 6] {
            match run_student(&config, &weights, teacher, parts.path(), Some(stop_at)) {
                Err(Error::Interrupted { step }) => assert_eq!(step, stop_at),
                other => panic!("not interrupted: {other:?}"),
            }
        }
        let resumed = run_student(&config, &weights, teacher, parts.path(), None).unwrap();
        assert_eq!(bits(&resumed.averages), bits(&unbroken.averages));
        assert_eq!(log(parts.path()), log(whole.path()));
        // Finished: the same command returns at once, with the same result.
        let again = run_student(&config, &weights, teacher, parts.path(), None).unwrap();
        assert_eq!(bits(&again.averages), bits(&unbroken.averages));
    }
}

#[test]
fn micro_batches_do_not_change_the_loss() {
    let net = ToyImage::new(TEACHER, &teacher_weights()).unwrap();
    let teacher = Teacher {
        net: &net,
        layers: Some(layer_map()),
    };
    let mut found = Vec::new();
    for micro_batches in [1, 2, 3] {
        let mut config = config(
            3,
            Some(KnowledgeConfig {
                beta: 0.5,
                ..KnowledgeConfig::default()
            }),
        );
        config.fit.micro_batches = micro_batches;
        let folder = tempfile::tempdir().unwrap();
        run_student(
            &config,
            &student_weights(),
            Some(&teacher),
            folder.path(),
            None,
        )
        .unwrap();
        found.push(
            log(folder.path())
                .iter()
                .map(|l| l["loss"].as_f64().unwrap())
                .collect::<Vec<_>>(),
        );
    }
    for other in &found[1..] {
        assert!(
            found[0]
                .iter()
                .zip(other)
                .all(|(a, b)| (a - b).abs() < 1e-5 * a.abs()),
            "{found:?}"
        );
    }
}

#[test]
fn a_student_that_is_its_teacher_has_nothing_to_learn() {
    let weights = teacher_weights();
    let net = ToyImage::new(TEACHER, &weights).unwrap();
    let pairs = (0..TEACHER).map(|i| (i, i)).collect();
    let teacher = Teacher {
        net: &net,
        layers: Some(LayerMap::new(TEACHER, TEACHER, pairs).unwrap()),
    };
    let mut own = weights.clone();
    let vars = own.make_trainable(|_| true).unwrap();
    let student = ToyImage::new(TEACHER, &own).unwrap();
    for features in [
        FeatureLoss::None,
        FeatureLoss::All,
        FeatureLoss::Masked,
        FeatureLoss::Joint,
    ] {
        let knowledge = KnowledgeConfig {
            alpha_kd: 1.0,
            beta: 1.0,
            features,
            ..KnowledgeConfig::default()
        };
        let parts = losses(
            &objective(0.0),
            &student,
            Some((&teacher, &knowledge)),
            &held_out(),
        )
        .unwrap();
        let total = parts.total(1.0, 1.0).unwrap();
        assert!(flat(&total).iter().all(|l| *l == 0.0), "{features:?}");
        assert!(mean(&parts.diff) > 0.0);
        let grads = total.sum_all().unwrap().backward().unwrap();
        for (name, var) in &vars {
            assert!(
                flat(grads.get(var.as_tensor()).unwrap())
                    .iter()
                    .all(|g| *g == 0.0),
                "{features:?} {name}"
            );
        }
    }
}
