//! `is_pr.safetensors`: Inception Score, precision/recall, KID and numpy's permutations.

use tinyfusion_fid::{
    KidConfig, NumpyRandomState, PrecisionRecallConfig, Splits, inception_score, kid,
    kid_of_subsets, kid_subsets, precision_recall,
};

use crate::golden_file::{Golden, all_close, close};

fn open() -> Golden {
    Golden::open("is_pr.safetensors")
}

#[test]
fn golden_inception_score_adm() {
    let golden = open();
    for case in golden.cases_with(".adm_split_size") {
        let logits = golden.matrix(&format!("{case}.logits"));
        let size = golden.indices(&format!("{case}.adm_split_size"))[0][0];
        let found = inception_score(logits.view(), &Splits::Adm { size }).unwrap();
        all_close(
            &case,
            &found.scores,
            &golden.f64s(&format!("{case}.adm_scores_f64")),
            1e-12,
        );
        close(
            &case,
            found.mean,
            golden.f64(&format!("{case}.adm_f64")),
            1e-12,
            0.0,
        );
        close(
            &case,
            found.mean,
            golden.f64(&format!("{case}.adm_f32")),
            1e-5,
            0.0,
        );
        let whole = inception_score(logits.view(), &Splits::ADM).unwrap();
        close(
            &case,
            whole.mean,
            golden.f64(&format!("{case}.adm5000_f64")),
            1e-12,
            0.0,
        );
    }
}

#[test]
fn golden_inception_score_fidelity() {
    let golden = open();
    for case in golden.cases_with(".tf_shuffle_scores") {
        let logits = golden.matrix(&format!("{case}.logits"));
        let scores = golden.f64s(&format!("{case}.tf_shuffle_scores"));
        let count = scores.len();
        let shuffled = inception_score(
            logits.view(),
            &Splits::Fidelity {
                count,
                shuffle_seed: Some(2020),
            },
        )
        .unwrap();
        all_close(&case, &shuffled.scores, &scores, 1e-12);
        let in_order = inception_score(
            logits.view(),
            &Splits::Fidelity {
                count,
                shuffle_seed: None,
            },
        )
        .unwrap();
        for (name, found) in [("tf_shuffle", shuffled), ("tf_noshuffle", in_order)] {
            all_close(
                &format!("{case}.{name}"),
                &[found.mean, found.std],
                &golden.f64s(&format!("{case}.{name}_mean_std")),
                1e-12,
            );
        }
    }
}

/// Cases whose probabilities underflow: ADM's f32 gives NaN, the truth is finite.
#[test]
fn golden_inception_score_underflow() {
    let golden = open();
    let mut compared = 0;
    for case in golden.cases_with(".logits") {
        if golden.has(&format!("{case}.f64")) {
            assert!(
                golden.f64(&format!("{case}.adm_f32")).is_nan(),
                "{case} does not underflow"
            );
            let found = inception_score(
                golden.matrix(&format!("{case}.logits")).view(),
                &Splits::ADM,
            )
            .unwrap();
            close(
                &case,
                found.mean,
                golden.f64(&format!("{case}.f64")),
                1e-12,
                0.0,
            );
            compared += 1;
        }
    }
    assert!(compared > 0);
}

