//! Whether a GPU computes what the CPU does: every operation with a kernel, forward and all gradients, against the
//! composition of candle's operations on the CPU in f64.
//!
//! A list, so that the tests and a program on the machine with the GPU run the same.

mod list;
mod training;

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use tinyfusion_core::{StepRng, stream};

pub use list::checks;

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

/// Differences, relative to what they are compared with, that rounding explains.
pub fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2e-2,
        _ => 1e-4,
    }
}

/// What of an operation is compared.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Output,
    /// The output, and the gradients for all operands.
    Gradients,
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
    wanted: Wanted,
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
    if wanted == Wanted::Output {
        return Ok(vec![out.detach()]);
    }
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

/// `dtype` is the coarsest type that anything is rounded to.
fn agree(
    device: &Device,
    shapes: &[Vec<usize>],
    (dtype, types): (DType, &[DType]),
    wanted: Wanted,
    f: &impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Discrepancy> {
    let operands = shapes
        .iter()
        .enumerate()
        // Both sides begin with the numbers that the device's type has.
        .map(|(i, shape)| random(shape, i as u64)?.to_dtype(types[i]))
        .collect::<Result<Vec<_>>>()?;
    let run = |device: &Device, types: &[DType]| results(device, &operands, types, wanted, f);
    let got = run(device, types)?;
    repeats(&got, &run(device, types)?)?;
    let want = run(&Device::Cpu, &vec![DType::F64; types.len()])?;
    worst(&got, &want, allowed(dtype))
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
        // Not `max`, which would drop a NaN; once there is one, it stays.
        let off = got.iter().zip(&want).fold(0.0, |most: f64, (g, w)| {
            let off = (g - w).abs() / largest;
            if most.is_nan() || off <= most {
                most
            } else {
                off
            }
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
