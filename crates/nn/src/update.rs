use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var, bail};
use rayon::prelude::*;

use crate::kernels::{GRAIN, simd};

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

impl AdamW {
    /// One update of `param` in place. `m` and `v` are its moments, `t` counts updates from 1, and the
    /// gradient is multiplied by `grad_scale` first (clipping).
    ///
    /// p ← p·(1 − lr·λ) − lr·m̂/(√v̂ + ε)
    pub fn step(&self, param: &Var, grad: &Tensor, m: &Var, v: &Var, t: u64, grad_scale: f64) -> Result<()> {
        let (b1, b2) = self.betas;
        let t = t as i32;
        let (c1, c2) = (1.0 - b1.powi(t), 1.0 - b2.powi(t));
        if !param.device().is_cpu() {
            let g = (grad * grad_scale)?;
            m.set(&((m.as_tensor() * b1)? + (&g * (1.0 - b1))?)?)?;
            v.set(&((v.as_tensor() * b2)? + (g.sqr()? * (1.0 - b2))?)?)?;
            let denom = ((v.as_tensor() / c2)?.sqrt()? + self.eps)?;
            let update = (m.as_tensor() / c1)?.div(&denom)?;
            return param.set(&((param.as_tensor() * (1.0 - self.lr * self.weight_decay))? - (update * self.lr)?)?);
        }
        let grad = grad.contiguous()?;
        m.inplace_op2(&grad, &Lerp { keep: b1 as f32, add: ((1.0 - b1) * grad_scale) as f32, square: false })?;
        v.inplace_op2(
            &grad,
            &Lerp { keep: b2 as f32, add: ((1.0 - b2) * grad_scale * grad_scale) as f32, square: true },
        )?;
        let apply = Apply {
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            step: (self.lr / c1) as f32,
            root_c2: c2.sqrt() as f32,
            eps: self.eps as f32,
        };
        param.inplace_op3(m, v, &apply)
    }
}

/// average ← decay·average + (1 − decay)·param, in place.
pub fn ema(average: &Tensor, param: &Tensor, decay: f64) -> Result<()> {
    average.inplace_op2(&param.contiguous()?, &Lerp { keep: decay as f32, add: (1.0 - decay) as f32, square: false })
}

fn read<'a>(s: &'a CpuStorage, l: &Layout) -> Result<&'a [f32]> {
    match l.contiguous_offsets() {
        Some((start, end)) => Ok(&s.as_slice::<f32>()?[start..end]),
        None => bail!("an update needs contiguous operands"),
    }
}

fn write<'a>(s: &'a mut CpuStorage, l: &Layout) -> Result<&'a mut [f32]> {
    match (s, l.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("an update needs a contiguous f32 parameter"),
    }
}

/// a ← keep·a + add·x, or x² instead of x.
struct Lerp {
    keep: f32,
    add: f32,
    square: bool,
}

impl InplaceOp2 for Lerp {
    fn name(&self) -> &'static str {
        "lerp"
    }

    fn cpu_fwd(&self, a: &mut CpuStorage, al: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        let (a, x) = (write(a, al)?, read(x, xl)?);
        let (keep, add) = (self.keep, self.add);
        a.par_chunks_mut(GRAIN).zip(x.par_chunks(GRAIN)).for_each(|(a, x)| {
            simd(#[inline(always)]
            || {
                if self.square {
                    a.iter_mut().zip(x).for_each(|(a, x)| *a = keep * *a + add * x * x);
                } else {
                    a.iter_mut().zip(x).for_each(|(a, x)| *a = keep * *a + add * x);
                }
            });
        });
        Ok(())
    }
}

/// p ← keep·p − step·m/(√v/√c₂ + ε).
struct Apply {
    keep: f32,
    step: f32,
    root_c2: f32,
    eps: f32,
}

impl InplaceOp3 for Apply {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        pl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<()> {
        let (p, m, v) = (write(p, pl)?, read(m, ml)?, read(v, vl)?);
        let Self { keep, step, root_c2, eps } = *self;
        p.par_chunks_mut(GRAIN).zip(m.par_chunks(GRAIN)).zip(v.par_chunks(GRAIN)).for_each(|((p, m), v)| {
            simd(#[inline(always)]
            || {
                for i in 0..p.len() {
                    p[i] = keep * p[i] - step * m[i] / (v[i].sqrt() / root_c2 + eps);
                }
            });
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn two_steps_agree_with_the_formula_in_f64() {
        let adamw = AdamW { lr: 1e-2, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.1 };
        let start = [0.5f32, -2.0, 1e-3];
        let grads = [[0.1f32, -3.0, 1e-6], [0.2, 1.0, -1e-6]];
        let dev = &Device::Cpu;
        let var = |t: &[f32]| Var::from_tensor(&Tensor::new(t, dev).unwrap()).unwrap();
        let (p, m, v) = (var(&start), var(&[0.0; 3]), var(&[0.0; 3]));
        let clip = 0.5;
        for (t, g) in grads.iter().enumerate() {
            adamw.step(&p, &Tensor::new(g, dev).unwrap(), &m, &v, t as u64 + 1, clip).unwrap();
        }
        let got = p.to_vec1::<f32>().unwrap();
        for i in 0..3 {
            let (mut w, mut m, mut v) = (f64::from(start[i]), 0.0, 0.0);
            for (t, g) in grads.iter().enumerate() {
                let g = f64::from(g[i]) * clip;
                m = 0.9 * m + 0.1 * g;
                v = 0.999 * v + 0.001 * g * g;
                let (mh, vh) = (m / (1.0 - 0.9f64.powi(t as i32 + 1)), v / (1.0 - 0.999f64.powi(t as i32 + 1)));
                w = w * (1.0 - 1e-2 * 0.1) - 1e-2 * mh / (vh.sqrt() + 1e-8);
            }
            assert!((f64::from(got[i]) - w).abs() < 1e-6 * w.abs().max(1e-3), "{i}: {} {w}", got[i]);
        }
    }

    #[test]
    fn ema_moves_by_one_minus_decay() {
        let a = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        ema(&a, &Tensor::new(&[3f32, 2.0], &Device::Cpu).unwrap(), 0.75).unwrap();
        assert_eq!(a.to_vec1::<f32>().unwrap(), [1.5, 2.0]);
    }
}
