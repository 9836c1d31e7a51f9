//! Taylor importance by hand, the loss threshold, and ranking.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_core::{
    BlockLayout, BlockStack, Error, GroupRows, LatentQuery, Result, StateDict, StepRng,
    WidthGroups, WidthPart,
};
use tinyfusion_diffusion::{Objective, TimestepObjective};
use tinyfusion_recover::Teacher;
use tinyfusion_recover::width::{
    LossThreshold, Taylor, TaylorConfig, kept_count, kept_groups, magnitude, random,
    ratio_for_parameters, taylor,
};
use tinyfusion_train::{Progress, Stop};

/// down·(up·h + bias): one block without a residual, so that every gradient is known.
struct Linear(StateDict);

fn matrix<const R: usize, const C: usize>(rows: [[f32; C]; R]) -> Tensor {
    Tensor::new(&rows, &Device::Cpu).unwrap()
}

/// One block of width 2 and hidden width 3.
fn weights() -> StateDict {
    let mut weights = StateDict::new();
    weights.insert("up", matrix([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]]));
    weights.insert(
        "bias",
        Tensor::new(&[0.5f32, 0.0, -1.0], &Device::Cpu).unwrap(),
    );
    weights.insert("down", matrix([[1.0, -2.0, 0.5], [2.0, 1.0, 0.0]]));
    weights
}

fn channels() -> WidthGroups {
    let rows = |tensor: &str, axis| GroupRows {
        tensor: tensor.into(),
        axis,
        parts: 1,
        size: 1,
    };
    WidthGroups {
        block: 0,
        part: WidthPart::Hidden,
        count: 3,
        rows: vec![rows("up", 0), rows("bias", 0), rows("down", 1)],
    }
}

impl BlockStack for Linear {
    type Input = LatentQuery;
    type Cond = Tensor;

    fn layout(&self) -> &BlockLayout {
        static LAYOUT: std::sync::OnceLock<BlockLayout> = std::sync::OnceLock::new();
        LAYOUT.get_or_init(|| BlockLayout::single(1))
    }
    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        Ok((q.x.clone(), q.t.clone())) // (B, 2)
    }
    fn block(&self, _i: usize, h: &Tensor, _c: &Tensor) -> Result<Tensor> {
        let w = |name: &str| self.0.require(name);
        let a = h.matmul(&w("up")?.t()?)?.broadcast_add(w("bias")?)?; // (B, 3)
        Ok(a.matmul(&w("down")?.t()?)?)
    }
    fn head(&self, h: &Tensor, _c: &Tensor) -> Result<Tensor> {
        Ok(h.clone())
    }
}

/// The loss at timestep t is `scale[t]` times the sum of the output's values, and `offset`.
struct Scaled {
    scale: Vec<f32>,
    offset: f64,
}

impl Objective<Linear> for Scaled {
    type Batch = Tensor; // x (B, 2)
    type Draw = (Tensor, usize);
    type Prediction = Tensor;

    fn draw(&self, x: &Tensor, _rng: &mut StepRng) -> Result<Self::Draw> {
        Ok((x.clone(), 0))
    }
    fn rows(&self, (x, t): &Self::Draw, start: usize, len: usize) -> Result<Self::Draw> {
        Ok((x.narrow(0, start, len)?, *t))
    }
    fn input(&self, (x, _): &Self::Draw) -> Result<LatentQuery> {
        Ok(LatentQuery {
            x: x.clone(),
            t: Tensor::zeros(x.dim(0)?, x.dtype(), x.device())?,
            y: Tensor::zeros(x.dim(0)?, candle_core::DType::U32, x.device())?,
        })
    }
    fn noise_free(&self, draw: &Self::Draw) -> Result<LatentQuery> {
        self.input(draw)
    }
    fn predict(&self, _net: &Linear, output: Tensor, _draw: &Self::Draw) -> Result<Tensor> {
        Ok(output)
    }
    fn loss(&self, output: &Tensor, (_, t): &Self::Draw) -> Result<Tensor> {
        Ok(output
            .sum(1)?
            .affine(f64::from(self.scale[*t]), self.offset)?) // (B,)
    }
    fn distill(&self, s: &Tensor, t: &Tensor, _draw: &Self::Draw) -> Result<Tensor> {
        Ok((s - t)?.sqr()?.mean(1)?)
    }
}

impl TimestepObjective<Linear> for Scaled {
    fn timesteps(&self) -> usize {
        self.scale.len()
    }
    fn draw_timestep(&self, x: &Tensor, t: usize, _rng: &mut StepRng) -> Result<Self::Draw> {
        Ok((x.clone(), t))
    }
}

/// Over the samples (1, 1) and (3, 0), one batch each.
fn importance(config: &TaylorConfig, scale: &[f32]) -> Result<Taylor> {
    with_offset(config, scale, 0.0)
}

