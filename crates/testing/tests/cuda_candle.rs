//! candle's own operations on the CUDA device against the CPU, on the emulator of `xtask/cuda/emulator`
//! as on a GPU: before one asks whether our kernels are right, what they stand on has to be.
//!
//! Where there is no device the tests say so and pass, unless `TINYFUSION_NEED_CUDA=1` is set.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stdout)] // says what it skips

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

/// The device, or `None` where there is none and none is demanded.
fn cuda() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("TINYFUSION_NEED_CUDA").is_some_and(|v| v == "1") => {
            panic!("TINYFUSION_NEED_CUDA=1, but no CUDA device: {error}")
        }
        Err(error) => {
            println!("skipped, no CUDA device: {error}");
            None
        }
    }
}

/// Numbers in about (-2, 2) that no two elements of a test share, the same on every device.
fn values(shape: impl Into<Shape>, seed: u64) -> Result<Tensor> {
    let shape = shape.into();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Largest difference between two tensors, as a part of the largest value of `expected`.
fn discrepancy(expected: &Tensor, found: &Tensor) -> Result<f64> {
    assert_eq!(expected.shape(), found.shape());
    let flat = |t: &Tensor| -> Result<Vec<f64>> {
        t.to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1()
    };
    let (expected, found) = (flat(expected)?, flat(found)?);
    let scale = expected.iter().fold(0f64, |m, v| m.max(v.abs())).max(1e-30);
    let worst = expected.iter().zip(&found).map(|(e, f)| (e - f).abs());
    // A NaN must not get lost in `max`.
    Ok(worst.fold(0f64, |m, d| if d.is_nan() { d } else { m.max(d) }) / scale)
}

/// Runs `f` on the CPU in f32 and on the device in `dtype`; the inputs are rounded to `dtype` for both.
fn agree(
    device: &Device,
    name: &str,
    dtype: DType,
    tolerance: f64,
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let rounded: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_dtype(dtype)?.to_dtype(DType::F32))
        .collect::<Result<_>>()?;
    let there: Vec<Tensor> = rounded
        .iter()
        .map(|t| t.to_device(device)?.to_dtype(dtype))
        .collect::<Result<_>>()?;
    let worst = discrepancy(&f(&rounded)?, &f(&there)?)?;
    assert!(
        worst <= tolerance,
        "{name} in {dtype:?}: differs by {worst:.2e}, allowed {tolerance:.0e}"
    );
    Ok(())
}

/// Over the last dimension, of parts that have gradients.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let last = x.rank() - 1;
    let exp = x.broadcast_sub(&x.max_keepdim(last)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(last)?)
}

/// Both precisions, with what rounding to each leaves.
fn agree_in_both(
    device: &Device,
    name: &str,
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    agree(device, name, DType::F32, 1e-5, inputs, &f)?;
    agree(device, name, DType::BF16, 2e-2, inputs, &f)
}

#[test]
fn elementwise() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    // 1 and 7 are below the width of a vectorised load, 1000 is no multiple of a block.
    for n in [1, 7, 1000, 4099] {
        let pair = [values(n, 1)?, values(n, 2)?];
        let check = |name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            agree_in_both(&device, name, &pair, f)
        };
        check("add", &|t| &t[0] + &t[1])?;
        check("sub", &|t| &t[0] - &t[1])?;
        check("mul", &|t| &t[0] * &t[1])?;
        check("div", &|t| &t[0] / t[1].abs()?.affine(1.0, 0.5)?)?;
        check("maximum", &|t| t[0].maximum(&t[1]))?;
        check("minimum", &|t| t[0].minimum(&t[1]))?;
        check("affine", &|t| t[0].affine(1.5, -0.25))?;
        check("exp", &|t| t[0].exp())?;
        check("log", &|t| t[0].abs()?.affine(1.0, 0.5)?.log())?;
        check("sqrt", &|t| t[0].abs()?.sqrt())?;
        check("sqr", &|t| t[0].sqr())?;
        check("recip", &|t| t[0].abs()?.affine(1.0, 0.5)?.recip())?;
        check("sin", &|t| t[0].sin())?;
        check("cos", &|t| t[0].cos())?;
        check("tanh", &|t| t[0].tanh())?;
        check("gelu", &|t| t[0].gelu())?;
        check("gelu_erf", &|t| t[0].gelu_erf())?;
        check("silu", &|t| t[0].silu())?;
        check("powf", &|t| t[0].abs()?.powf(1.5))?;
        check("where", &|t| t[0].gt(&t[1])?.where_cond(&t[0], &t[1]))?;
        check("compare", &|t| t[0].lt(&t[1])?.to_dtype(DType::F32))?;
    }
    Ok(())
}

