use candle_core::{Device, Var};

use super::*;
use crate::{Gradients, ops};

fn random(shape: &[usize], seed: u32) -> Tensor {
    let n = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..n)
        .map(|i| ((i as f32 + 1.0) * (seed as f32 + 0.37)).sin())
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // Zeros of both signs are one number; candle's begins its sums with one of them.
    values.into_iter().map(|v| (v + 0.0).to_bits()).collect()
}

struct Vars {
    x: Var,
    c: Var,
    qkv: Var,
    w: Var,
    bias: Var,
}

impl Vars {
    fn new() -> Self {
        let var = |shape: &[usize], seed| Var::from_tensor(&random(shape, seed)).unwrap();
        Self {
            x: var(&[2, 3, 8], 1),
            c: var(&[2, 48], 2),
            qkv: var(&[24, 8], 3),
            w: var(&[8, 8], 4),
            bias: var(&[8], 5),
        }
    }

    fn all(&self) -> [&Var; 5] {
        [&self.x, &self.c, &self.qkv, &self.w, &self.bias]
    }

    /// Attention and a layer, with an operation of candle's at one of three places or at none (0).
    fn block(&self, candle: usize, x: &Tensor, c: &Tensor) -> Result<Tensor> {
        let or_candle = |place, x: &Tensor| match place == candle {
            true => x * 1.5,
            false => Ok(x.clone()),
        };
        let x = &or_candle(1, x)?;
        let h = ops::layer_norm_modulate(x, c, 0, 1, 1e-6)?;
        let h = ops::attention(&ops::linear(&h, &self.qkv, None)?, 2)?;
        let h = or_candle(2, &h)?;
        let x = ops::gated_residual(x, &h, c, 2)?;
        let h = ops::linear_gelu(&x, &self.w, &self.bias)?;
        or_candle(3, &ops::gated_residual(&x, &h, c, 5)?)
    }

    /// Three blocks and the gradients of a loss behind them.
    fn gradients(&self, recorded: bool, candle: usize) -> Vec<Vec<u32>> {
        let forward = || {
            let mut h = self.x.as_tensor().clone();
            for _ in 0..3 {
                h = match recorded {
                    true => record(&h, &self.c, |x, c| self.block(candle, x, c)).unwrap(),
                    false => self.block(candle, &h, &self.c).unwrap(),
                };
            }
            h
        };
        let h = match recorded {
            true => Gradients::recording(forward),
            false => forward(),
        };
        let mut sums = Gradients::new(&self.all());
        sums.backward(&h.sqr().unwrap().sum_all().unwrap()).unwrap();
        let mut all = vec![bits(&h)];
        all.extend(sums.sums().unwrap().iter().map(bits));
        all
    }
}

#[test]
fn gradients_are_candles_bit_for_bit_whatever_the_block_is_made_of() {
    let vars = Vars::new();
    for candle in 0..=3 {
        let (want, got) = (vars.gradients(false, candle), vars.gradients(true, candle));
        for (i, (want, got)) in want.iter().zip(&got).enumerate() {
            assert_eq!(want, got, "tensor {i}, candle's operation at {candle}");
            assert!(got.iter().any(|v| *v != 0));
        }
    }
}

#[test]
fn a_block_is_recorded_where_it_is_all_of_this_crates_and_only_then() {
    let vars = Vars::new();
    for candle in 0..=3 {
        let block = |x: &Tensor, c: &Tensor| vars.block(candle, x, c);
        let (_, tape) = Tape::of(&vars.x, &vars.c, block).unwrap();
        assert_eq!(
            tape.is_some(),
            candle == 0,
            "candle's operation at {candle}"
        );
    }
}

/// A block whose input is its only input, and part of whose work leads nowhere.
#[test]
fn a_block_may_be_told_its_input_alone() {
    let vars = Vars::new();
    let block = |x: &Tensor| {
        ops::gelu_tanh(x)?;
        let y = ops::linear_gelu(x, &vars.w, &vars.bias)?;
        ops::silu(&y)?;
        Ok::<_, candle_core::Error>(y)
    };
    let gradients = |h: Tensor| {
        let mut sums = Gradients::new(&vars.all());
        sums.backward(&h.sqr().unwrap().sum_all().unwrap()).unwrap();
        sums.sums().unwrap().iter().map(bits).collect::<Vec<_>>()
    };
    let want = gradients(block(&vars.x).unwrap());
    let got = Gradients::recording(|| record(&vars.x, &vars.x, |x, _| block(x)).unwrap());
    assert_eq!(want, gradients(got));
}

#[test]
fn without_sums_blocks_are_candles() {
    let vars = Vars::new();
    let h = record(&vars.x, &vars.c, |x, c| vars.block(0, x, c)).unwrap();
    let found = h.sum_all().unwrap().backward().unwrap();
    assert!(vars.all().iter().all(|var| found.get(var).is_some()));
    let h = Gradients::recording(|| record(&vars.x, &vars.c, |x, c| vars.block(0, x, c)).unwrap());
    let error = h.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(error.contains("Gradients"), "{error}");
}

#[test]
fn a_recorded_block_has_one_backward() {
    let vars = Vars::new();
    let h = Gradients::recording(|| record(&vars.x, &vars.c, |x, c| vars.block(0, x, c)).unwrap());
    let loss = h.sum_all().unwrap();
    let mut sums = Gradients::new(&vars.all());
    sums.backward(&loss).unwrap();
    let error = sums.backward(&loss).unwrap_err().to_string();
    assert!(error.contains("one backward"), "{error}");
}

#[test]
fn a_panic_leaves_no_tape_behind() {
    let vars = Vars::new();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Gradients::recording(|| record(&vars.x, &vars.c, |_, _| panic!("in the middle")))
    }));
    assert!(outcome.is_err());
    assert!(!has_sums());
    assert!(RUNNING.with_borrow(Option::is_none));
}
