//! The sampler: exact values, exact gradients, the right distribution.

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use tinyfusion_core::{Group, StateDict, StepRng};
use tinyfusion_mask::{INITIAL_LOGIT, MaskSampler, Temperature, logit_name, parse_history};

const CPU: Device = Device::Cpu;

fn sampler(groups: &[(usize, usize)]) -> MaskSampler {
    let groups: Vec<Group> = groups.iter().map(|&(n, m)| Group { n, m }).collect();
    MaskSampler::new(groups, &CPU).expect("groups")
}

fn random_logits(sampler: &MaskSampler, seed: u64, size: f64) -> StateDict {
    let mut rng = StepRng::new(seed, 0, 0);
    sampler
        .param_specs()
        .into_iter()
        .map(|s| {
            (
                s.name,
                (rng.normal(s.shape, &CPU).expect("normal") * size).expect("scaled"),
            )
        })
        .collect()
}

fn rows(t: &Tensor) -> Vec<Vec<f64>> {
    t.to_dtype(DType::F64)
        .and_then(|t| t.to_vec2())
        .expect("rows")
}

#[test]
fn logits_begin_equal_and_every_mask_is_likely() {
    let sampler = sampler(&[(2, 4), (1, 3)]);
    let logits = sampler.initial_logits().unwrap();
    logits.check(&sampler.param_specs()).unwrap();
    assert!(logits.iter().all(|(_, t)| {
        t.flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .all(|v| *v == INITIAL_LOGIT)
    }));
    let record = sampler
        .record(
            0,
            &logits,
            Temperature {
                tau: 4.0,
                scale: 100.0,
            },
        )
        .unwrap();
    for (found, expected) in
        record
            .keep_probability
            .iter()
            .zip([0.5, 0.5, 0.5, 0.5, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0])
    {
        assert!((found - expected).abs() < 1e-12);
    }
}

