use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Storage, Tensor, Var, bail};
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
    pub fn step(
        &self,
        param: &Var,
        grad: &Tensor,
        m: &Var,
        v: &Var,
        t: u64,
        grad_scale: f64,
    ) -> Result<()> {
        let (b1, b2) = self.betas;
        let (c1, c2) = (1.0 - b1.powf(t as f64), 1.0 - b2.powf(t as f64));
        if !param.device().is_cpu() {
            let g = (grad * grad_scale)?;
            m.set(&((m.as_tensor() * b1)? + (&g * (1.0 - b1))?)?)?;
            v.set(&((v.as_tensor() * b2)? + (g.sqr()? * (1.0 - b2))?)?)?;
            let denom = ((v.as_tensor().sqrt()? / c2.sqrt())? + self.eps)?;
            let update = (m.as_tensor() / c1)?.div(&denom)?;
            let kept = (param.as_tensor() * (1.0 - self.lr * self.weight_decay))?;
            return param.set(&(kept - (update * self.lr)?)?);
        }
        let grad = grad.contiguous()?;
        // The gradient is scaled before it is squared: a clipped 1e20 is an ordinary number, while the
        // square of its scale alone would vanish in f32 and leave the second moment at 0.
        let scale = grad_scale as f32;
        m.inplace_op2(
            &grad,
            &Moment {
                keep: b1 as f32,
                add: (1.0 - b1) as f32,
                scale,
                square: false,
            },
        )?;
        v.inplace_op2(
            &grad,
            &Moment {
                keep: b2 as f32,
                add: (1.0 - b2) as f32,
                scale,
                square: true,
            },
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
///
/// Computed as average + (1 − decay)·(param − average): f32 rounds a decay of 0.9999 such that keeping and
/// adding would miss a sum of 1, and the average would settle 1.7e-4 below a parameter that no longer moves.
pub fn ema(average: &Tensor, param: &Tensor, decay: f64) -> Result<()> {
    if !average.device().is_cpu() {
        let new = (average + ((param - average)? * (1.0 - decay))?)?;
        return average.flatten_all()?.slice_set(&new.flatten_all()?, 0, 0);
    }
    average.inplace_op2(
        &param.contiguous()?,
        &Approach {
            share: (1.0 - decay) as f32,
        },
    )
}

/// Σ tᵢ² over an f32 tensor, added up in f64; the same whatever the number of threads.
pub fn sum_of_squares(t: &Tensor) -> Result<f64> {
    if !t.device().is_cpu() {
        return t
            .sqr()?
            .sum_all()?
            .to_dtype(candle_core::DType::F64)?
            .to_scalar::<f64>();
    }
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("a tensor of the CPU is stored elsewhere")
    };
    let values = read(storage, layout)?;
    if values.len() <= GRAIN {
        return Ok(squares(values));
    }
    // Collected first: the order of the addition must not depend on which task ends when.
    let sums: Vec<f64> = values.par_chunks(GRAIN).map(squares).collect();
    Ok(sums.iter().sum())
}

fn squares(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    simd(
        #[inline(always)]
        || {
            let mut acc = [0f64; LANES];
            let chunks = values.chunks_exact(LANES);
            let tail: f64 = chunks
                .remainder()
                .iter()
                .map(|x| f64::from(*x) * f64::from(*x))
                .sum();
            for c in chunks {
                for l in 0..LANES {
                    acc[l] += f64::from(c[l]) * f64::from(c[l]);
                }
            }
            acc.iter().sum::<f64>() + tail
        },
    )
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

/// Operands are paired value by value, so a gradient of another size would be cut without a word.
fn same_shape(op: &'static str, a: &Layout, b: &Layout) -> Result<()> {
    if a.dims() == b.dims() {
        return Ok(());
    }
    bail!("{op}: shapes {:?} and {:?} differ", a.dims(), b.dims())
}

/// Calls `f` on matching chunks. Small tensors, which are most of a network's, stay on this thread: handing
/// them out would take longer than the work.
fn in_chunks(a: &mut [f32], x: &[f32], f: impl Fn(&mut [f32], &[f32]) + Sync) {
    if a.len() <= GRAIN {
        f(a, x);
    } else {
        a.par_chunks_mut(GRAIN)
            .zip(x.par_chunks(GRAIN))
            .for_each(|(a, x)| f(a, x));
    }
}

/// a ← keep·a + add·(scale·x), or (scale·x)² instead of scale·x.
struct Moment {
    keep: f32,
    add: f32,
    scale: f32,
    square: bool,
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, a: &mut CpuStorage, al: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        same_shape(InplaceOp2::name(self), al, xl)?;
        let Self {
            keep,
            add,
            scale,
            square,
        } = *self;
        in_chunks(write(a, al)?, read(x, xl)?, |a, x| {
            simd(
                #[inline(always)]
                || {
                    if square {
                        a.iter_mut().zip(x).for_each(|(a, x)| {
                            let g = scale * x;
                            *a = keep * *a + add * (g * g);
                        });
                    } else {
                        a.iter_mut()
                            .zip(x)
                            .for_each(|(a, x)| *a = keep * *a + add * (scale * x));
                    }
                },
            );
        });
        Ok(())
    }
}

/// a ← a + share·(x − a).
struct Approach {
    share: f32,
}

impl InplaceOp2 for Approach {
    fn name(&self) -> &'static str {
        "ema"
    }

    fn cpu_fwd(&self, a: &mut CpuStorage, al: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        same_shape(InplaceOp2::name(self), al, xl)?;
        let share = self.share;
        in_chunks(write(a, al)?, read(x, xl)?, |a, x| {
            simd(
                #[inline(always)]
                || {
                    for (a, x) in a.iter_mut().zip(x) {
                        *a += share * (x - *a);
                    }
                },
            );
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

impl Apply {
    fn run(&self, p: &mut [f32], m: &[f32], v: &[f32]) {
        let Self {
            keep,
            step,
            root_c2,
            eps,
        } = *self;
        simd(
            #[inline(always)]
            || {
                for ((p, m), v) in p.iter_mut().zip(m).zip(v) {
                    *p = keep * *p - step * m / (v.sqrt() / root_c2 + eps);
                }
            },
        );
    }
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
        same_shape(InplaceOp3::name(self), pl, ml)?;
        same_shape(InplaceOp3::name(self), pl, vl)?;
        let (p, m, v) = (write(p, pl)?, read(m, ml)?, read(v, vl)?);
        if p.len() <= GRAIN {
            self.run(p, m, v);
        } else {
            let moments = m.par_chunks(GRAIN).zip(v.par_chunks(GRAIN));
            p.par_chunks_mut(GRAIN)
                .zip(moments)
                .for_each(|(p, (m, v))| self.run(p, m, v));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

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
        let var = |t: &[f32]| Var::from_tensor(&Tensor::new(t, dev).unwrap()).unwrap();
        let (p, m, v) = (var(&start), var(&[0.0; 3]), var(&[0.0; 3]));
        let clip = 0.5;
        for (t, g) in grads.iter().enumerate() {
            adamw
                .step(
                    &p,
                    &Tensor::new(g, dev).unwrap(),
                    &m,
                    &v,
                    t as u64 + 1,
                    clip,
                )
                .unwrap();
        }
        let got = p.to_vec1::<f32>().unwrap();
        for i in 0..3 {
            let (mut w, mut m, mut v) = (f64::from(start[i]), 0.0, 0.0);
            for (t, g) in grads.iter().enumerate() {
                let g = f64::from(g[i]) * clip;
                m = 0.9 * m + 0.1 * g;
                v = 0.999 * v + 0.001 * g * g;
                let (mh, vh) = (
                    m / (1.0 - 0.9f64.powi(t as i32 + 1)),
                    v / (1.0 - 0.999f64.powi(t as i32 + 1)),
                );
                w = w * (1.0 - 1e-2 * 0.1) - 1e-2 * mh / (vh.sqrt() + 1e-8);
            }
            assert!(
                (f64::from(got[i]) - w).abs() < 1e-6 * w.abs().max(1e-3),
                "{i}: {} {w}",
                got[i]
            );
        }
    }

    #[test]
    fn ema_moves_by_one_minus_decay() {
        let a = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        ema(&a, &Tensor::new(&[3f32, 2.0], &Device::Cpu).unwrap(), 0.75).unwrap();
        assert_eq!(a.to_vec1::<f32>().unwrap(), [1.5, 2.0]);
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
            let var =
                || Var::from_tensor(&Tensor::new(&[0f32, 0.0], &Device::Cpu).unwrap()).unwrap();
            let (p, m, v) = (var(), var(), var());
            let grad = Tensor::new(&[size, -0.5 * size], &Device::Cpu).unwrap();
            adamw.step(&p, &grad, &m, &v, 1, scale).unwrap();
            p.to_vec1::<f32>().unwrap()
        };
        let (ordinary, huge) = (moved(1.0, 1.0), moved(1e25, 1e-25));
        for (a, b) in ordinary.iter().zip(&huge) {
            assert!((a - b).abs() < 1e-8, "{ordinary:?} {huge:?}");
        }
    }

    #[test]
    fn the_average_of_a_resting_parameter_is_that_parameter() {
        let a = Tensor::new(&[0.3f32, -7.0], &Device::Cpu).unwrap();
        let p = a.copy().unwrap();
        for _ in 0..20_000 {
            ema(&a, &p, 0.9999).unwrap();
        }
        assert_eq!(a.to_vec1::<f32>().unwrap(), p.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn sums_of_squares_are_exact_to_f64_and_do_not_depend_on_threads() {
        let values: Vec<f32> = (0..3 * GRAIN)
            .map(|i| (i as f32 * 0.37).sin() * 1e3)
            .collect();
        let want: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let t = Tensor::from_vec(values, (4, 3 * GRAIN / 4), &Device::Cpu).unwrap();
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| sum_of_squares(&t).unwrap())
        };
        let got = of(1);
        assert!((got - want).abs() < 1e-12 * want, "{got} {want}");
        assert_eq!(got.to_bits(), of(3).to_bits());
        // Gradients may come transposed.
        assert!((sum_of_squares(&t.t().unwrap()).unwrap() - want).abs() < 1e-12 * want);
        let nan = Tensor::new(&[1f32, f32::NAN], &Device::Cpu).unwrap();
        assert!(sum_of_squares(&nan).unwrap().is_nan());
    }

    #[test]
    fn operands_of_other_shapes_are_refused() {
        let t = |n: usize| Var::zeros(n, candle_core::DType::F32, &Device::Cpu).unwrap();
        let adamw = AdamW {
            lr: 1e-2,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
        };
        let error = adamw
            .step(&t(3), t(2).as_tensor(), &t(3), &t(3), 1, 1.0)
            .unwrap_err();
        assert!(error.to_string().contains("[3] and [2]"), "{error}");
        assert!(ema(&t(3), &t(4), 0.5).is_err());
    }
}
