//! Whether a GPU computes what the CPU does: every operation with a kernel, forward and all gradients, against the
//! composition of candle's operations on the CPU in f64.
//!
//! A list, so that the tests and a program on the machine with the GPU run the same.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use tinyfusion_core::{StepRng, stream};

use crate::update::{AdamW, Parameter, Scale, clip_on_device};
use crate::{Gradients, ops, recompute};

/// Runs a check on a device.
type Run = Box<dyn Fn(&Device) -> Result<Discrepancy> + Send + Sync>;

/// One operation at one size in one type.
pub struct Check {
    /// The operation and its sizes.
    pub name: String,
    /// What the device computes in.
    pub dtype: DType,
    run: Run,
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.name, self.dtype)
    }
}

/// How far a device's results are from the CPU's.
#[derive(Debug, Clone, PartialEq)]
pub struct Discrepancy {
    /// The largest difference of any result, over the largest value of that result.
    pub off: f64,
    /// What rounding explains.
    pub allowed: f64,
    /// The result that is off most: `out`, or `d` and the number of an operand for its gradient.
    pub at: String,
}

impl Discrepancy {
    /// Whether the device agrees.
    pub fn is_within(&self) -> bool {
        self.off <= self.allowed // false for NaN
    }
}

impl Check {
    /// Computes on `device` and on the CPU. What the device does not repeat bit for bit is an error.
    pub fn run(&self, device: &Device) -> Result<Discrepancy> {
        (self.run)(device)
    }
}

/// Every check, in f32 and in bf16.
pub fn checks() -> Vec<Check> {
    let mut list = List(Vec::new());
    attention(&mut list);
    norms(&mut list);
    elementwise(&mut list);
    linear(&mut list);
    list.0.extend(mixed());
    list.0.extend([DType::F32, DType::BF16].map(recomputing));
    list.0.extend([clipping(), adamw()]);
    list.0
}

/// Differences over the largest value that rounding explains.
fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2e-2,
        _ => 1e-4,
    }
}

struct List(Vec<Check>);

impl List {
    /// `f` of operands of these shapes, in both types.
    fn add(
        &mut self,
        name: &str,
        shapes: &[&[usize]],
        f: impl Fn(&[Tensor]) -> Result<Tensor> + Clone + Send + Sync + 'static,
    ) {
        let shapes: Vec<Vec<usize>> = shapes.iter().map(|shape| shape.to_vec()).collect();
        for dtype in [DType::F32, DType::BF16] {
            let (shapes, f) = (shapes.clone(), f.clone());
            self.0.push(Check {
                name: name.to_string(),
                dtype,
                run: Box::new(move |device| {
                    let types = vec![dtype; shapes.len()];
                    agree(device, &shapes, &types, &f)
                }),
            });
        }
    }
}

fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    StepRng::new(seed, 0, stream::INIT)
        .normal(shape, &Device::Cpu)
        .map_err(candle_core::Error::wrap)
}

/// The output of `f` on variables of these types, and the gradients of a random weighting of it.
fn results(
    device: &Device,
    operands: &[Tensor],
    types: &[DType],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let on_device = |t: &Tensor, dtype| t.to_device(device)?.to_dtype(dtype);
    let vars = operands
        .iter()
        .zip(types)
        .map(|(t, &dtype)| Var::from_tensor(&on_device(t, dtype)?))
        .collect::<Result<Vec<_>>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let out = f(&inputs)?;
    // Rounded to bf16, so that both sides weigh by the same numbers.
    let weights = random(out.dims(), 99)?.to_dtype(DType::BF16)?;
    let grads = (&out * on_device(&weights, out.dtype())?)?
        .sum_all()?
        .backward()?;
    let mut all = vec![out.detach()];
    for (i, var) in vars.iter().enumerate() {
        match grads.get(var) {
            Some(grad) if grad.dtype() == var.dtype() => all.push(grad.clone()),
            Some(grad) => bail!(
                "operand {i}: a gradient {:?} of a {:?}",
                grad.dtype(),
                var.dtype()
            ),
            None => bail!("operand {i}: no gradient"),
        }
    }
    Ok(all)
}

