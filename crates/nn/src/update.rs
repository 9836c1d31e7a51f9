mod clip;

use candle_core::{Result, Tensor, Var, bail};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::gradients::mutate;
use crate::kernels::{GRAIN, simd};
use crate::ops::host;

pub use clip::{clip_on_device, sum_of_squares};

/// Settings of one AdamW step (Loshchilov & Hutter 2019, arXiv 1711.05101), as PyTorch applies them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// A parameter with what an optimizer keeps beside it. All four are contiguous f32 of one shape, and no two
/// share storage.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// The parameter itself.
    pub var: Var,
    /// First moment.
    pub m: Var,
    /// Second moment.
    pub v: Var,
    /// Exponential moving average of the parameter, if one is wanted.
    pub average: Option<Var>,
}

impl Parameter {
    /// Moments at 0, an average at the parameter.
    pub fn new(var: Var) -> Result<Self> {
        let zeros = var.zeros_like()?;
        Ok(Self {
            m: Var::from_tensor(&zeros)?,
            v: Var::from_tensor(&zeros)?,
            average: Some(Var::from_tensor(&var.as_detached_tensor())?),
            var,
        })
    }
}

/// What gradients are multiplied by before a step.
#[derive(Debug, Clone)]
pub enum Scale {
    /// A number that the host knows.
    Host(f64),
    /// An f32 scalar where the parameters are, as [`clip_on_device`] leaves it there: the host need not wait for it.
    Device(Tensor),
}

impl AdamW {
    /// One update in place, number `t` from 1. The gradient is multiplied by `grad_scale` first (clipping), and the
    /// average moves to the new value afterwards; on a CPU, and on a GPU with the feature `cuda`, all in one pass over the
    /// values. Where the scale is NaN, nothing is written.
    ///
    /// p ← p·(1 − lr·λ) − lr·m̂/(√v̂ + ε); average ← average + (1 − decay)·(p − average)
    ///
    /// The average is computed so because f32 rounds a decay of 0.9999 such that keeping and adding would miss a sum
    /// of 1, and the average would settle 1.7e-4 below a parameter that no longer moves.
    pub fn step(
        &self,
        at: &Parameter,
        grad: &Tensor,
        t: u64,
        grad_scale: &Scale,
        decay: f64,
    ) -> Result<()> {
        for (what, dims) in [
            ("gradient", grad.dims()),
            ("m", at.m.dims()),
            ("v", at.v.dims()),
            (
                "average",
                at.average.as_ref().map_or(at.var.dims(), |a| a.dims()),
            ),
        ] {
            // Values are paired one by one, so another size would be cut without a word.
            if dims != at.var.dims() {
                bail!("adamw: {what} {dims:?} of a parameter {:?}", at.var.dims());
            }
        }
        let pass = self.pass(t, grad_scale, decay);
        #[cfg(feature = "cuda")]
        if at.var.device().is_cuda() {
            return cuda::update::adamw(at, grad, grad_scale, &pass);
        }
        let scale = match grad_scale {
            Scale::Host(scale) => *scale,
            Scale::Device(scale) => f64::from(scale.to_scalar::<f32>()?),
        };
        if scale.is_nan() {
            return Ok(());
        }
        let Parameter { var, m, v, average } = at;
        if !var.device().is_cpu() {
            return self.step_composed(at, &(grad * scale)?, t, decay);
        }
        let pass = Pass {
            scale: scale as f32,
            ..pass
        };
        host!(grad => grad; mutate(var, |p| mutate(m, |m| mutate(v, |v| match average {
            None => {
                pass.over(p, grad, m, v);
                Ok(())
            }
            Some(average) => mutate(average, |average| {
                pass.over_with_average(p, grad, m, v, average);
                Ok(())
            }),
        }))))
    }

    /// The numbers of update `t`.
    fn pass(&self, t: u64, scale: &Scale, decay: f64) -> Pass {
        let (b1, b2) = self.betas;
        let (c1, c2) = (1.0 - b1.powf(t as f64), 1.0 - b2.powf(t as f64));
        Pass {
            m: (b1 as f32, (1.0 - b1) as f32),
            v: (b2 as f32, (1.0 - b2) as f32),
            scale: match scale {
                Scale::Host(scale) => *scale as f32,
                Scale::Device(_) => 1.0, // the kernel reads it where it is
            },
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            step: (self.lr / c1) as f32,
            root_c2: c2.sqrt() as f32,
            eps: self.eps as f32,
            share: (1.0 - decay) as f32,
        }
    }

