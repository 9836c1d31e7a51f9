//! The laws on the toy stacks, and proof that the suite notices a broken stack.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Device, Tensor};
use tinyfusion_core::laws::{self, Subject};
use tinyfusion_core::toy::{ToyLatent, ToyTokens};
use tinyfusion_core::{
    BlockLayout, BlockStack, LatentQuery, Plan, Result, Rows, StateDict, StepRng, TokenQuery,
    stream,
};

fn pick<T: Rows>(t: T, rows: Option<&[usize]>) -> Result<T> {
    match rows {
        None => Ok(t),
        Some(rows) => t.select(&Tensor::new(
            rows.iter().map(|&r| r as u32).collect::<Vec<_>>(),
            &Device::Cpu,
        )?),
    }
}

/// `blocks.{kept[j]}` renamed to `blocks.{j}`.
fn cut(weights: &StateDict, kept: &[usize]) -> StateDict {
    weights
        .iter()
        .filter_map(|(name, t)| {
            match name.strip_prefix("blocks.").and_then(|r| r.split_once('.')) {
                None => Some((name.to_string(), t.clone())),
                Some((i, rest)) => {
                    let j = kept.iter().position(|k| k.to_string() == i)?;
                    Some((format!("blocks.{j}.{rest}"), t.clone()))
                }
            }
        })
        .collect()
}

struct Latent;