#[test]
fn noise_is_a_function_of_seed_and_step_and_differs_everywhere() {
    let sampler = sampler(&[(1, 2), (1, 2)]);
    let flat = |seed, step| -> Vec<f32> {
        let noise = sampler.draw_noise(seed, step, 5).unwrap();
        assert!(noise.iter().all(|n| n.dims() == [5, 2]));
        noise
            .iter()
            .flat_map(|n| n.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect()
    };
    assert_eq!(flat(1, 2), flat(1, 2));
    let mut all = [flat(1, 2), flat(1, 3), flat(2, 2)].concat();
    let count = all.len();
    all.sort_by(f32::total_cmp);
    all.dedup();
    assert_eq!(
        all.len(),
        count,
        "samples, groups, steps and seeds have their own noise"
    );
}

/// The Gumbel-max theorem: candidate k is drawn with probability softmax(scale·logits)_k, whatever τ is.
#[test]
fn masks_follow_the_categorical_distribution() {
    let sampler = sampler(&[(2, 4)]);
    let logits = random_logits(&sampler, 3, 0.01);
    let batch = 20_000;
    for tau in [0.1, 4.0] {
        let noise = sampler.draw_noise(5, 0, batch).unwrap();
        let sampled = sampler
            .sample(&logits, &noise, Temperature { tau, scale: 100.0 })
            .unwrap();
        let probabilities = &sampler.decide(&logits, 100.0).unwrap().decisions[0].probabilities;
        let mut counts = vec![0u32; probabilities.len()];
        sampled.index[0]
            .iter()
            .for_each(|&k| counts[k as usize] += 1);
        for (count, p) in counts.iter().zip(probabilities) {
            let deviation = (p * (1.0 - p) / batch as f64).sqrt();
            let found = f64::from(*count) / batch as f64;
            assert!(
                (found - p).abs() < 4.5 * deviation,
                "{found} against {p} ± {deviation}"
            );
        }
        // Its marginals are the keep probabilities.
        let kept = sampler
            .record(0, &logits, Temperature { tau, scale: 100.0 })
            .unwrap()
            .keep_probability;
        let mean = sampled.mask.mean(0).unwrap().to_vec1::<f32>().unwrap();
        for (found, p) in mean.iter().zip(kept) {
            assert!((f64::from(*found) - p).abs() < 0.02, "{found} against {p}");
        }
    }
}

/// d⟨C, mask⟩/d logit_k = scale/τ · Σ_b s_bk (v_bk − Σ_j s_bj v_bj) with v = C·optionsᵀ.
#[test]
fn gradients_are_those_of_the_softmax() {
    let groups = [(2usize, 4usize), (1, 2), (3, 3)];
    let sampler = sampler(&groups);
    let batch = 6;
    for (tau, scale) in [(4.0, 100.0), (0.5, 10.0), (1.0, 1.0)] {
        let mut logits = random_logits(&sampler, 9, 0.02);
        let variables: Vec<(String, Var)> = logits.make_trainable(|_| true).unwrap();
        let noise = sampler.draw_noise(1, 0, batch).unwrap();
        let sampled = sampler
            .sample(&logits, &noise, Temperature { tau, scale })
            .unwrap();
        let c = StepRng::new(4, 0, 0)
            .normal((batch, sampler.depth()), &CPU)
            .unwrap();
        let grads = (&sampled.mask * &c)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let mut start = 0;
        for (g, &(_, m)) in groups.iter().enumerate() {
            // The soft sample from scratch, in f64.
            let z = rows(&noise[g]);
            let logit = rows(logits.require(&logit_name(g)).unwrap()).remove(0);
            let options = rows(&sampler.options()[g]);
            let c = rows(&c.narrow(1, start, m).unwrap());
            let mut expected = vec![0.0; logit.len()];
            for b in 0..batch {
                let exps: Vec<f64> = z[b]
                    .iter()
                    .zip(&logit)
                    .map(|(n, l)| ((l * scale + n) / tau).exp())
                    .collect();
                let sum: f64 = exps.iter().sum();
                let soft: Vec<f64> = exps.iter().map(|e| e / sum).collect();
                for (found, s) in rows(&sampled.soft[g])[b].iter().zip(&soft) {
                    assert!((found - s).abs() < 1e-5, "{found} against {s}");
                }
                let v: Vec<f64> = options
                    .iter()
                    .map(|o| o.iter().zip(&c[b]).map(|(o, c)| o * c).sum())
                    .collect();
                let mean: f64 = soft.iter().zip(&v).map(|(s, v)| s * v).sum();
                for k in 0..logit.len() {
                    expected[k] += scale / tau * soft[k] * (v[k] - mean);
                }
            }
            let (name, var) = &variables[g];
            assert_eq!(*name, logit_name(g));
            let found = rows(grads.get(var).expect("a gradient")).remove(0);
            let size = expected.iter().fold(scale / tau, |m, v| m.max(v.abs()));
            for (a, b) in found.iter().zip(&expected) {
                assert!((a - b).abs() <= 2e-5 * size, "group {g}: {a} against {b}");
            }
            if logit.len() > 1 {
                assert!(
                    expected.iter().any(|v| v.abs() > 1e-3 * size),
                    "the test should see a gradient"
                );
            }
            start += m;
        }
    }
}

#[test]
fn decisions_and_history_say_the_same() {
    let sampler = sampler(&[(1, 2), (2, 4)]);
    let logits: StateDict = [
        (logit_name(0), Tensor::new(&[[0.0f32, 0.01]], &CPU).unwrap()),
        (
            logit_name(1),
            Tensor::new(&[[0.0f32, 0.03, 0.03, 0.0, 0.0, 0.0]], &CPU).unwrap(),
        ),
    ]
    .into_iter()
    .collect();
    let selection = sampler.decide(&logits, 100.0).unwrap();
    assert_eq!(selection.kept, [1, 2, 4], "the first of two equals");
    let p = 1f64.exp() / (1.0 + 1f64.exp());
    assert!((selection.decisions[0].confidence - p).abs() < 1e-6);

    let temperature = Temperature {
        tau: 2.0,
        scale: 100.0,
    };
    let records: Vec<_> = (0..3)
        .map(|s| sampler.record(s * 10, &logits, temperature).unwrap())
        .collect();
    assert_eq!(records[1].kept, selection.kept);
    assert_eq!(
        records[1].confidence,
        [
            selection.decisions[0].confidence,
            selection.decisions[1].confidence
        ]
    );
    assert!((records[0].keep_probability[1] - p).abs() < 1e-6);
    // Option 1 = {0, 2}, option 2 = {0, 3}: block 0 of the group is the surest.
    assert!(records[0].keep_probability[2] > 0.9 && records[0].keep_probability[3] < 0.1);
    assert!((records[0].keep_probability[2..].iter().sum::<f64>() - 2.0).abs() < 1e-9);

    let text: String = records.iter().map(|r| r.to_line().unwrap()).collect();
    assert_eq!(parse_history(&text).unwrap(), records);
    assert_eq!(
        parse_history(&text[..text.len() - 5]).unwrap(),
        records[..2],
        "half a line is dropped"
    );
    assert_eq!(parse_history("").unwrap(), []);
    let error = parse_history(&text.replacen("\"tau\"", "\"tua\"", 1))
        .unwrap_err()
        .to_string();
    assert!(error.contains("line 1"), "{error}");
}

#[test]
fn what_does_not_fit_is_explained() {
    let sampler = sampler(&[(1, 2), (1, 2)]);
    let logits = sampler.initial_logits().unwrap();
    let noise = sampler.draw_noise(0, 0, 2).unwrap();
    let at = Temperature {
        tau: 1.0,
        scale: 1.0,
    };
    let text = |r: Result<_, tinyfusion_core::Error>| {
        r.map(|_: tinyfusion_mask::Sampled| ())
            .unwrap_err()
            .to_string()
    };
    assert!(text(sampler.sample(&logits, &noise[..1], at)).contains("1 groups, expected 2"));
    for tau in [0.0, -1.0, f64::NAN] {
        assert!(
            text(sampler.sample(&logits, &noise, Temperature { tau, scale: 1.0 }))
                .contains("positive")
        );
    }
    assert!(text(sampler.sample(&StateDict::new(), &noise, at)).contains("mask.logits.0"));
    let mut other = logits.clone();
    other.insert(
        logit_name(1),
        Tensor::zeros((1, 6), DType::F32, &CPU).unwrap(),
    );
    assert!(text(sampler.sample(&other, &noise, at)).contains("expected [1, 2]"));
    other.insert(
        logit_name(1),
        Tensor::new(&[[f32::NAN, 0.0]], &CPU).unwrap(),
    );
    assert!(text(sampler.sample(&other, &noise, at)).contains("no longer finite"));
    assert!(
        sampler
            .decide(&other, 1.0)
            .unwrap_err()
            .to_string()
            .contains("no longer finite")
    );
    let drawn = |index| text(sampler.sample_drawn(&logits, &noise, at, index));
    assert!(drawn(vec![vec![0; 2]]).contains("1 groups, expected 2"));
    for wrong in [vec![0], vec![0, 99]] {
        assert!(drawn(vec![wrong, vec![0; 2]]).contains("group 0: expected 2"));
    }
    assert!(MaskSampler::new([], &CPU).is_err());
    assert!(MaskSampler::new([Group { n: 0, m: 2 }], &CPU).is_err());
    assert!(MaskSampler::new([Group { n: 14, m: 28 }], &CPU).is_err());
}

proptest! {
    /// Whatever the logits and temperatures: masks are exactly 0 or 1, keep exactly n of m in every
    /// group, and are the candidate named by the index.
    #[test]
    fn every_mask_keeps_exactly_n_of_m(
        groups in prop::collection::vec((1usize..6).prop_flat_map(|m| (1..=m, Just(m))), 1..5),
        seed: u64,
        tau in 0.01f64..8.0,
        scale in 0.0f64..2000.0,
        size in 0.0f64..5.0,
    ) {
        let sampler = sampler(&groups);
        let logits = random_logits(&sampler, seed, size);
        let noise = sampler.draw_noise(seed, 1, 4).unwrap();
        let sampled = sampler.sample(&logits, &noise, Temperature { tau, scale }).unwrap();
        for (b, row) in rows(&sampled.mask).iter().enumerate() {
            prop_assert!(row.iter().all(|v| *v == 0.0 || *v == 1.0), "{:?}", row);
            let mut start = 0;
            for (g, &(n, m)) in groups.iter().enumerate() {
                let part = &row[start..start + m];
                prop_assert_eq!(part.iter().sum::<f64>(), n as f64);
                let option = &rows(&sampler.options()[g])[sampled.index[g][b] as usize];
                prop_assert_eq!(part, option.as_slice());
                for (i, v) in part.iter().enumerate() {
                    prop_assert_eq!(sampled.kept[start + i][b], *v == 1.0);
                }
                start += m;
            }
        }
        // Drawn for the whole batch, and the masks of its last rows made of that.
        let drawn = sampler.draw(&logits, &noise, Temperature { tau, scale }).unwrap();
        prop_assert_eq!(&drawn, &sampled.index);
        let noise: Vec<Tensor> = noise.iter().map(|n| n.narrow(0, 1, 3).unwrap()).collect();
        let drawn = drawn.iter().map(|index| index[1..].to_vec()).collect();
        let part = sampler.sample_drawn(&logits, &noise, Temperature { tau, scale }, drawn).unwrap();
        prop_assert_eq!(rows(&part.mask), rows(&sampled.mask)[1..].to_vec());
        for (part, all) in part.soft.iter().zip(&sampled.soft) {
            prop_assert_eq!(rows(part), rows(all)[1..].to_vec());
        }
        let selection = sampler.decide(&logits, scale).unwrap();
        prop_assert_eq!(selection.kept.len(), groups.iter().map(|g| g.0).sum::<usize>());
        for decision in &selection.decisions {
            prop_assert!((decision.probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(decision.probabilities.iter().all(|p| *p <= decision.confidence));
        }
    }
}