fn with_offset(config: &TaylorConfig, scale: &[f32], offset: f64) -> Result<Taylor> {
    let batches = [matrix([[1.0, 1.0]]), matrix([[3.0, 0.0]])];
    let teacher = Teacher {
        weights: weights(),
        is_fixed: &|_| false,
        build: &|weights, _| Ok(Linear(weights.clone())),
    };
    taylor(
        config,
        teacher,
        &[channels()],
        &Scaled {
            scale: scale.to_vec(),
            offset,
        },
        &batches,
        &Stop::default(),
        &Progress::hidden(),
    )
}

/// With the mean input x̄ = (2, 0.5) and s_k = Σ_o down[o, k] = (3, −1, 0.5), ∂L/∂up[k, i] = s_k·x̄_i,
/// ∂L/∂bias[k] = s_k and ∂L/∂down[o, k] = ā_k with ā = up·x̄ + bias = (3.5, −1.75, 0.5). By hand:
///
/// * channel 0: |1·3·2| + |2·3·0.5| + |0.5·3| + (1 + 2)·3.5 = 6 + 3 + 1.5 + 10.5 = 21
/// * channel 1: |−1·−1·2| + |0.5·−1·0.5| + 0 + (2 + 1)·1.75 = 2 + 0.25 + 5.25 = 7.5
/// * channel 2: 0 + |3·0.5·0.5| + |−1·0.5| + 0.5·0.5 = 0.75 + 0.5 + 0.25 = 1.5
const BY_HAND: [f64; 3] = [21.0, 7.5, 1.5];

#[test]
fn taylor_scores_are_those_computed_by_hand() {
    for lanes in [1, 2, 5] {
        let config = TaylorConfig {
            lanes,
            ..TaylorConfig::default()
        };
        let found = importance(&config, &[1.0]).unwrap();
        assert_eq!(found.scores, [BY_HAND], "exact in binary");
        assert_eq!(found.timesteps, 1);
        // Σ_k s_k·ā_k = 10.5 + 1.75 + 0.25.
        assert_eq!(found.losses, [12.5]);
    }
}

#[test]
fn gradients_add_up_over_the_timesteps_that_count() {
    // The losses are 12.5 times this. 4 % of the largest end it; the last would count again.
    let scale = [1.0, 0.5, 0.0625, 0.04, 1.0];
    let found = importance(&TaylorConfig::default(), &scale).unwrap();
    assert_eq!((found.timesteps, found.losses.len()), (3, 4));
    for (score, by_hand) in found.scores[0].iter().zip(BY_HAND) {
        assert!(
            (score - 1.5625 * by_hand).abs() < 1e-12 * by_hand,
            "{score}"
        );
    }
    let all = TaylorConfig {
        threshold: 0.0,
        ..TaylorConfig::default()
    };
    let found = importance(&all, &scale).unwrap();
    assert_eq!((found.timesteps, found.losses.len()), (5, 5));
    for (score, by_hand) in found.scores[0].iter().zip(BY_HAND) {
        assert!((score - 2.6025 * by_hand).abs() < 1e-6 * by_hand, "{score}");
    }
    let every_second = TaylorConfig { stride: 2, ..all };
    let found = importance(&every_second, &scale).unwrap();
    assert_eq!((found.timesteps, found.losses.len()), (3, 3));
    assert!((found.scores[0][0] - 2.0625 * BY_HAND[0]).abs() < 1e-12);
    // A gradient of the other sign takes away: the sum over the timesteps is inside the absolute value.
    let found = with_offset(&TaylorConfig::default(), &[1.0, -0.5], 100.0).unwrap();
    assert_eq!(found.timesteps, 2);
    assert_eq!(found.scores, [BY_HAND.map(|s| 0.5 * s)]);
}

#[test]
fn the_threshold_is_of_the_largest_loss_so_far() {
    let used = |threshold, losses: &[f64]| {
        let mut gate = LossThreshold::new(threshold);
        losses.iter().take_while(|&&loss| gate.admits(loss)).count()
    };
    let curve = [0.5, 1.0, 0.4, 0.06, 0.05, 0.049, 0.9];
    assert_eq!(used(0.05, &curve), 5, "0.05 is not below 5 % of 1.0");
    assert_eq!(used(0.4, &curve), 3);
    assert_eq!(used(0.0, &curve), 7);
    assert_eq!(used(1.0, &curve), 2, "a new largest loss counts");
    assert_eq!(
        used(0.05, &[0.01, 0.02, 1.0, 0.04]),
        3,
        "small losses count before the largest"
    );
}

#[test]
fn what_makes_no_sense_is_an_error() {
    let bad = |config: TaylorConfig, scale: &[f32]| importance(&config, scale).unwrap_err();
    for threshold in [-0.1, 1.1, f64::NAN] {
        let config = TaylorConfig {
            threshold,
            ..TaylorConfig::default()
        };
        assert!(matches!(bad(config, &[1.0]), Error::Usage(m) if m.contains("threshold")));
    }
    let config = TaylorConfig {
        stride: 0,
        ..TaylorConfig::default()
    };
    assert!(matches!(bad(config, &[1.0]), Error::Usage(m) if m.contains("stride")));
    let error = bad(TaylorConfig::default(), &[1.0, f32::NAN]).to_string();
    assert!(error.contains("timestep 1 is NaN"), "{error}");
    for ratio in [1.0, -0.1, 2.0, f64::NAN] {
        let error = kept_groups(&[1.0, 2.0], ratio).unwrap_err();
        assert!(matches!(error, Error::Usage(m) if m.contains("ratio")));
    }
    let error = kept_groups(&[1.0, f64::NAN], 0.5).unwrap_err().to_string();
    assert!(error.contains("group 1 is NaN"), "{error}");
}