    /// The same from candle's operations, with a gradient `g` that was multiplied already.
    fn step_composed(&self, at: &Parameter, g: &Tensor, t: u64, decay: f64) -> Result<()> {
        let (b1, b2) = self.betas;
        let (c1, c2) = (1.0 - b1.powf(t as f64), 1.0 - b2.powf(t as f64));
        let Parameter { var, m, v, average } = at;
        m.set(&((m.as_tensor() * b1)? + (g * (1.0 - b1))?)?)?;
        v.set(&((v.as_tensor() * b2)? + (g.sqr()? * (1.0 - b2))?)?)?;
        let denom = ((v.as_tensor().sqrt()? / c2.sqrt())? + self.eps)?;
        let update = (m.as_tensor() / c1)?.div(&denom)?;
        let kept = (var.as_tensor() * (1.0 - self.lr * self.weight_decay))?;
        var.set(&(kept - (update * self.lr)?)?)?;
        let Some(average) = average else {
            return Ok(());
        };
        let away = (var.as_tensor() - average.as_tensor())?;
        average.set(&(average.as_tensor() + (away * (1.0 - decay))?)?)
    }
}

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass {
    /// What is kept of a moment, and what is added to it.
    pub(crate) m: (f32, f32),
    pub(crate) v: (f32, f32),
    pub(crate) scale: f32,
    pub(crate) keep: f32,
    pub(crate) step: f32,
    pub(crate) root_c2: f32,
    pub(crate) eps: f32,
    pub(crate) share: f32,
}

impl Pass {
    /// Small parameters, which are most of a network's, stay on this thread: handing them out would take longer than
    /// the work.
    fn over(&self, p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        if p.len() <= GRAIN {
            return self.piece(p, grad, m, v);
        }
        let moments = m.par_chunks_mut(GRAIN).zip(v.par_chunks_mut(GRAIN));
        p.par_chunks_mut(GRAIN)
            .zip(grad.par_chunks(GRAIN))
            .zip(moments)
            .for_each(|((p, grad), (m, v))| self.piece(p, grad, m, v));
    }

    /// The same, and the average follows while the new values are at hand.
    fn over_with_average(
        &self,
        p: &mut [f32],
        grad: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        average: &mut [f32],
    ) {
        let both = |p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], a: &mut [f32]| {
            self.piece(p, grad, m, v);
            self.follow(a, p);
        };
        if p.len() <= GRAIN {
            return both(p, grad, m, v, average);
        }
        let moments = m.par_chunks_mut(GRAIN).zip(v.par_chunks_mut(GRAIN));
        p.par_chunks_mut(GRAIN)
            .zip(grad.par_chunks(GRAIN))
            .zip(moments.zip(average.par_chunks_mut(GRAIN)))
            .for_each(|((p, grad), ((m, v), average))| both(p, grad, m, v, average));
    }

    fn piece(&self, p: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        let n = p.len();
        let (grad, m, v) = (&grad[..n], &mut m[..n], &mut v[..n]);
        simd(
            #[inline(always)]
            || {
                for i in 0..n {
                    // Scaled before it is squared: a clipped 1e20 is an ordinary number, while the square of its
                    // scale alone would vanish in f32 and leave the second moment at 0.
                    let g = self.scale * grad[i];
                    m[i] = self.m.0 * m[i] + self.m.1 * g;
                    v[i] = self.v.0 * v[i] + self.v.1 * (g * g);
                    p[i] = self.keep * p[i]
                        - self.step * m[i] / (v[i].sqrt() / self.root_c2 + self.eps);
                }
            },
        );
    }

    fn follow(&self, average: &mut [f32], p: &[f32]) {
        simd(
            #[inline(always)]
            || {
                for (a, p) in average.iter_mut().zip(p) {
                    *a += self.share * (p - *a);
                }
            },
        );
    }
}