#[test]
fn layouts() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let inputs = [values((3, 5, 7), 3)?, values((3, 5, 7), 4)?];
    let check = |name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        agree_in_both(&device, name, &inputs, f)
    };
    check("transpose", &|t| t[0].transpose(0, 2)?.contiguous())?;
    check("add transposed", &|t| {
        t[0].transpose(0, 2)? + t[1].transpose(0, 2)?.contiguous()?
    })?;
    check("narrow", &|t| t[0].narrow(1, 1, 3)?.contiguous())?;
    check("narrow of the last", &|t| {
        t[0].narrow(2, 2, 4)?.affine(2.0, 0.0)
    })?;
    check("cat 0", &|t| Tensor::cat(&[&t[0], &t[1]], 0))?;
    check("cat 2", &|t| Tensor::cat(&[&t[0], &t[1]], 2))?;
    check("stack", &|t| Tensor::stack(&[&t[0], &t[1]], 1))?;
    check("broadcast", &|t| t[0].broadcast_mul(&t[1].narrow(1, 0, 1)?))?;
    check("expand", &|t| {
        t[0].narrow(0, 0, 1)?.expand((4, 5, 7))?.contiguous()
    })?;
    check("copy into", &|t| {
        t[0].slice_assign(&[0..3, 1..3, 0..7], &t[1].narrow(1, 0, 2)?)
    })?;
    check("pad", &|t| t[0].pad_with_zeros(1, 2, 1))
}

#[test]
fn reductions() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    // Below a warp, beyond a block of 1024, and of neither size a multiple.
    for (rows, columns) in [(1, 1), (3, 5), (5, 24), (2, 72), (7, 1152), (3, 2500)] {
        let input = [values((rows, columns), 5)?];
        let check = |name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            agree_in_both(&device, &format!("{name} of {rows}x{columns}"), &input, f)
        };
        check("sum of rows", &|t| t[0].sum(1))?;
        check("sum of columns", &|t| t[0].sum(0))?;
        check("mean", &|t| t[0].mean_all())?;
        check("max", &|t| t[0].max(1))?;
        check("min", &|t| t[0].min(1))?;
        // Not the index itself: where bf16 makes two values equal, either will do.
        check("value at argmax", &|t| {
            t[0].gather(&t[0].argmax_keepdim(1)?, 1)
        })?;
        check("softmax", &|t| softmax(&t[0]))?;
    }
    Ok(())
}

#[test]
fn products() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    for (batch, m, k, n) in [
        (1, 1, 1, 1),
        (1, 3, 5, 7),
        (2, 17, 33, 9),
        (1, 130, 300, 200),
        (3, 64, 72, 64),
    ] {
        let inputs = [values((batch, m, k), 6)?, values((batch, k, n), 7)?];
        let check = |name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            agree_in_both(
                &device,
                &format!("{name} {batch}x({m}, {k}, {n})"),
                &inputs,
                f,
            )
        };
        check("matmul", &|t| t[0].matmul(&t[1]))?;
        check("matmul with A transposed", &|t| {
            t[0].transpose(1, 2)?
                .contiguous()?
                .transpose(1, 2)?
                .matmul(&t[1])
        })?;
        check("matmul with B transposed", &|t| {
            t[0].matmul(&t[1].transpose(1, 2)?.contiguous()?.transpose(1, 2)?)
        })?;
        check("matmul, B the same for all", &|t| {
            t[0].broadcast_matmul(&t[1].get(0)?)
        })?;
    }
    for dtype in [DType::F64, DType::F16] {
        let tolerance = if dtype == DType::F16 { 2e-3 } else { 1e-5 };
        let inputs = [values((2, 9, 20), 8)?, values((2, 20, 11), 9)?];
        agree(&device, "matmul", dtype, tolerance, &inputs, |t| {
            t[0].matmul(&t[1])
        })?;
    }
    Ok(())
}

