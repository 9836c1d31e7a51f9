use candle_core::{DType, Device, Result, Tensor, Var, bail};

use super::{Check, label, random, repeats, values, worst};
use crate::update::{AdamW, Parameter, Scale, clip_on_device};
use crate::{Gradients, ops, recompute, record};

/// How a block keeps what its backward needs.
#[derive(Clone, Copy)]
enum Kept {
    InCandlesGraph,
    Recorded,
    Recomputed,
}

/// A block of a transformer that is recorded, and one that is computed twice, give the bits of one in candle's graph.
pub(super) fn blocks(dtype: DType) -> Check {
    let run = move |device: &Device| {
        let var = |shape: &[usize], seed, dtype| {
            Var::from_tensor(&random(shape, seed)?.to_device(device)?.to_dtype(dtype)?)
        };
        let (x, c) = (var(&[2, 5, 16], 1, dtype)?, var(&[2, 48], 2, dtype)?);
        let (w, bias) = (var(&[16, 16], 3, DType::F32)?, var(&[16], 4, DType::F32)?);
        let block = {
            let (w, bias) = (w.as_tensor().clone(), bias.as_tensor().clone());
            move |x: &Tensor, c: &Tensor| {
                let h = ops::layer_norm_modulate(x, c, 0, 1, 1e-6)?;
                ops::gated_residual(x, &ops::linear_gelu(&h, &w, &bias)?, c, 2)
            }
        };
        let two = |kept| {
            let mut h = x.as_tensor().clone();
            for _ in 0..2 {
                h = match kept {
                    Kept::InCandlesGraph => block(&h, &c)?,
                    Kept::Recorded => record(&h, &c, &block)?,
                    Kept::Recomputed => recompute(&h, &c, block.clone())?,
                };
            }
            Ok::<_, candle_core::Error>(h)
        };
        let gradients = |kept| {
            let mut sums = Gradients::new(&[&x, &c, &w, &bias]);
            let mut all = Vec::new();
            // A second piece of a batch adds to the sums of the first.
            for _ in 0..2 {
                let h = match kept {
                    Kept::Recorded => Gradients::recording(|| two(kept))?,
                    _ => two(kept)?,
                };
                sums.backward(&h.to_dtype(DType::F32)?.sqr()?.sum_all()?)?;
                all.push(h.detach());
            }
            all.extend(sums.sums()?);
            Ok::<_, candle_core::Error>(all)
        };
        let want = gradients(Kept::InCandlesGraph)?;
        for (i, grad) in want.iter().enumerate() {
            if values(grad)?.iter().all(|v| *v == 0.0) {
                bail!("{}: nothing but zeros", label(i));
            }
        }
        let recomputed = worst(&gradients(Kept::Recomputed)?, &want, 0.0)?;
        match recomputed.is_within() {
            true => worst(&gradients(Kept::Recorded)?, &want, 0.0),
            false => Ok(recomputed),
        }
    };
    Check {
        name: "blocks, recorded and recomputed".into(),
        dtype,
        run: Box::new(run),
    }
}

/// Gradients of several sizes, one of them more than a block takes.
fn gradients(device: &Device) -> Result<Vec<Tensor>> {
    let shapes: [&[usize]; 3] = [&[7], &[100, 100], &[33, 5]];
    let random = |(i, shape): (usize, &&[usize])| random(shape, i as u64)?.to_device(device);
    shapes.iter().enumerate().map(random).collect()
}

/// The norm and the factor, to f32's last digits; and NaN for a loss that is not finite.
pub(super) fn clipping() -> Check {
    let run = |device: &Device| {
        let clipped = |device: &Device, loss: f32, clip| {
            let loss = Tensor::new(loss, device)?;
            match clip_on_device(&gradients(device)?, &loss, clip)? {
                (norm, Scale::Device(scale)) => Ok([norm, scale]),
                (_, Scale::Host(_)) => bail!("the factor came to the host"),
            }
        };
        for (loss, clip) in [(f32::NAN, None), (f32::INFINITY, Some(1.0))] {
            let [_, scale] = clipped(device, loss, clip)?;
            if !scale.to_scalar::<f32>()?.is_nan() {
                bail!("a loss of {loss} gave the factor {scale}");
            }
        }
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for clip in [None, Some(1.0), Some(1e6)] {
            got.extend(clipped(device, 0.5, clip)?);
            want.extend(clipped(&Device::Cpu, 0.5, clip)?);
        }
        worst(&got, &want, 1e-6)
    };
    Check {
        name: "clipping".into(),
        dtype: DType::F32,
        run: Box::new(run),
    }
}

/// Three steps with a factor on the device, with and without an average; and one with NaN, which must write nothing.
pub(super) fn adamw() -> Check {
    let run = |device: &Device| {
        let adamw = AdamW {
            lr: 1e-2,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.1,
        };
        let moved = |device: &Device, steps: &[f32]| {
            let mut all = Vec::new();
            for (i, start) in gradients(device)?.iter().enumerate() {
                let mut p = Parameter::new(Var::from_tensor(&start.copy()?)?)?;
                if i == 1 {
                    p.average = None;
                }
                let grad = random(start.dims(), 10 + i as u64)?.to_device(device)?;
                for (t, &scale) in steps.iter().enumerate() {
                    let scale = Scale::Device(Tensor::new(scale, device)?);
                    adamw.step(&p, &grad, t as u64 + 1, &scale, 0.75)?;
                }
                all.extend([&p.var, &p.m, &p.v].map(|var| var.as_detached_tensor().copy()));
                all.extend(p.average.map(|average| average.as_detached_tensor().copy()));
            }
            all.into_iter().collect::<Result<Vec<_>>>()
        };
        let steps = [0.5, 1.0, 0.1];
        let got = moved(device, &steps)?;
        repeats(&got, &moved(device, &steps)?)?;
        // Last of all, so that the steps before it are the same.
        repeats(&got, &moved(device, &[0.5, 1.0, 0.1, f32::NAN])?)?;
        worst(&got, &moved(&Device::Cpu, &steps)?, 1e-6)
    };
    Check {
        name: "AdamW".into(),
        dtype: DType::F32,
        run: Box::new(run),
    }
}
