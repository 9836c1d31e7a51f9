//! Every criterion on stacks whose answer is known by hand.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use candle_core::{DType, Device, Tensor};
use common::{Imitate, USEFUL, batch, build, config, weights};
use tinyfusion_core::toy::ToyLatent;
use tinyfusion_core::{
    BlockLayout, BlockStack, Error, Group, LatentQuery, Plan, Result, Selection, StateDict,
};
use tinyfusion_diffusion::Objective;
use tinyfusion_mask::candidates;
use tinyfusion_recover::criteria::{
    BlockInfluence, Choice, Criterion, FluxLite, Greedy, Judgement, LearnedMask, Magnitude, Oracle,
    Random, RandomSearch, Sensitivity, Subject,
};
use tinyfusion_recover::{DeltaW, RunContext, Teacher, held_out_loss};
use tinyfusion_train::{Progress, RunDir, Stop};

/// Block i turns two-channel tokens by an angle: what every criterion finds can be worked out.
struct Turning {
    layout: BlockLayout,
    weights: StateDict,
}

impl Turning {
    fn new(angles: &[f32]) -> Self {
        let weights = angles.iter().enumerate().map(|(i, angle)| {
            let angle = Tensor::new(&[*angle], &Device::Cpu).unwrap();
            (format!("blocks.{i}.angle"), angle)
        });
        Self {
            layout: BlockLayout::single(angles.len()),
            weights: weights.collect(),
        }
    }
}

impl BlockStack for Turning {
    type Input = LatentQuery;
    type Cond = Tensor;

    fn layout(&self) -> &BlockLayout {
        &self.layout
    }
    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        let h = q.x.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // (B, T, 2)
        Ok((h, q.t.clone()))
    }
    fn block(&self, i: usize, h: &Tensor, _: &Tensor) -> Result<Tensor> {
        let angle = self.weights.require(&format!("blocks.{i}.angle"))?;
        let angle = angle.to_vec1::<f32>()?[0];
        let turn = Tensor::new(
            &[[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]],
            h.device(),
        )?;
        Ok(h.broadcast_matmul(&turn)?) // (B, T, 2)
    }
    fn head(&self, h: &Tensor, _: &Tensor) -> Result<Tensor> {
        Ok(h.clone())
    }
}

/// x (B, 2, 1, 2): every token has the length of its sample, 1, 2, …
fn tokens(k: u64) -> Result<Tensor> {
    let mut values = Vec::new();
    for b in 0..4 {
        let (length, at) = (f64::from(b + 1), k as f64 + f64::from(b));
        let xs = [at.cos(), (at + 1.0).cos()].map(|x| (length * x) as f32);
        let ys = [at.sin(), (at + 1.0).sin()].map(|y| (length * y) as f32);
        values.extend(xs);
        values.extend(ys);
    }
    Ok(Tensor::from_vec(values, (4, 2, 1, 2), &Device::Cpu)?)
}

/// Mean of the squared lengths 1, 4, 9, 16.
const SQUARE: f64 = 7.5;
const BATCHES: u64 = 3;

fn pairs(n: usize) -> Choice {
    Choice::Groups(vec![Group { n: 1, m: 2 }; n])
}

/// One batch, looked at by one lane, whose passes nobody counts.
fn subject<'a, S: BlockStack, O: Objective<S>>(
    (net, weights): (&'a S, &'a StateDict),
    objective: &'a O,
    choice: Choice,
    batches: &'a dyn Fn(u64) -> Result<O::Batch>,
) -> Subject<'a, S, O> {
    Subject {
        net,
        weights,
        block_of: &block_of,
        objective,
        choice,
        batches,
        batch_count: 1,
        seed: 0,
        lanes: 1,
        passed: &|| Ok(()),
    }
}

fn judge_turning(
    angles: &[f32],
    choice: Choice,
    criterion: impl Criterion<Turning, Imitate<Turning>>,
) -> Judgement {
    let (net, objective) = (Turning::new(angles), Imitate(Turning::new(angles)));
    let passes = AtomicU64::new(0);
    let subject = Subject {
        batch_count: BATCHES,
        lanes: 2,
        passed: &|| {
            passes.fetch_add(1, Relaxed);
            Ok(())
        },
        ..subject((&net, &net.weights), &objective, choice, &tokens)
    };
    let expected = criterion.passes(&subject);
    let judgement = Box::new(criterion).choose(&subject).unwrap();
    // A random search judges equal masks once.
    assert!(passes.load(Relaxed) <= expected);
    judgement
}

