//! The laws of [`BlockStack`], as one behavioural suite run against every implementer.
//!
//! A model family's tests implement [`Subject`] and call [`check`]: one line per family.

use candle_core::{Device, Tensor, Var};

use crate::{BlockStack, Error, Plan, Result, StateDict, StepRng, run, run_exact, stream, walk};

/// A family under test: how to build its networks and what to ask them.
pub trait Subject {
    /// The network.
    type Net: BlockStack;

    /// Blocks per stage.
    fn depth(&self) -> usize;
    /// Random weights, every tensor non-zero (so that no gradient is zero by construction).
    fn weights(&self) -> Result<StateDict>;
    /// The full network on `weights`.
    fn build(&self, weights: &StateDict) -> Result<Self::Net>;
    /// The network cut to the blocks `kept`, rebuilt by renaming and the ordinary constructor.
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<Self::Net>;
    /// A query of at least three different samples, or of the samples `rows` of it.
    fn input(&self, rows: Option<&[usize]>) -> Result<<Self::Net as BlockStack>::Input>;
    /// Block selections that the family can be cut to (MAR keeps some of each stage).
    fn selections(&self) -> Vec<Vec<usize>>;
    /// Parameters that are fixed tables, not trained.
    fn is_fixed(&self, name: &str) -> bool {
        let _ = name;
        false
    }
    /// Parameters whose exact gradient is zero in part or whole, with the reason in the implementer.
    fn may_have_zero_gradient(&self, name: &str) -> bool {
        let _ = name;
        false
    }
}

/// Checks every law; the error names the one that is broken.
pub fn check<S: Subject>(subject: &S) -> Result<()> {
    shape_is_kept(subject)?;
    gates_of_one_are_the_full_net(subject)?;
    gates_are_the_cut_net(subject)?;
    samples_do_not_mix(subject)?;
    every_weight_has_a_gradient(subject)?;
    detached_weights_record_nothing(subject)?;
    exact_blend_is_the_plain_blend(subject)
}

fn broken(law: &str, detail: impl std::fmt::Display) -> Error {
    Error::run(format!("law broken: {law}: {detail}"))
}

/// The largest absolute value; not a number if any value is. On the host, because a maximum that keeps
/// the larger of two values (candle's, or `f32::max`) passes over what is not a number.
fn max_abs(t: &Tensor) -> Result<f32> {
    let values = t.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().fold(0.0, |max, v| {
        if v.is_nan() || v.abs() > max {
            v.abs()
        } else {
            max
        }
    }))
}

/// Whether `a` is `b` within `tolerance` of `b`'s largest value; never if either holds a value that is
/// not finite.
fn same(law: &str, what: &str, a: &Tensor, b: &Tensor, tolerance: f32) -> Result<()> {
    if a.dims() != b.dims() {
        return Err(broken(
            law,
            format!("{what} has shape {:?} instead of {:?}", a.dims(), b.dims()),
        ));
    }
    let (largest, difference) = (max_abs(b)?, max_abs(&(a - b)?)?);
    if !(largest.is_finite() && difference.is_finite()) {
        return Err(broken(
            law,
            format!("{what} holds values that are not finite"),
        ));
    }
    let relative = difference / largest.max(1e-6);
    if relative <= tolerance {
        Ok(())
    } else {
        Err(broken(
            law,
            format!("{what} differs by {relative:e} of its largest value"),
        ))
    }
}

fn shape_is_kept<S: Subject>(s: &S) -> Result<()> {
    let net = s.build(&s.weights()?)?;
    walk(&net, &s.input(None)?, |i, h, call| {
        let out = call.all(h)?;
        if out.dims() == h.dims() {
            Ok(out)
        } else {
            Err(broken(
                "a block keeps the shape",
                format!("block {i}: {:?} became {:?}", h.dims(), out.dims()),
            ))
        }
    })?;
    Ok(())
}

fn batch_size<S: Subject>(s: &S, net: &S::Net) -> Result<usize> {
    Ok(net.embed(&s.input(None)?)?.0.dim(0)?)
}