/// Calls `f` on matching chunks. Small tensors, which are most of a network's, stay on this thread: handing
/// them out would take longer than the work.
pub(crate) fn in_chunks(a: &mut [f32], x: &[f32], f: impl Fn(&mut [f32], &[f32]) + Sync) {
    if a.len() <= GRAIN {
        f(a, x);
    } else {
        a.par_chunks_mut(GRAIN)
            .zip(x.par_chunks(GRAIN))
            .for_each(|(a, x)| f(a, x));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn two_steps_agree_with_the_formula_in_f64() {
        let adamw = AdamW {
            lr: 1e-2,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.1,
        };
        let start = [0.5f32, -2.0, 1e-3];
        let grads = [[0.1f32, -3.0, 1e-6], [0.2, 1.0, -1e-6]];
        let dev = &Device::Cpu;
        let var = Var::from_tensor(&Tensor::new(&start, dev).unwrap()).unwrap();
        let p = Parameter::new(var).unwrap();
        let (clip, decay) = (0.5, 0.75);
        for (t, g) in grads.iter().enumerate() {
            let g = Tensor::new(g, dev).unwrap();
            adamw
                .step(&p, &g, t as u64 + 1, &Scale::Host(clip), decay)
                .unwrap();
        }
        let got = p.var.to_vec1::<f32>().unwrap();
        let averages = p.average.as_ref().unwrap().to_vec1::<f32>().unwrap();
        for i in 0..3 {
            let (mut w, mut m, mut v) = (f64::from(start[i]), 0.0, 0.0);
            let mut average = w;
            for (t, g) in grads.iter().enumerate() {
                let g = f64::from(g[i]) * clip;
                m = 0.9 * m + 0.1 * g;
                v = 0.999 * v + 0.001 * g * g;
                let (mh, vh) = (
                    m / (1.0 - 0.9f64.powi(t as i32 + 1)),
                    v / (1.0 - 0.999f64.powi(t as i32 + 1)),
                );
                w = w * (1.0 - 1e-2 * 0.1) - 1e-2 * mh / (vh.sqrt() + 1e-8);
                average = decay * average + (1.0 - decay) * w;
            }
            let apart = (f64::from(averages[i]) - average).abs();
            assert!(
                apart < 1e-6 * average.abs().max(1e-3),
                "{i}: {} {average}",
                averages[i]
            );
            assert!(
                (f64::from(got[i]) - w).abs() < 1e-6 * w.abs().max(1e-3),
                "{i}: {} {w}",
                got[i]
            );
        }
    }

    #[test]
    fn a_huge_gradient_that_was_clipped_moves_like_an_ordinary_one() {
        let adamw = AdamW {
            lr: 1e-2,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
        };
        let moved = |size: f32, scale: f64| {
            let p = Parameter::new(Var::zeros(2, DType::F32, &Device::Cpu).unwrap()).unwrap();
            let grad = Tensor::new(&[size, -0.5 * size], &Device::Cpu).unwrap();
            adamw.step(&p, &grad, 1, &Scale::Host(scale), 0.5).unwrap();
            p.var.to_vec1::<f32>().unwrap()
        };
        let (ordinary, huge) = (moved(1.0, 1.0), moved(1e25, 1e-25));
        for (a, b) in ordinary.iter().zip(&huge) {
            assert!((a - b).abs() < 1e-8, "{ordinary:?} {huge:?}");
        }
    }

    #[test]
    fn the_average_of_a_resting_parameter_is_that_parameter() {
        let adamw = AdamW {
            lr: 0.0,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
        };
        let start = Tensor::new(&[0.3f32, -7.0], &Device::Cpu).unwrap();
        let p = Parameter::new(Var::from_tensor(&start).unwrap()).unwrap();
        let zero = start.zeros_like().unwrap();
        for t in 0..20_000 {
            adamw
                .step(&p, &zero, t + 1, &Scale::Host(1.0), 0.9999)
                .unwrap();
        }
        let average = p.average.as_ref().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(average, start.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn the_composition_takes_the_same_step() {
        let (dev, adamw) = (
            &Device::Cpu,
            AdamW {
                lr: 1e-2,
                betas: (0.9, 0.999),
                eps: 1e-8,
                weight_decay: 0.1,
            },
        );
        let start = Tensor::new(&[0.5f32, -2.0, 1e-3], dev).unwrap();
        let grad = Tensor::new(&[0.1f32, -3.0, 1e-6], dev).unwrap();
        let parameter =
            || Parameter::new(Var::from_tensor(&start.copy().unwrap()).unwrap()).unwrap();
        let (fused, composed) = (parameter(), parameter());
        for t in 1..4 {
            adamw
                .step(&fused, &grad, t, &Scale::Host(0.5), 0.75)
                .unwrap();
            adamw
                .step_composed(&composed, &(&grad * 0.5).unwrap(), t, 0.75)
                .unwrap();
        }
        let all = |p: &Parameter| {
            [&p.var, &p.m, &p.v, p.average.as_ref().unwrap()].map(|t| t.to_vec1::<f32>().unwrap())
        };
        for (a, b) in all(&fused)
            .iter()
            .flatten()
            .zip(all(&composed).iter().flatten())
        {
            assert!((a - b).abs() <= 1e-6 * a.abs(), "{a} {b}");
        }
    }

    #[test]
    fn operands_of_other_shapes_are_refused() {
        let t = |n: usize| Var::zeros(n, DType::F32, &Device::Cpu).unwrap();
        let adamw = AdamW {
            lr: 1e-2,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
        };
        let one = Scale::Host(1.0);
        let whole = Parameter::new(t(3)).unwrap();
        let error = adamw
            .step(&whole, t(2).as_tensor(), 1, &one, 0.5)
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("gradient [2] of a parameter [3]"),
            "{error}"
        );
        let mixed = Parameter {
            average: Some(t(4)),
            ..whole
        };
        assert!(adamw.step(&mixed, t(3).as_tensor(), 1, &one, 0.5).is_err());
    }
}
