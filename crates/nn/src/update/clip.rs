use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::Scale;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::kernels::{GRAIN, simd};
use crate::ops::host;

/// Norm √Σ gᵢ² over all of `grads` (f32), and the factor that clips it to `clip` as PyTorch's `clip_grad_norm_` does,
/// min(1, clip/(norm + 1e-6)): NaN where the norm or `loss` (a scalar) is not finite. Both are f32 scalars on the device
/// of the gradients; on a GPU nothing waits for them, so a training loop may go on and read them later.
///
/// Squares are added up in f64, in an order that only the sizes fix.
pub fn clip_on_device(
    grads: &[Tensor],
    loss: &Tensor,
    clip: Option<f64>,
) -> Result<(Tensor, Scale)> {
    if loss.elem_count() != 1 {
        bail!("clipping: the loss is {:?}, expected a scalar", loss.dims());
    }
    let Some(first) = grads.first() else {
        bail!("clipping: there is no gradient")
    };
    let loss = loss.detach().to_dtype(DType::F32)?.reshape(())?;
    #[cfg(feature = "cuda")]
    if first.device().is_cuda() {
        let (norm, scale) =
            cuda::update::clip(&cuda::update::partial_squares(grads)?, &loss, clip)?;
        return Ok((norm, Scale::Device(scale)));
    }
    let mut squares = 0.0;
    for grad in grads {
        squares += sum_of_squares(grad)?;
    }
    let norm = squares.sqrt();
    let finite = norm.is_finite() && loss.to_scalar::<f32>()?.is_finite();
    let scale = match (finite, clip) {
        (false, _) => f64::NAN,
        (true, None) => 1.0,
        (true, Some(clip)) => (clip / (norm + 1e-6)).min(1.0),
    };
    let at = |value: f64| Tensor::new(value as f32, first.device());
    Ok((at(norm)?, Scale::Device(at(scale)?)))
}

/// Σ tᵢ² over an f32 tensor, added up in f64; the same whatever the number of threads.
pub fn sum_of_squares(t: &Tensor) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        let partial = cuda::update::partial_squares(std::slice::from_ref(t))?;
        return Ok(partial.to_vec1::<f64>()?.iter().sum());
    }
    if !t.device().is_cpu() {
        return t.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
    }
    host!(t => values; Ok(sum_of(values)))
}

fn sum_of(values: &[f32]) -> f64 {
    if values.len() <= GRAIN {
        return squares(values);
    }
    // Collected first: the order of the addition must not depend on which task ends when.
    let sums: Vec<f64> = values.par_chunks(GRAIN).map(squares).collect();
    sums.iter().sum()
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::update::{AdamW, Parameter};

    #[test]
    fn clipping_scales_to_the_norm_and_a_step_without_a_number_writes_nothing() {
        let dev = &Device::Cpu;
        let scalar = |t: &Tensor| t.to_scalar::<f32>().unwrap();
        let grads = [
            Tensor::new(&[3f32, 0.0], dev).unwrap(),
            Tensor::new(&[[4f32]], dev).unwrap(),
        ];
        let clipped = |loss: f32, clip| {
            let loss = Tensor::new(loss, dev).unwrap();
            match clip_on_device(&grads, &loss, clip).unwrap() {
                (norm, Scale::Device(scale)) => (scalar(&norm), scalar(&scale)),
                (_, Scale::Host(scale)) => panic!("{scale} on the host"),
            }
        };
        let (norm, scale) = clipped(0.0, Some(1.0));
        assert_eq!(norm, 5.0);
        assert!((scale - 0.2).abs() < 1e-6, "{scale}");
        assert_eq!(clipped(0.0, Some(10.0)).1, 1.0);
        assert_eq!(clipped(0.0, None).1, 1.0);
        assert!(clipped(f32::NAN, None).1.is_nan());
        assert!(clipped(f32::INFINITY, Some(1.0)).1.is_nan());

        let adamw = AdamW {
            lr: 1e-2,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.1,
        };
        let p = Parameter::new(Var::ones(2, DType::F32, dev).unwrap()).unwrap();
        let nan = Scale::Device(Tensor::new(f32::NAN, dev).unwrap());
        adamw.step(&p, &grads[0], 1, &nan, 0.5).unwrap();
        for (values, unchanged) in [(&p.var, 1.0), (&p.m, 0.0), (&p.v, 0.0)] {
            assert_eq!(values.to_vec1::<f32>().unwrap(), [unchanged; 2]);
        }
        // The same scale moves the same whether the host knows it or not.
        let q = Parameter::new(Var::ones(2, DType::F32, dev).unwrap()).unwrap();
        let half = Scale::Device(Tensor::new(0.5f32, dev).unwrap());
        adamw.step(&p, &grads[0], 1, &half, 0.5).unwrap();
        adamw
            .step(&q, &grads[0], 1, &Scale::Host(0.5), 0.5)
            .unwrap();
        let (p, q) = (
            p.var.to_vec1::<f32>().unwrap(),
            q.var.to_vec1::<f32>().unwrap(),
        );
        assert!(p[0] < 1.0);
        assert_eq!(p, q);
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
}