impl Subject for Latent {
    type Net = ToyLatent;
    fn depth(&self) -> usize {
        4
    }
    fn weights(&self) -> Result<StateDict> {
        ToyLatent::init(4, 3)
    }
    fn build(&self, weights: &StateDict) -> Result<ToyLatent> {
        ToyLatent::new(4, weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<ToyLatent> {
        ToyLatent::new(kept.len(), &cut(weights, kept))
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<LatentQuery> {
        let x = StepRng::new(1, 0, stream::DRAW)
            .normal((3, ToyLatent::CHANNELS, 2, 2), &Device::Cpu)?;
        let t = Tensor::new(&[0f32, 300.0, 999.0], &Device::Cpu)?;
        let y = Tensor::new(&[0u32, 1, 2], &Device::Cpu)?;
        Ok(LatentQuery {
            x: pick(x, rows)?,
            t: pick(t, rows)?,
            y: pick(y, rows)?,
        })
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![vec![0, 2], vec![1, 2, 3], vec![3]]
    }
}

struct Tokens;

impl Subject for Tokens {
    type Net = ToyTokens;
    fn depth(&self) -> usize {
        4
    }
    fn weights(&self) -> Result<StateDict> {
        ToyTokens::init([2, 2], 4)
    }
    fn build(&self, weights: &StateDict) -> Result<ToyTokens> {
        ToyTokens::new([2, 2], weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<ToyTokens> {
        let first = kept.iter().filter(|k| **k < 2).count();
        ToyTokens::new([first, kept.len() - first], &cut(weights, kept))
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<TokenQuery> {
        let tokens =
            StepRng::new(2, 0, stream::DRAW).normal((3, 4, ToyTokens::CHANNELS), &Device::Cpu)?;
        let mask = Tensor::new(
            &[
                [1f32, 0.0, 1.0, 0.0],
                [0.0, 0.0, 1.0, 1.0],
                [1.0, 1.0, 0.0, 0.0],
            ],
            &Device::Cpu,
        )?;
        let y = Tensor::new(&[0u32, 1, 2], &Device::Cpu)?;
        Ok(TokenQuery {
            tokens: pick(tokens, rows)?,
            mask: pick(mask, rows)?,
            y: pick(y, rows)?,
            dropout: None,
        })
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![vec![0, 2], vec![1, 3], vec![0, 1, 3]]
    }
}

#[test]
fn toy_latent_keeps_the_laws() {
    laws::check(&Latent).unwrap();
}

#[test]
fn toy_tokens_keep_the_laws() {
    laws::check(&Tokens).unwrap();
}

/// A [`ToyLatent`] broken in one place.
struct Broken {
    net: ToyLatent,
    flaw: Flaw,
}

#[derive(Clone, Copy)]
enum Flaw {
    /// The second block mixes samples.
    Mixing,
    /// The second block puts one value that is not a number among its tokens.
    NanInBlock,
    /// The head puts this in place of one value of the output.
    InOutput(f32),
    /// The output is right, its gradient is not a number: √(h − h) has slopes ∞ and −∞.
    NanInGradient,
}

/// `h` with its value at `at` (flattened) replaced.
fn with_value(h: &Tensor, at: usize, value: f32) -> Result<Tensor> {
    let n = h.elem_count();
    let here: Vec<u8> = (0..n).map(|i| u8::from(i == at)).collect();
    let here = Tensor::from_vec(here, h.shape(), h.device())?;
    let other = Tensor::full(value, h.shape(), h.device())?;
    Ok(here.where_cond(&other, h)?)
}

impl BlockStack for Broken {
    type Input = LatentQuery;
    type Cond = Tensor;
    fn layout(&self) -> &BlockLayout {
        self.net.layout()
    }
    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        self.net.embed(q)
    }
    fn block(&self, i: usize, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        let out = self.net.block(i, h, c)?;
        match self.flaw {
            Flaw::Mixing if i == 1 => Ok(out.broadcast_sub(&out.mean_keepdim(0)?)?),
            Flaw::NanInBlock if i == 1 => with_value(&out, 1, f32::NAN),
            _ => Ok(out),
        }
    }
    fn head(&self, h: &Tensor, c: &Tensor) -> Result<Tensor> {
        let out = self.net.head(h, c)?;
        match self.flaw {
            Flaw::InOutput(value) => with_value(&out, 1, value),
            Flaw::NanInGradient => {
                let same = out.clone();
                Ok((&out + (&out - same)?.sqrt()?)?)
            }
            _ => Ok(out),
        }
    }
}

impl Subject for Flaw {
    type Net = Broken;
    fn depth(&self) -> usize {
        4
    }
    fn weights(&self) -> Result<StateDict> {
        Latent.weights()
    }
    fn build(&self, weights: &StateDict) -> Result<Broken> {
        Ok(Broken {
            net: Latent.build(weights)?,
            flaw: *self,
        })
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<Broken> {
        Ok(Broken {
            net: Latent.rebuild(weights, kept)?,
            flaw: *self,
        })
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<LatentQuery> {
        Latent.input(rows)
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![]
    }
}

#[test]
fn a_stack_that_mixes_samples_is_caught() {
    let error = laws::check(&Flaw::Mixing).unwrap_err().to_string();
    assert!(error.contains("batched is single"), "{error}");
}

#[test]
fn a_stack_whose_values_are_not_finite_is_caught() {
    for flaw in [
        Flaw::NanInBlock,
        Flaw::InOutput(f32::NAN),
        Flaw::InOutput(f32::INFINITY),
        Flaw::InOutput(f32::NEG_INFINITY),
    ] {
        let error = laws::check(&flaw).unwrap_err().to_string();
        assert!(
            error.contains("law broken") && error.contains("not finite"),
            "{error}"
        );
    }
}

#[test]
fn a_gradient_that_is_not_a_number_is_caught() {
    let error = laws::check(&Flaw::NanInGradient).unwrap_err().to_string();
    assert!(
        error.contains("every trainable tensor has a gradient") && error.contains("NaN"),
        "{error}"
    );
}

#[test]
fn the_exact_blend_refuses_soft_masks() {
    let weights = Latent.weights().unwrap();
    let net = Latent.build(&weights).unwrap();
    let soft = Tensor::full(0.5f32, (3, 4), &Device::Cpu).unwrap();
    let plan = tinyfusion_core::Plan::blend(&soft).unwrap();
    let error =
        tinyfusion_core::run_exact(&net, &net, &Latent.input(None).unwrap(), &plan).unwrap_err();
    assert!(error.to_string().contains("0.5"), "{error}");
}

/// A mask that the host knows is that mask, and is checked against it.
#[test]
fn the_exact_blend_of_a_known_mask() {
    let weights = Latent.weights().unwrap();
    let net = Latent.build(&weights).unwrap();
    let input = Latent.input(None).unwrap();
    let values = [[1f32, 0., 1., 0.], [1., 1., 0., 0.], [1., 0., 0., 1.]]; // all, some and none of the samples keep a block
    let mask = Tensor::new(&values, &Device::Cpu).unwrap();
    let kept: Vec<Vec<bool>> = (0..4)
        .map(|block| values.iter().map(|row| row[block] == 1.0).collect())
        .collect();
    let output = |plan| {
        let output = tinyfusion_core::run_exact(&net, &net, &input, &plan).unwrap();
        let output = output.output.flatten_all().unwrap();
        output.to_vec1::<f32>().unwrap()
    };
    let known = Plan::blend_known(&mask, kept.clone()).unwrap();
    assert_eq!(output(known), output(Plan::blend(&mask).unwrap()));

    let error = |kept| Plan::blend_known(&mask, kept).unwrap_err().to_string();
    assert!(error(kept[..3].to_vec()).contains("4 blocks, of which 3"));
    let mut wrong = kept.clone();
    wrong[2].pop();
    assert!(error(wrong).contains("3 samples, of which 2"));
    let mut wrong = kept;
    wrong[3][2] = false;
    assert!(error(wrong).contains("mask is 1, and it is said to be kept: false"));
}