fn gates_of_one_are_the_full_net<S: Subject>(s: &S) -> Result<()> {
    let net = s.build(&s.weights()?)?;
    let input = s.input(None)?;
    let full = run(&net, &input, &Plan::full(s.depth()))?.output;
    let ones = Tensor::ones(
        (batch_size(s, &net)?, s.depth()),
        candle_core::DType::F32,
        &Device::Cpu,
    )?;
    let gated = run(&net, &input, &Plan::blend(&ones)?)?.output;
    same(
        "all gates 1 is the full net",
        "the output",
        &gated,
        &full,
        1e-5,
    )
}

fn gates_are_the_cut_net<S: Subject>(s: &S) -> Result<()> {
    let weights = s.weights()?;
    let net = s.build(&weights)?;
    let input = s.input(None)?;
    let batch = batch_size(s, &net)?;
    for kept in s.selections() {
        let cut = s.rebuild(&weights, &kept)?;
        let want = run(&cut, &input, &Plan::full(kept.len()))?.output;
        let skipped = run(&net, &input, &Plan::keep(s.depth(), &kept))?.output;
        same(
            "a skipped block is a cut block",
            &format!("{kept:?}"),
            &skipped,
            &want,
            1e-6,
        )?;
        let row: Vec<f32> = (0..s.depth())
            .map(|i| f32::from(u8::from(kept.contains(&i))))
            .collect();
        let mask = Tensor::new(row, &Device::Cpu)?
            .unsqueeze(0)?
            .repeat((batch, 1))?; // (B, depth)
        let gated = run(&net, &input, &Plan::blend(&mask)?)?.output;
        same(
            "gates 0/1 are the cut net",
            &format!("{kept:?}"),
            &gated,
            &want,
            1e-5,
        )?;
    }
    Ok(())
}

fn samples_do_not_mix<S: Subject>(s: &S) -> Result<()> {
    let net = s.build(&s.weights()?)?;
    let plan = Plan::full(s.depth());
    let together = run(&net, &s.input(None)?, &plan)?.output;
    for b in 0..batch_size(s, &net)? {
        let alone = run(&net, &s.input(Some(&[b]))?, &plan)?.output;
        same(
            "batched is single",
            &format!("sample {b}"),
            &together.narrow(0, b, 1)?,
            &alone,
            1e-5,
        )?;
    }
    Ok(())
}

fn loss(output: &Tensor) -> Result<Tensor> {
    // A fixed random weighting, so that no symmetry of the network hides a gradient.
    let weights =
        StepRng::new(7, 0, stream::HELD_OUT).normal(output.shape().clone(), output.device())?;
    Ok((output * weights)?.sum_all()?)
}

fn every_weight_has_a_gradient<S: Subject>(s: &S) -> Result<()> {
    let mut weights = s.weights()?;
    let vars = weights.make_trainable(|n| !s.is_fixed(n))?;
    let net = s.build(&weights)?;
    let output = run(&net, &s.input(None)?, &Plan::full(s.depth()))?.output;
    let grads = loss(&output)?.backward()?;
    const LAW: &str = "every trainable tensor has a gradient";
    for (name, var) in &vars {
        let Some(grad) = grads.get(var) else {
            return Err(broken(LAW, format!("`{name}` has none")));
        };
        let sum = grad.abs()?.sum_all()?.to_scalar::<f32>()?;
        if !sum.is_finite() || (sum == 0.0 && !s.may_have_zero_gradient(name)) {
            return Err(broken(LAW, format!("`{name}`: Σ|g| = {sum}")));
        }
    }
    Ok(())
}

fn detached_weights_record_nothing<S: Subject>(s: &S) -> Result<()> {
    let mut weights = s.weights()?;
    weights.make_trainable(|_| true)?;
    let net = s.build(&weights.detached())?;
    let output = run(&net, &s.input(None)?, &Plan::full(s.depth()))?.output;
    if output.track_op() {
        return Err(broken(
            "detached weights record nothing",
            "the output carries a graph",
        ));
    }
    Ok(())
}

