//! What fits together, what is refused before training, and what a run leaves as it was.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use common::{
    BATCH, STUDENT, TEACHER, batch, bits, config, layer_map, objective, run_student,
    student_weights, teacher_weights,
};
use tinyfusion_core::Error;
use tinyfusion_core::toy::ToyImage;
use tinyfusion_distill::{
    BetaSchedule, FeatureLoss, KnowledgeConfig, LayerMap, Run, Student, Teacher, distill,
};
use tinyfusion_train::{Progress, RunDir, Stop};

#[test]
fn fixed_weights_stay_and_are_part_of_the_result() {
    let weights = student_weights();
    let fixed = |name: &str| name == "blocks.0.weight";
    let student = Student {
        weights: weights.clone(),
        build: &|w| ToyImage::new(STUDENT, w),
        is_fixed: &fixed,
    };
    let folder = tempfile::tempdir().unwrap();
    let config = config(5, None);
    let dir = RunDir::open(folder.path(), &config).unwrap();
    let run = Run {
        dir: &dir,
        stop: &Stop::default(),
        progress: &Progress::hidden(),
    };
    let outcome = distill(
        &config,
        student,
        None,
        &objective(0.1),
        |step| batch(step, BATCH),
        run,
    )
    .unwrap();
    let (before, after) = (bits(&weights), bits(&outcome.averages));
    assert_eq!(before.len(), after.len());
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        assert_eq!(before == after, fixed(name), "{name}");
    }
    let student = Student {
        weights,
        build: &|w| ToyImage::new(STUDENT, w),
        is_fixed: &|_| true,
    };
    let error = distill(
        &config,
        student,
        None,
        &objective(0.1),
        |step| batch(step, BATCH),
        run,
    )
    .unwrap_err();
    assert!(error.to_string().contains("no weights to train"), "{error}");
}

/// The error of a run that must not start.
fn refusal(knowledge: Option<KnowledgeConfig>, teacher: Option<&Teacher<'_, ToyImage>>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let error = run_student(
        &config(5, knowledge),
        &student_weights(),
        teacher,
        folder.path(),
        None,
    )
    .unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error:?}");
    error.to_string()
}

#[test]
fn what_does_not_fit_is_refused_before_training() {
    let net = ToyImage::new(TEACHER, &teacher_weights()).unwrap();
    let knowledge = KnowledgeConfig::default;
    let teacher = Teacher {
        net: &net,
        layers: Some(layer_map()),
    };

    assert!(refusal(Some(knowledge()), None).contains("no teacher"));
    assert!(refusal(None, Some(&teacher)).contains("`knowledge`"));

    let unaligned = Teacher {
        net: &net,
        layers: None,
    };
    assert!(refusal(Some(knowledge()), Some(&unaligned)).contains("selection"));

    let other = LayerMap::new(STUDENT, 6, vec![(0, 2), (1, 5)]).unwrap();
    let error = refusal(
        Some(knowledge()),
        Some(&Teacher {
            net: &net,
            layers: Some(other),
        }),
    );
    assert!(error.contains("teacher has 4 instead of 6"), "{error}");

    let mut tracked = teacher_weights();
    tracked.make_trainable(|_| true).unwrap();
    let recording = ToyImage::new(TEACHER, &tracked).unwrap();
    let error = refusal(
        Some(knowledge()),
        Some(&Teacher {
            net: &recording,
            layers: Some(layer_map()),
        }),
    );
    assert!(error.contains("detached"), "{error}");

    let epoch = KnowledgeConfig {
        beta_schedule: BetaSchedule::PerEpoch { steps_per_epoch: 5 },
        ..knowledge()
    };
    assert!(refusal(Some(epoch), Some(&teacher)).contains("epoch"));
}

#[test]
fn outputs_alone_need_no_selection() {
    let net = ToyImage::new(TEACHER, &teacher_weights()).unwrap();
    let teacher = Teacher {
        net: &net,
        layers: None,
    };
    let knowledge = KnowledgeConfig {
        features: FeatureLoss::None,
        ..KnowledgeConfig::default()
    };
    let folder = tempfile::tempdir().unwrap();
    run_student(
        &config(2, Some(knowledge)),
        &student_weights(),
        Some(&teacher),
        folder.path(),
        None,
    )
    .unwrap();
}