fn agree(
    device: &Device,
    shapes: &[Vec<usize>],
    types: &[DType],
    f: &impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Discrepancy> {
    let operands = shapes
        .iter()
        .enumerate()
        // Both sides begin with the numbers that the device's type has.
        .map(|(i, shape)| random(shape, i as u64)?.to_dtype(types[i]))
        .collect::<Result<Vec<_>>>()?;
    let got = results(device, &operands, types, f)?;
    repeats(&got, &results(device, &operands, types, f)?)?;
    let want = results(&Device::Cpu, &operands, &vec![DType::F64; types.len()], f)?;
    let coarsest = if types.contains(&DType::BF16) {
        DType::BF16
    } else {
        DType::F32
    };
    worst(&got, &want, allowed(coarsest))
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

fn repeats(first: &[Tensor], second: &[Tensor]) -> Result<()> {
    for (i, (a, b)) in first.iter().zip(second).enumerate() {
        let same = |(a, b): (f64, f64)| a.to_bits() == b.to_bits();
        if !values(a)?.into_iter().zip(values(b)?).all(same) {
            bail!("{}: another run gave other bits", label(i));
        }
    }
    Ok(())
}

fn label(i: usize) -> String {
    match i {
        0 => "out".into(),
        _ => format!("d{}", i - 1),
    }
}

fn worst(got: &[Tensor], want: &[Tensor], allowed: f64) -> Result<Discrepancy> {
    let mut found = Discrepancy {
        off: 0.0,
        allowed,
        at: label(0),
    };
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        if got.dims() != want.dims() {
            bail!(
                "{}: {:?} instead of {:?}",
                label(i),
                got.dims(),
                want.dims()
            );
        }
        let (got, want) = (values(got)?, values(want)?);
        let largest = want.iter().fold(1e-30f64, |most, v| most.max(v.abs()));
        // Not `max`, which would drop a NaN.
        let off = got.iter().zip(&want).fold(0.0, |most: f64, (g, w)| {
            let off = (g - w).abs() / largest;
            if off <= most { most } else { off }
        });
        if off.is_nan() || off > found.off {
            found = Discrepancy {
                off,
                allowed,
                at: label(i),
            };
        }
        if off.is_nan() {
            break;
        }
    }
    Ok(found)
}

fn dropout_of(samples: usize) -> Result<ops::Dropout> {
    let seeds: Vec<u64> = (0..samples as u64).map(|b| b * 77 + 5).collect();
    ops::Dropout::new(0.3, &seeds, 3)
}

/// Head sizes of every kernel, also such as fill none or are not aligned; tokens below, at and above a tile.
fn attention(list: &mut List) {
    for e in [32, 64, 72, 128] {
        for (b, t, heads) in [(2, 1, 2), (1, 17, 3), (2, 64, 1), (1, 256, 1)] {
            let name = format!("attention B{b} T{t} H{heads} E{e}");
            list.add(&name, &[&[b, t, 3 * heads * e]], move |x| {
                ops::attention(&x[0], heads)
            });
        }
    }
    for (b, t, heads, e) in [(2, 100, 2, 5), (1, 70, 3, 20), (1, 33, 1, 130)] {
        let name = format!("attention B{b} T{t} H{heads} E{e}");
        list.add(&name, &[&[b, t, 3 * heads * e]], move |x| {
            ops::attention(&x[0], heads)
        });
    }
    // Scores so far apart that running maxima move.
    list.add(
        "attention B1 T150 H1 E64, wide scores",
        &[&[1, 150, 3 * 64]],
        |x| ops::attention(&(&x[0] * 4.0)?, 1),
    );
    for (b, t, heads, e) in [(2, 33, 2, 24), (1, 90, 2, 72)] {
        let name = format!("attention B{b} T{t} H{heads} E{e}, dropped");
        list.add(&name, &[&[b, t, 3 * heads * e]], move |x| {
            ops::attention_dropped(&x[0], heads, &dropout_of(b)?)
        });
    }
}

fn norms(list: &mut List) {
    for (b, t, d) in [
        (1, 1, 8),
        (3, 5, 17),
        (2, 64, 64),
        (2, 9, 1152),
        (2, 300, 40),
    ] {
        let sizes = format!("B{b} T{t} D{d}");
        list.add(
            &format!("layer norm, modulated {sizes}"),
            &[&[b, t, d], &[b, 6 * d]],
            |x| ops::layer_norm_modulate(&x[0], &x[1], 3, 4, 1e-6),
        );
        list.add(
            &format!("layer norm {sizes}"),
            &[&[b, t, d], &[d], &[d]],
            |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-6),
        );
        list.add(
            &format!("gated residual {sizes}"),
            &[&[b, t, d], &[b, t, d], &[b, 6 * d]],
            |x| ops::gated_residual(&x[0], &x[1], &x[2], 5),
        );
    }
    for (n, d) in [(1, 8), (5, 17), (300, 64), (3, 1152)] {
        list.add(
            &format!("modulate N{n} D{d}"),
            &[&[n, d], &[n, 3 * d]],
            |x| ops::modulate(&x[0], &x[1], 2, 0),
        );
    }
}