fn exact_blend_is_the_plain_blend<S: Subject>(s: &S) -> Result<()> {
    const LAW: &str = "the exact blend is the plain blend";
    let mut weights = s.weights()?;
    let vars = weights.make_trainable(|n| !s.is_fixed(n))?;
    let (net, untracked) = (s.build(&weights)?, s.build(&weights.detached())?);
    let batch = batch_size(s, &net)?;
    let input = s.input(None)?;
    let mut rng = StepRng::new(11, 0, stream::MASK);
    let coin = rng.below(2, batch * s.depth());
    // Random masks, and the borders: everything kept, everything dropped.
    for values in [coin, vec![1; batch * s.depth()], vec![0; batch * s.depth()]] {
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        let mask = Var::from_tensor(&Tensor::from_vec(values, (batch, s.depth()), &Device::Cpu)?)?;
        let plan = Plan::blend(&mask)?;
        let plain = run(&net, &input, &plan)?.output;
        let exact = run_exact(&net, &untracked, &input, &plan)?.output;
        same(LAW, "the output", &exact, &plain, 1e-5)?;
        let (plain, exact) = (loss(&plain)?.backward()?, loss(&exact)?.backward()?);
        let all = vars
            .iter()
            .map(|(n, v)| (n.as_str(), v))
            .chain([("the mask", &mask)]);
        let largest = all
            .clone()
            .filter_map(|(_, v)| plain.get(v))
            .map(max_abs)
            .try_fold(0f32, |m, v| v.map(|v| m.max(v)))?;
        for (name, var) in all {
            // A block that no sample keeps has a zero gradient in the plain blend and none in the exact one.
            match (exact.get(var), plain.get(var)) {
                (Some(e), Some(p)) => {
                    let (size, diff) = (max_abs(p)?, max_abs(&(e - p)?)?);
                    let close = diff <= 1e-5 * size.max(1e-2 * largest);
                    if !(size.is_finite() && diff.is_finite() && close) {
                        return Err(broken(
                            LAW,
                            format!("the gradient of {name}, up to {size:e}, differs by {diff:e}"),
                        ));
                    }
                }
                (None, Some(p)) if max_abs(p)? == 0.0 => {}
                (None, None) => {}
                (e, _) => {
                    let side = if e.is_some() { "exact" } else { "plain" };
                    return Err(broken(
                        LAW,
                        format!("only the {side} blend has a gradient for {name}"),
                    ));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_largest_value_is_not_a_number_if_any_is() {
        let nan = f32::NAN;
        for values in [[nan, 1.0, 2.0], [1.0, nan, 2.0], [1.0, 2.0, nan]] {
            assert!(max_abs(&row(&values)).unwrap().is_nan(), "{values:?}");
        }
        assert_eq!(max_abs(&row(&[1.0, -3.0, 2.0])).unwrap(), 3.0);
        assert_eq!(
            max_abs(&row(&[f32::NEG_INFINITY, 1.0])).unwrap(),
            f32::INFINITY
        );
    }

    #[test]
    fn nothing_equals_values_that_are_not_finite() {
        let good = row(&[1.0, 2.0, 3.0]);
        assert!(same("law", "it", &good, &good, 0.0).is_ok());
        assert!(same("law", "it", &good, &row(&[1.0, 2.0, 3.1]), 1e-3).is_err());
        assert!(same("law", "it", &good, &row(&[1.0, 2.0]), 1e9).is_err());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in 0..3 {
                let mut values = [1.0, 2.0, 3.0];
                values[at] = bad;
                let bad = row(&values);
                for (a, b) in [(&good, &bad), (&bad, &good), (&bad, &bad)] {
                    let error = same("law", "it", a, b, 1e9).unwrap_err().to_string();
                    assert!(error.contains("not finite"), "{error}");
                }
            }
        }
    }
}