fn block_of(name: &str) -> Option<usize> {
    name.strip_prefix("blocks.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// Scores by block, compared to 1e-5 of the largest.
fn scores_are(judgement: &Judgement, expected: &[f64]) {
    let largest = expected.iter().fold(0f64, |m, e| m.max(e.abs()));
    assert_eq!(judgement.blocks.len(), expected.len());
    for (i, (found, expected)) in judgement.blocks.iter().zip(expected).enumerate() {
        assert_eq!(found.block, i);
        let off = (found.score - expected).abs();
        assert!(
            off <= 1e-5 * largest,
            "block {i}: {} for {expected}",
            found.score
        );
    }
}

const ANGLES: [f32; 4] = [0.5, 0.0, -1.0, 0.2];

fn one_minus_cosines(angles: &[f32]) -> Vec<f64> {
    angles.iter().map(|a| 1.0 - f64::from(*a).cos()).collect()
}

#[test]
fn block_influence_is_one_minus_the_cosine_of_the_angle() {
    let found = judge_turning(&ANGLES, Choice::Any(2), BlockInfluence::default());
    scores_are(&found, &one_minus_cosines(&ANGLES));
    assert_eq!(found.selection.kept, [0, 2]);
    // All samples turn alike.
    let error = found.blocks[2].standard_error.unwrap();
    assert!(error < 1e-6, "{error}");
    // Within groups the best of each stays, however small.
    let found = judge_turning(&ANGLES, pairs(2), BlockInfluence::default());
    assert_eq!(found.selection.kept, [0, 2]);
    let found = judge_turning(&[0.5, 0.6, 0.1, 0.2], pairs(2), BlockInfluence::default());
    assert_eq!(found.selection.kept, [1, 3]);
}

#[test]
fn the_reference_never_removes_the_last_block() {
    let reference = BlockInfluence { reference: true };
    let found = judge_turning(&ANGLES, Choice::Any(1), reference);
    assert_eq!(found.selection.kept, [3]);
    scores_are(&found, &one_minus_cosines(&ANGLES)); // the true score is recorded all the same
    let found = judge_turning(&ANGLES, Choice::Any(1), BlockInfluence::default());
    assert_eq!(found.selection.kept, [2]);
}

/// |R(θ)h − h|² = 2 (1 − cos θ) |h|², over two channels.
#[test]
fn flux_lite_is_the_mean_squared_step_of_the_turn() {
    let expected: Vec<f64> = one_minus_cosines(&ANGLES)
        .iter()
        .map(|c| c * SQUARE)
        .collect();
    let found = judge_turning(&ANGLES, Choice::Any(2), FluxLite);
    scores_are(&found, &expected);
    assert_eq!(found.selection.kept, [0, 2]);
    // σ/√n of (1, 4, 9, 16) three times over, times 1 − cos θ.
    let squares = 3.0
        * [1.0, 4.0, 9.0, 16.0]
            .map(|x: f64| (x - SQUARE).powi(2))
            .iter()
            .sum::<f64>();
    let error = (squares / 11.0 / 12.0).sqrt() * (1.0 - 1f64.cos());
    let off = found.blocks[2].standard_error.unwrap() - error;
    assert!(off.abs() < 1e-5 * error, "{off}");
}

/// Without block i the whole turn lacks θ_i: the same number again.
#[test]
fn sensitivity_is_what_the_missing_turn_costs() {
    let expected: Vec<f64> = one_minus_cosines(&ANGLES)
        .iter()
        .map(|c| c * SQUARE)
        .collect();
    let found = judge_turning(&ANGLES, Choice::Any(3), Sensitivity);
    scores_are(&found, &expected);
    assert_eq!(found.selection.kept, [0, 2, 3]);
}

/// Turns that cancel: one at a time they look alike, together two of them cost nothing.
#[test]
fn the_greedy_form_sees_that_turns_cancel() {
    let angles = [0.2, -0.25, 0.22, 0.6];
    let found = judge_turning(&angles, Choice::Any(2), Sensitivity);
    assert_eq!(found.selection.kept, [1, 3]);
    let found = judge_turning(&angles, Choice::Any(2), Greedy);
    assert_eq!(found.selection.kept, [2, 3]);
    // What is lost: a turn by 0.2, then by 0.2 − 0.25.
    let lost = [0.2, -0.05].map(|angle: f64| (1.0 - angle.cos()) * SQUARE);
    for (mask, lost) in found.masks.iter().zip(lost) {
        assert!((mask.loss.unwrap() - lost).abs() < 1e-5, "{mask:?}");
    }
    assert_eq!(found.masks[0].kept, [1, 2, 3]);
    // In groups a pair that lost one loses no more.
    let found = judge_turning(&[0.2, -0.25, 0.5, 0.6], pairs(2), Greedy);
    assert_eq!(found.selection.kept, [1, 3]);
}

#[test]
fn magnitude_is_the_mean_absolute_weight() {
    let found = judge_turning(&ANGLES, Choice::Any(2), Magnitude);
    scores_are(&found, &ANGLES.map(|a| f64::from(a.abs())));
    assert_eq!(found.selection.kept, [0, 2]);
    assert!(found.blocks.iter().all(|b| b.standard_error.is_none()));
}

#[test]
fn a_block_that_does_nothing_scores_zero_everywhere() {
    let nothing = [0.5, 0.0, 0.4];
    let by_blocks: [Box<dyn Criterion<_, _>>; 4] = [
        Box::new(BlockInfluence::default()),
        Box::new(FluxLite),
        Box::new(Sensitivity),
        Box::new(Magnitude),
    ];
    let (net, objective) = (Turning::new(&nothing), Imitate(Turning::new(&nothing)));
    for criterion in by_blocks {
        let name = criterion.name();
        let subject = subject((&net, &net.weights), &objective, Choice::Any(2), &tokens);
        let found = criterion.choose(&subject).unwrap();
        assert!(found.blocks[1].score.abs() < 1e-6, "{name}: {found:?}");
        assert_eq!(found.selection.kept, [0, 2], "{name}");
        assert_eq!(found.selection.criterion, name);
    }
}

/// The toy network of the learned masks, whose useful blocks are known.
fn with_toy<R>(
    choice: Choice,
    lanes: usize,
    then: impl FnOnce(Subject<'_, ToyLatent, Imitate<ToyLatent>>) -> R,
) -> R {
    let weights = weights();
    let net = build(&weights, 0.0).unwrap();
    let objective = Imitate::toy(&weights);
    then(Subject {
        batch_count: 4,
        lanes,
        ..subject((&net, &weights), &objective, choice, &batch)
    })
}

fn all_masks() -> Vec<Vec<usize>> {
    candidates(Group { n: 3, m: 6 }).unwrap()
}

#[test]
fn a_random_search_finds_the_extremes_and_the_middle_of_all_masks() {
    let find = |quantile, lanes| {
        with_toy(Choice::Any(3), lanes, |subject| {
            let masks = 400; // of 20 different ones: all are drawn
            let search = RandomSearch { masks, quantile };
            Box::new(search).choose(&subject).unwrap()
        })
    };
    let weights = weights();
    let net = build(&weights, 0.0).unwrap();
    let objective = Imitate::toy(&weights);
    let mut losses: Vec<(f64, Vec<usize>)> = all_masks()
        .into_iter()
        .map(|kept| {
            let plan = Plan::keep(6, &kept);
            let loss = held_out_loss(&net, &plan, &objective, (0..4).map(batch), 0).unwrap();
            (loss.loss, kept)
        })
        .collect();
    losses.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (quantile, rank) in [(0.0, 0), (0.5, 10), (1.0, 19)] {
        let found = find(quantile, 2);
        assert_eq!(found.masks.len(), 20);
        assert_eq!(found.selection.kept, losses[rank].1, "{quantile}");
    }
    assert_eq!(losses[0].1, USEFUL);
    // How many run side by side changes nothing.
    assert_eq!(find(0.5, 1), find(0.5, 2));
}

#[test]
fn criteria_that_do_not_train_find_the_blocks_that_do_something() {
    for choice in [Choice::Any(3), pairs(3)] {
        with_toy(choice, 2, |subject| {
            let all: [Box<dyn Criterion<_, _>>; 5] = [
                Box::new(BlockInfluence::default()),
                Box::new(FluxLite),
                Box::new(Sensitivity),
                Box::new(Greedy),
                Box::new(Magnitude),
            ];
            for criterion in all {
                let name = criterion.name();
                let found = criterion.choose(&subject).unwrap();
                assert_eq!(found.selection.kept, USEFUL, "{name}");
                assert_eq!(
                    found.selection.clone().validated().unwrap(),
                    found.selection
                );
            }
        });
    }
}

#[test]
fn random_masks_are_uniform_over_what_is_allowed() {
    let draw = |choice: Choice, seed| {
        with_toy(choice, 1, |subject| {
            let subject = Subject { seed, ..subject };
            let found = Box::new(Random).choose(&subject).unwrap();
            found.selection.kept
        })
    };
    let mut counts = vec![0u32; 20];
    let all = all_masks();
    for seed in 0..2000 {
        let kept = draw(Choice::Any(3), seed);
        counts[all.iter().position(|m| *m == kept).unwrap()] += 1;
    }
    // 100 ± 10 expected; five standard deviations.
    assert!(counts.iter().all(|c| (50..150).contains(c)), "{counts:?}");
    for seed in 0..50 {
        let kept = draw(pairs(3), seed);
        assert!(kept.iter().enumerate().all(|(g, k)| k / 2 == g), "{kept:?}");
    }
}

#[test]
fn the_oracle_and_the_learned_mask_are_criteria_too() {
    with_toy(pairs(3), 1, |subject| {
        let found = Box::new(Oracle).choose(&subject).unwrap();
        assert_eq!(found.selection.kept, [0, 2, 5]); // the pair 2, 3 begins in the first half
        let folder = tempfile::tempdir().unwrap();
        let config = config(DeltaW::Full);
        let dir = RunDir::open(folder.path(), &config).unwrap();
        let weights = weights();
        let learned = LearnedMask {
            config,
            teacher: Teacher {
                weights: weights.clone(),
                is_fixed: &|_| false,
                build: &build,
            },
            batches: batch,
            context: RunContext {
                dir: &dir,
                stop: &Stop::default(),
                progress: &Progress::hidden(),
            },
        };
        let found = Box::new(learned).choose(&subject).unwrap();
        assert_eq!(found.selection.kept, USEFUL);
        // The two blocks of a pair share the probability 1, the kept one has more of it.
        for pair in found.blocks.chunks(2) {
            assert!(
                (pair[0].score + pair[1].score - 1.0).abs() < 1e-9,
                "{pair:?}"
            );
        }
        for block in &found.blocks {
            assert_eq!(
                block.score > 0.5,
                USEFUL.contains(&block.block),
                "{block:?}"
            );
        }
    });
}

#[test]
fn what_cannot_be_judged_is_an_error() {
    let mut broken = weights();
    let nan = Tensor::full(f32::NAN, (3, 3), &Device::Cpu).unwrap();
    broken.insert("blocks.2.weight", nan);
    let net = build(&broken, 0.0).unwrap();
    let objective = Imitate::toy(&weights());
    let of = || subject((&net, &broken), &objective, Choice::Any(3), &batch);
    let subject = Subject {
        batch_count: 2,
        lanes: 2,
        ..of()
    };
    let all: [Box<dyn Criterion<_, _>>; 5] = [
        Box::new(BlockInfluence::default()),
        Box::new(FluxLite),
        Box::new(Sensitivity),
        Box::new(Greedy),
        Box::new(Magnitude),
    ];
    for criterion in all {
        let name = criterion.name();
        let found = criterion.choose(&subject);
        // With block 2 skipped the greedy form has losses to compare.
        if name == "sensitivity-greedy" {
            assert!(!found.unwrap().selection.kept.contains(&2));
        } else {
            let Err(Error::Run(text)) = found else {
                panic!("{name}: {found:?}")
            };
            assert!(text.contains("not a number"), "{text}");
        }
    }
    // One sample has no standard error; the work ends where the caller says so.
    let one = |_| Ok(Tensor::zeros((1, 3, 2, 2), DType::F32, &Device::Cpu)?);
    let subject = Subject {
        batches: &one,
        ..of()
    };
    assert!(Box::new(FluxLite).choose(&subject).is_err());
    let stopped = || Err(Error::Stopped);
    let subject = Subject {
        passed: &stopped,
        ..of()
    };
    let found = Box::new(Sensitivity).choose(&subject);
    assert!(matches!(found, Err(Error::Stopped)), "{found:?}");
}

#[test]
fn a_stage_is_never_emptied() {
    let layout = BlockLayout::stages([2, 2]);
    let found = Selection::from_indices(&layout, vec![0, 1]).unwrap();
    assert_eq!(found.groups[1], Group { n: 0, m: 2 });
    let net = Turning {
        layout: layout.clone(),
        weights: Turning::new(&[0.5, 0.6, 0.1, 0.2]).weights,
    };
    let objective = Imitate(Turning::new(&[0.5, 0.6, 0.1, 0.2]));
    let subject = subject((&net, &net.weights), &objective, Choice::Any(2), &tokens);
    let error = Box::new(FluxLite).choose(&subject).unwrap_err();
    assert!(error.to_string().contains("leave stage 1"), "{error}");
    // Those that try masks try others.
    let greedy = Box::new(Greedy).choose(&subject).unwrap();
    assert_eq!(greedy.selection.groups, [Group { n: 1, m: 2 }; 2]);
    let search = RandomSearch {
        masks: 50,
        quantile: 0.0,
    };
    let found = Box::new(search).choose(&subject).unwrap();
    assert_eq!(found.masks.len(), 4, "{:?}", found.masks);
    let none = Subject {
        choice: Choice::Any(1),
        ..subject
    };
    for criterion in [
        Box::new(Greedy) as Box<dyn Criterion<_, _>>,
        Box::new(Random),
    ] {
        assert!(criterion.choose(&none).is_err());
    }
}