fn elementwise(list: &mut List) {
    list.add("GELU-tanh", &[&[3000]], |x| ops::gelu_tanh(&(&x[0] * 3.0)?));
    list.add("GELU-erf", &[&[3000]], |x| ops::gelu_erf(&(&x[0] * 3.0)?));
    list.add("SiLU", &[&[7, 33]], |x| ops::silu(&(&x[0] * 3.0)?));
    list.add("dropout B3 5·17", &[&[3, 5, 17]], |x| {
        ops::dropout(&x[0], &dropout_of(3)?)
    });
}

fn linear(list: &mut List) {
    for (rows, i, o) in [(1, 1, 1), (5, 17, 33), (130, 64, 192), (3, 1152, 72)] {
        let sizes = format!("R{rows} I{i} O{o}");
        list.add(
            &format!("linear {sizes}"),
            &[&[rows, i], &[o, i], &[o]],
            |x| ops::linear(&x[0], &x[1], Some(&x[2])),
        );
        list.add(
            &format!("linear without bias {sizes}"),
            &[&[2, rows, i], &[o, i]],
            |x| ops::linear(&x[0], &x[1], None),
        );
        list.add(
            &format!("linear, GELU-tanh {sizes}"),
            &[&[rows, i], &[o, i], &[o]],
            |x| ops::linear_gelu(&x[0], &x[1], &x[2]),
        );
        list.add(
            &format!("linear, GELU-erf {sizes}"),
            &[&[rows, i], &[o, i], &[o]],
            |x| ops::linear_gelu_erf(&x[0], &x[1], &x[2]),
        );
    }
    let (rows, i, o, r) = (9, 24, 40, 3);
    list.add(
        &format!("low-rank linear, GELU-tanh R{rows} I{i} O{o} r{r}"),
        &[&[2, rows, i], &[r, i], &[o, r]],
        move |x| {
            // W and its bias are frozen under a low-rank update.
            let frozen = |shape: &[usize], seed| {
                random(shape, seed)?
                    .to_dtype(DType::BF16)?
                    .to_device(x[0].device())?
                    .to_dtype(x[0].dtype())
            };
            let update = ops::LowRank {
                a: x[1].clone(),
                b: x[2].clone(),
                scale: 0.7,
            };
            ops::linear_low_rank_gelu(&x[0], &frozen(&[o, i], 7)?, &frozen(&[o], 8)?, &update)
        },
    );
}

/// bf16 activations on f32 parameters, whose gradients are f32 again.
fn mixed() -> [Check; 2] {
    let check = |name: &str, shapes: Vec<Vec<usize>>, f: fn(&[Tensor]) -> Result<Tensor>| Check {
        name: format!("{name}, f32 parameters"),
        dtype: DType::BF16,
        run: Box::new(move |device| {
            let mut types = vec![DType::F32; shapes.len()];
            types[0] = DType::BF16;
            agree(device, &shapes, &types, &f)
        }),
    };
    [
        check(
            "linear, GELU-tanh R20 I24 O40",
            vec![vec![20, 24], vec![40, 24], vec![40]],
            |x| ops::linear_gelu(&x[0], &x[1], &x[2]),
        ),
        check(
            "layer norm R20 D24",
            vec![vec![20, 24], vec![24], vec![24]],
            |x| ops::layer_norm(&x[0], &x[1], &x[2], 1e-6),
        ),
    ]
}

/// A block of a transformer computed twice gives the bits of one that is kept.
fn recomputing(dtype: DType) -> Check {
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
        let gradients = |again: bool| {
            let mut h = x.as_tensor().clone();
            for _ in 0..2 {
                h = match again {
                    true => recompute(&h, &c, block.clone())?,
                    false => block(&h, &c)?,
                };
            }
            let mut sums = Gradients::new(&[&x, &c, &w, &bias])?;
            sums.backward(&h.to_dtype(DType::F32)?.sqr()?.sum_all()?)?;
            let mut all = vec![h.detach()];
            all.extend(sums.sums()?);
            Ok::<_, candle_core::Error>(all)
        };
        let (kept, again) = (gradients(false)?, gradients(true)?);
        for (i, grad) in kept.iter().enumerate() {
            if values(grad)?.iter().all(|v| *v == 0.0) {
                bail!("{}: nothing but zeros", label(i));
            }
        }
        worst(&again, &kept, 0.0)
    };
    Check {
        name: "recompute".into(),
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
fn clipping() -> Check {
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
fn adamw() -> Check {
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
