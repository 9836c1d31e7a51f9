//! Selections, random streams, plans and named tensors.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use tinyfusion_core::{
    BlockLayout, Error, Group, LatentQuery, ParamSpec, Plan, Selection, StateDict, StepRng, run,
    stream, toy::ToyLatent,
};

/// A valid selection: groups of 1 to 5 blocks, some of each kept.
fn selections() -> impl Strategy<Value = Selection> {
    prop::collection::vec(prop::collection::vec(any::<bool>(), 1..6), 1..8).prop_filter_map(
        "keeps nothing",
        |groups| {
            let kept: Vec<usize> = groups
                .iter()
                .flatten()
                .enumerate()
                .filter(|(_, keep)| **keep)
                .map(|(i, _)| i)
                .collect();
            let sizes = groups
                .iter()
                .map(|g| Group {
                    n: g.iter().filter(|k| **k).count(),
                    m: g.len(),
                })
                .collect();
            let depth = groups.iter().map(Vec::len).sum();
            let blank = Selection::from_indices(&BlockLayout::single(depth), kept).ok()?;
            Some(Selection {
                groups: sizes,
                ..blank
            })
        },
    )
}

proptest! {
    #[test]
    fn a_valid_selection_survives_its_file(selection in selections()) {
        let back = Selection::from_json(&selection.to_json().unwrap()).unwrap();
        prop_assert_eq!(back, selection);
    }

    #[test]
    fn a_damaged_selection_is_a_usage_error(selection in selections(), at in any::<prop::sample::Index>(), what in 0..5) {
        let mut bad = selection;
        let i = at.index(bad.kept.len());
        match what {
            0 => bad.kept[i] = bad.depth,
            1 => bad.kept.insert(i, bad.kept[i]),
            2 => bad.depth += 1,
            3 => bad.groups[0].n += 1,
            _ => bad.kept.clear(),
        }
        let is_usage_error = matches!(bad.validated(), Err(Error::Usage(_)));
        prop_assert!(is_usage_error);
    }

    #[test]
    fn hostile_text_is_an_error_and_no_panic(text in ".{0,200}") {
        prop_assert!(Selection::from_json(&text).is_err());
    }
}

#[test]
fn a_group_sum_that_overflows_is_an_error() {
    let text = format!(
        r#"{{"depth": 2, "kept": [0], "groups": [{{"n":1,"m":{0}}},{{"n":0,"m":3}}], "criterion": "x"}}"#,
        usize::MAX
    );
    assert!(Selection::from_json(&text).is_err());
}

#[test]
fn streams_are_repeatable_and_apart() {
    let draw = |seed, step, stream| {
        StepRng::new(seed, step, stream)
            .normal(64, &Device::Cpu)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    assert_eq!(draw(1, 2, stream::DRAW), draw(1, 2, stream::DRAW));
    let all = [
        draw(1, 2, stream::DRAW),
        draw(2, 1, stream::DRAW),
        draw(1, 2, stream::MASK),
        draw(1, 3, stream::DRAW),
    ];
    for i in 0..all.len() {
        for j in 0..i {
            assert_ne!(all[i], all[j]);
        }
    }
}

#[test]
fn moments_of_the_draws_are_right() {
    let n = 200_000;
    let moments = |v: Vec<f64>| {
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        (
            mean,
            v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / v.len() as f64,
        )
    };
    let list = |t: Tensor| {
        t.to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(f64::from)
            .collect::<Vec<_>>()
    };
    let mut rng = StepRng::new(3, 0, stream::DRAW);
    let (mean, var) = moments(list(rng.normal(n, &Device::Cpu).unwrap()));
    assert!(
        mean.abs() < 0.01 && (var - 1.0).abs() < 0.02,
        "{mean} {var}"
    );
    // Gumbel: mean is the Euler–Mascheroni constant, variance π²/6.
    let gumbel = list(rng.gumbel(n, &Device::Cpu).unwrap());
    assert!(gumbel.iter().all(|g| g.is_finite()));
    let (mean, var) = moments(gumbel);
    assert!(
        (mean - 0.577_215_66).abs() < 0.012 && (var - 1.644_934).abs() < 0.04,
        "{mean} {var}"
    );
    let (mean, var) = moments(rng.uniform(n));
    assert!(
        (mean - 0.5).abs() < 0.004 && (var - 1.0 / 12.0).abs() < 0.002,
        "{mean} {var}"
    );
    let mut order = rng.permutation(1000);
    assert_ne!(order, (0..1000).collect::<Vec<_>>());
    order.sort_unstable();
    assert_eq!(order, (0..1000).collect::<Vec<_>>());
}

#[test]
fn plans_that_do_not_fit_are_usage_errors() {
    let net = ToyLatent::new(3, &ToyLatent::init(3, 0).unwrap()).unwrap();
    let query = LatentQuery {
        x: Tensor::zeros((1, 3, 2, 2), candle_core::DType::F32, &Device::Cpu).unwrap(),
        t: Tensor::new(&[1f32], &Device::Cpu).unwrap(),
        y: Tensor::new(&[0u32], &Device::Cpu).unwrap(),
    };
    for plan in [Plan::full(2), Plan::full(4), Plan::full(3).with_taps([3])] {
        assert!(matches!(run(&net, &query, &plan), Err(Error::Usage(_))));
    }
    let taps = run(&net, &query, &Plan::keep(3, &[0]).with_taps([0, 2]))
        .unwrap()
        .taps;
    assert_eq!(taps.len(), 2);
}

#[test]
fn layouts_count_blocks_over_stages() {
    let layout = BlockLayout::stages([2, 3]);
    assert_eq!(layout.depth(), 5);
    assert_eq!(layout.ranges().collect::<Vec<_>>(), [0..2, 2..5]);
}

#[test]
fn one_error_lists_everything_that_does_not_fit() {
    let tensor = |n: usize| Tensor::zeros(n, candle_core::DType::F32, &Device::Cpu).unwrap();
    let dict: StateDict = [("a".to_string(), tensor(2)), ("c".to_string(), tensor(1))]
        .into_iter()
        .collect();
    let spec = |name: &str, n| ParamSpec {
        name: name.into(),
        shape: vec![n],
    };
    let error = dict
        .check(&[spec("a", 3), spec("b", 1)])
        .unwrap_err()
        .to_string();
    for part in [
        "`a` has shape [2], expected [3]",
        "missing `b`",
        "unexpected `c`",
    ] {
        assert!(error.contains(part), "{error}");
    }
    dict.check(&[spec("a", 2), spec("c", 1)]).unwrap();
}

#[test]
fn detached_views_follow_updates_and_copies_do_not() {
    let mut dict: StateDict = [("w".to_string(), Tensor::new(&[1f32], &Device::Cpu).unwrap())]
        .into_iter()
        .collect();
    let original = dict.require("w").unwrap().clone();
    let vars = dict.make_trainable(|_| true).unwrap();
    let (view, copy) = (dict.detached(), dict.copied().unwrap());
    vars[0]
        .1
        .set(&Tensor::new(&[5f32], &Device::Cpu).unwrap())
        .unwrap();
    let value = |t: &Tensor| t.to_vec1::<f32>().unwrap()[0];
    assert_eq!(value(view.require("w").unwrap()), 5.0);
    assert_eq!(value(copy.require("w").unwrap()), 1.0);
    assert_eq!(
        value(&original),
        1.0,
        "make_trainable copies what it makes trainable"
    );
}