#[test]
fn the_highest_scores_are_kept() {
    let scores = [3.0, 1.0, 2.0, 1.0, 5.0];
    assert_eq!(kept_groups(&scores, 0.4).unwrap(), [0, 2, 4]);
    assert_eq!(
        kept_groups(&scores, 0.2).unwrap(),
        [0, 1, 2, 4],
        "of equal ones the first"
    );
    assert_eq!(kept_groups(&scores, 0.0).unwrap(), [0, 1, 2, 3, 4]);
    assert_eq!(kept_groups(&scores, 0.99).unwrap(), [4], "one stays");
    // (1 − ratio)·count to the nearest, a half upwards.
    for (count, ratio, kept) in [
        (16, 0.5, 8),
        (3, 0.5, 2),
        (5, 0.5, 3),
        (2, 0.2, 2),
        (2, 0.8, 1),
        (4, 0.9, 1),
    ] {
        assert_eq!(kept_count(count, ratio), kept, "{count} at {ratio}");
    }
}

#[test]
fn magnitudes_are_norms_and_random_scores_have_a_seed() {
    let by_hand = [
        1f64 + 4.0 + 0.25 + 1.0 + 4.0,
        1.0 + 0.25 + 0.0 + 4.0 + 1.0,
        9.0 + 1.0 + 0.25,
    ];
    let found = magnitude(&weights(), &[channels()]).unwrap();
    for (score, squares) in found[0].iter().zip(by_hand) {
        assert!((score - squares.sqrt()).abs() < 1e-12);
    }
    let groups = [channels(), channels()];
    let drawn = random(&groups, 3);
    assert_eq!(drawn, random(&groups, 3));
    assert_ne!(drawn, random(&groups, 4));
    assert_ne!(drawn[0], drawn[1]);
}

#[test]
fn a_head_has_its_rows_in_every_part() {
    // Two heads of two values in each of three parts, as a packed qkv.
    let heads = WidthGroups {
        block: 0,
        part: WidthPart::Heads,
        count: 2,
        rows: vec![GroupRows {
            tensor: "qkv".into(),
            axis: 0,
            parts: 3,
            size: 2,
        }],
    };
    let values: Vec<f32> = (0..12).map(|v| v as f32).collect();
    let qkv = Tensor::from_vec(values, (12, 1), &Device::Cpu).unwrap();
    let weights: StateDict = [("qkv".to_string(), qkv)].into_iter().collect();
    let kept = heads.keep(&weights, &[1]).unwrap();
    let values = kept[0].1.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values, [2.0, 3.0, 6.0, 7.0, 10.0, 11.0]);
    let squares = [
        0.0 + 1.0 + 16.0 + 25.0 + 64.0 + 81.0,
        4.0 + 9.0 + 36.0 + 49.0 + 100.0 + 121.0,
    ];
    let found = magnitude(&weights, &[heads]).unwrap();
    assert!(
        found[0]
            .iter()
            .zip(squares)
            .all(|(f, s): (&f64, f64)| (f - s.sqrt()).abs() < 1e-12)
    );
}

#[test]
fn a_ratio_is_found_for_a_number_of_parameters() {
    // 15 values, 5 in a channel, and 7 that stay.
    let mut weights = weights();
    weights.insert(
        "other",
        Tensor::zeros(7, candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    let groups = [channels()];
    let left = |parameters| {
        let ratio = ratio_for_parameters(&weights, &groups, parameters).unwrap();
        7 + 5 * kept_count(3, ratio)
    };
    for (wanted, found) in [(22, 22), (21, 22), (19, 17), (17, 17), (14, 12), (12, 12)] {
        assert_eq!(left(wanted), found, "{wanted}");
    }
    for wanted in [0, 11, 23] {
        let error = ratio_for_parameters(&weights, &groups, wanted).unwrap_err();
        assert!(
            matches!(&error, Error::Usage(m) if m.contains("12 to 22")),
            "{error}"
        );
    }
}

#[test]
fn a_request_to_stop_is_heard() {
    let stop = Stop::default();
    stop.request();
    let teacher = Teacher {
        weights: weights(),
        is_fixed: &|_| false,
        build: &|weights, _| Ok(Linear(weights.clone())),
    };
    let error = taylor(
        &TaylorConfig::default(),
        teacher,
        &[channels()],
        &Scaled {
            scale: vec![1.0],
            offset: 0.0,
        },
        &[matrix([[1.0, 1.0]])],
        &stop,
        &Progress::hidden(),
    );
    assert!(matches!(error, Err(Error::Stopped)));
}