#[test]
fn indices() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let inputs = [values((6, 10), 10)?, values((4, 10), 11)?];
    let ids = |t: &Tensor| Tensor::new(&[5u32, 0, 3, 3], t.device());
    let check = |name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        agree_in_both(&device, name, &inputs, f)
    };
    check("index_select", &|t| t[0].index_select(&ids(&t[0])?, 0))?;
    check("index_add", &|t| t[0].index_add(&ids(&t[0])?, &t[1], 0))?;
    check("embedding", &|t| t[0].embedding(&ids(&t[0])?))?;
    let wide = |t: &Tensor| ids(t)?.unsqueeze(1)?.broadcast_as((4, 10))?.contiguous();
    check("gather", &|t| t[0].gather(&wide(&t[0])?, 0))?;
    check("scatter_add", &|t| {
        t[0].scatter_add(&wide(&t[0])?, &t[1], 0)
    })?;
    check("i64 indices", &|t| {
        t[0].index_select(&ids(&t[0])?.to_dtype(DType::I64)?, 0)
    })
}

#[test]
fn conversions() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let input = values((5, 41), 12)?.affine(20.0, 50.0)?;
    let half = |dtype| dtype == DType::F16 || dtype == DType::BF16;
    for from in [
        DType::F32,
        DType::F64,
        DType::F16,
        DType::BF16,
        DType::U8,
        DType::U32,
        DType::I64,
    ] {
        for to in [
            DType::F32,
            DType::F64,
            DType::F16,
            DType::BF16,
            DType::U8,
            DType::U32,
            DType::I64,
        ] {
            // What candle 0.11 has no kernels for.
            if half(from) && to == DType::I64 || from == DType::I64 && half(to) {
                continue;
            }
            let here = input.to_dtype(from)?;
            let there = here.to_device(&device)?;
            let worst = discrepancy(&here.to_dtype(to)?, &there.to_dtype(to)?)?;
            assert_eq!(worst, 0.0, "{from:?} to {to:?}");
        }
    }
    Ok(())
}

#[test]
fn convolutions() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let inputs = [
        values((2, 3, 9, 8), 13)?,
        values((4, 3, 3, 3), 14)?,
        values((4, 3, 2, 2), 15)?,
    ];
    let check = |name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        agree_in_both(&device, name, &inputs, f)
    };
    check("conv2d", &|t| t[0].conv2d(&t[1], 1, 1, 1, 1))?;
    check("conv2d, stride 2", &|t| t[0].conv2d(&t[1], 0, 2, 1, 1))?;
    check("avg_pool2d", &|t| t[0].avg_pool2d(2))?;
    check("max_pool2d", &|t| t[0].max_pool2d(2))?;
    check("upsample_nearest2d", &|t| t[0].upsample_nearest2d(18, 16))?;
    agree(
        &device,
        "conv_transpose2d",
        DType::F32,
        1e-5,
        &inputs,
        |t| {
            t[0].narrow(1, 0, 3)?
                .conv_transpose2d(&t[2].transpose(0, 1)?.contiguous()?, 0, 0, 2, 1)
        },
    )
}

/// Loss and gradients of two layers, a normalisation and a softmax.
#[test]
fn gradients() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let run = |device: &Device| -> Result<Vec<Tensor>> {
        let var = |t: Tensor| Var::from_tensor(&t.to_device(device)?);
        let x = values((6, 10), 16)?.to_device(device)?;
        let w1 = var(values((10, 16), 17)?)?;
        let b1 = var(values(16, 18)?)?;
        let w2 = var(values((16, 5), 19)?)?;
        let h = x.matmul(&w1)?.broadcast_add(&b1)?.gelu()?;
        let mean = h.mean_keepdim(1)?;
        let centred = h.broadcast_sub(&mean)?;
        let h =
            centred.broadcast_div(&centred.sqr()?.mean_keepdim(1)?.affine(1.0, 1e-6)?.sqrt()?)?;
        let p = softmax(&h.matmul(&w2)?)?;
        let picked = p.gather(&Tensor::new(&[[0u32], [1], [2], [3], [4], [0]], device)?, 1)?;
        let loss = picked.log()?.neg()?.mean_all()?;
        let grads = loss.backward()?;
        let of = |v: &Var| grads.get(v).cloned().expect("a gradient of every variable");
        Ok(vec![loss, of(&w1), of(&b1), of(&w2)])
    };
    for (name, (expected, found)) in ["loss", "w1", "b1", "w2"]
        .iter()
        .zip(run(&Device::Cpu)?.iter().zip(&run(&device)?))
    {
        let worst = discrepancy(expected, found)?;
        assert!(
            worst <= 1e-4,
            "gradient of {name}: differs by {worst:.2e}, allowed 1e-4"
        );
    }
    Ok(())
}