#[test]
fn golden_precision_recall() {
    let golden = open();
    for case in golden.cases_with(".precision_recall") {
        let (reference, samples) = (
            golden.matrix(&format!("{case}.ref")),
            golden.matrix(&format!("{case}.sample")),
        );
        // Uneven blocks, a block larger than everything, and the default give the same, to the bit.
        for block in [7, 1 << 20, PrecisionRecallConfig::default().block] {
            for (neighbour, suffix) in [(3, ""), (1, "_k1"), (5, "_k5")] {
                let key = format!("{case}.precision_recall{suffix}");
                if !golden.has(&key) {
                    continue;
                }
                let config = PrecisionRecallConfig { neighbour, block };
                let found = precision_recall(reference.view(), samples.view(), &config).unwrap();
                assert_eq!(
                    vec![found.precision, found.recall],
                    golden.f64s(&key),
                    "{key}, block {block}"
                );
                if neighbour == 3 && golden.has(&format!("{case}.radii_sq_ref")) {
                    let expect = |name: &str| golden.f64s(&format!("{case}.{name}"));
                    all_close(
                        &case,
                        &found.reference_radii_squared,
                        &expect("radii_sq_ref"),
                        1e-12,
                    );
                    all_close(
                        &case,
                        &found.sample_radii_squared,
                        &expect("radii_sq_sample"),
                        1e-12,
                    );
                    assert_eq!(
                        found.reference_covered,
                        golden.flags(&format!("{case}.ref_covered"))
                    );
                    assert_eq!(
                        found.sample_covered,
                        golden.flags(&format!("{case}.sample_covered"))
                    );
                }
                let opinion = format!("{case}.tf_precision_recall");
                if neighbour == 3 && golden.has(&opinion) {
                    // torch-fidelity divides the counts in f32.
                    let found =
                        [found.precision, found.recall].map(|value| f64::from(value as f32));
                    assert_eq!(found.to_vec(), golden.f64s(&opinion), "{opinion}");
                }
            }
        }
    }
}

#[test]
fn golden_kid() {
    let golden = open();
    let (x, y) = (golden.matrix("pr_a.ref"), golden.matrix("pr_a.sample"));
    let (rows, others) = (golden.indices("kid.idx1"), golden.indices("kid.idx2"));
    let config = KidConfig {
        subsets: rows.len(),
        subset_size: rows[0].len(),
        seed: 2020,
    };
    let (drawn, drawn_others): (Vec<_>, Vec<_>) = kid_subsets(x.rows, y.rows, &config)
        .unwrap()
        .into_iter()
        .unzip();
    assert_eq!(
        (&drawn, &drawn_others),
        (&rows, &others),
        "the subsets of RandomState(2020)"
    );

    let found = kid_of_subsets(x.view(), y.view(), &rows, &others).unwrap();
    assert_eq!(found, kid(x.view(), y.view(), &config).unwrap());
    // MMD² is a difference of means of the kernel (x·y/D + 1)³: 1e-12 relative to those.
    let kernel = x
        .view()
        .iter()
        .map(|row| {
            let square: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            (square / x.columns as f64 + 1.0).powi(3)
        })
        .sum::<f64>()
        / x.rows as f64;
    for (s, (&found, expected)) in found
        .subsets
        .iter()
        .zip(golden.f64s("kid.mmd2_f64"))
        .enumerate()
    {
        close(&format!("mmd2[{s}]"), found, expected, 0.0, 1e-12 * kernel);
    }
    let expected = golden.f64s("kid.mean_std_f64");
    close("mean", found.mean, expected[0], 0.0, 1e-12 * kernel);
    let std = found.std.unwrap();
    close("std", std, expected[1], 0.0, 1e-12 * kernel);
    // torch-fidelity's own numbers are f32.
    let opinion = golden.f64s("kid.torch_fidelity_mean_std");
    close(
        "torch-fidelity mean",
        found.mean,
        opinion[0],
        1e-4,
        1e-6 * kernel,
    );
    close("torch-fidelity std", std, opinion[1], 1e-4, 1e-6 * kernel);
}

#[test]
fn golden_numpy_permutations() {
    let golden = open();
    for key in golden
        .cases_with(".tf_perm_2020")
        .iter()
        .map(|case| format!("{case}.tf_perm_2020"))
    {
        let expected = golden.indices(&key).concat();
        assert_eq!(
            NumpyRandomState::new(2020).permutation(expected.len()),
            expected,
            "{key}"
        );
    }
    let ten = golden.indices("perm10_seed2020").concat();
    assert_eq!(NumpyRandomState::new(2020).permutation(ten.len()), ten);
}
