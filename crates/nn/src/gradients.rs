//! Gradients summed in place, over the backward passes of as many pieces of a batch as there are.
//!
//! candle's own backward starts every gradient as a tensor of zeros and adds each contribution into a new
//! tensor, so a weight's gradient is written four times and lives twice. Here the products that form the
//! gradients of linear layers write into one buffer per variable, which a CPU keeps from step to step; what else
//! candle finds is added to the same buffers.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, TensorId, Var, bail};

use crate::kernels::matmul::Into;
use crate::update::in_chunks;

/// Sums of gradients, one per variable.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Vec<Sum>,
    index: HashMap<TensorId, usize>,
}

#[derive(Debug)]
struct Sum {
    var: Var,
    /// Kept from one sum to the next on a CPU, which has to clear new memory. A GPU has not, and can use this memory for
    /// what a forward keeps.
    buffer: Option<Tensor>,
    /// Whether `buffer` holds this sum, and not what is left over from the last.
    begun: bool,
}

thread_local! {
    /// Where the backward pass that runs on this thread puts gradients of variables.
    static ACTIVE: RefCell<Option<Gradients>> = const { RefCell::new(None) };
    /// Whether what is computed on this thread has such a pass as its backward.
    static RECORDING: Cell<bool> = const { Cell::new(false) };
}

/// Whether the backward of what is computed on this thread has sums for the gradients of variables.
pub(crate) fn has_sums() -> bool {
    RECORDING.get()
}

impl Gradients {
    /// A sum for each of `vars`.
    pub fn new(vars: &[&Var]) -> Self {
        let sums = vars
            .iter()
            .map(|&var| Sum {
                var: var.clone(),
                buffer: None,
                begun: false,
            })
            .collect();
        let index = vars.iter().enumerate().map(|(i, v)| (v.id(), i)).collect();
        Self { sums, index }
    }

    /// Begins a new sum.
    pub fn clear(&mut self) {
        for sum in &mut self.sums {
            sum.begun = false;
            if sum.var.device().is_cuda() {
                sum.buffer = None;
            }
        }
    }

    /// What `forward` computes, for a loss that goes to [`backward`](Self::backward) and nowhere else: blocks are recorded
    /// inside ([`record`](crate::record)).
    pub fn recording<T>(forward: impl FnOnce() -> T) -> T {
        struct Before(bool);
        impl Drop for Before {
            fn drop(&mut self) {
                RECORDING.set(self.0);
                #[cfg(feature = "cuda")]
                crate::cuda::weights::forget_rounded();
            }
        }
        let _before = Before(RECORDING.replace(true));
        forward()
    }

    /// Adds the gradients of `loss`, a scalar.
    pub fn backward(&mut self, loss: &Tensor) -> Result<()> {
        let active = Active::enter(std::mem::take(self));
        let found = loss.backward();
        *self = active.leave();
        self.take_from(&mut found?)
    }

    fn take_from(&mut self, found: &mut GradStore) -> Result<()> {
        for sum in &mut self.sums {
            if let Some(gradient) = found.remove(sum.var.as_tensor()) {
                sum.add(&gradient)?;
            }
        }
        Ok(())
    }

    /// Adds another sum over the same variables.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        if self.sums.len() != other.sums.len() {
            bail!(
                "gradients of {} and of {} variables",
                self.sums.len(),
                other.sums.len()
            );
        }
        let others = other.sums.iter().filter(|s| s.begun);
        for theirs in others {
            let Some(&at) = self.index.get(&theirs.var.id()) else {
                bail!("gradients of other variables")
            };
            if let Some(value) = &theirs.buffer {
                self.sums[at].add(value)?;
            }
        }
        Ok(())
    }

    /// The sums in the order of the variables; zeros where no gradient came. They are buffers: the next pass
    /// may write into them.
    pub fn sums(&mut self) -> Result<Vec<Tensor>> {
        self.sums
            .iter_mut()
            .map(|sum| {
                if !sum.begun {
                    sum.add(&sum.var.zeros_like()?)?;
                }
                sum.buffer()
            })
            .collect()
    }
}

impl Sum {
    fn buffer(&mut self) -> Result<Tensor> {
        if let Some(buffer) = &self.buffer {
            return Ok(buffer.clone());
        }
        let buffer = new_buffer(&self.var)?;
        self.buffer = Some(buffer.clone());
        Ok(buffer)
    }

    fn add(&mut self, gradient: &Tensor) -> Result<()> {
        if gradient.dims() != self.var.dims() {
            bail!(
                "a gradient {:?} of a variable {:?}",
                gradient.dims(),
                self.var.dims()
            );
        }
        let begun = std::mem::replace(&mut self.begun, true);
        #[cfg(feature = "cuda")]
        if self.var.device().is_cuda() && self.var.dtype() == DType::F32 {
            let buffer = self.buffer()?;
            return crate::cuda::update::accumulate(&buffer, gradient, into(begun));
        }
        if !self.var.device().is_cpu() {
            self.buffer = Some(match (&self.buffer, begun) {
                (Some(sum), true) => (sum + gradient)?,
                _ => gradient.clone(),
            });
            return Ok(());
        }
        let buffer = self.buffer()?;
        crate::ops::host!(gradient => gradient; mutate(&buffer, |sum| {
            in_chunks(sum, gradient, |sum, gradient| {
                if begun {
                    sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
                } else {
                    sum.copy_from_slice(gradient);
                }
            });
            Ok(())
        }))
    }
}

/// Lets `write` put the gradient of `var` into its sum on the CPU, where a pass that sums in place is under way on this
/// thread and knows the variable; false otherwise.
pub(crate) fn write_into_sum(var: &Tensor, write: impl FnOnce(&mut [f32], Into)) -> Result<bool> {
    // Only looked up under the borrow: what waits for other threads in `write` may be given another pass to run.
    let Some((sum, into)) = sum_of(var)? else {
        return Ok(false);
    };
    mutate(&sum, |values| {
        write(values, into);
        Ok(())
    })?;
    Ok(true)
}

/// The sum of `var` in the pass that is under way on this thread, if that has one, and what to do with what it holds. From here on
/// it counts as begun.
pub(crate) fn sum_of(var: &Tensor) -> Result<Option<(Tensor, Into)>> {
    ACTIVE.with_borrow_mut(|active| {
        let known = active
            .as_mut()
            .and_then(|all| Some(&mut all.sums[*all.index.get(&var.id())?]));
        let Some(sum) = known else { return Ok(None) };
        let begun = std::mem::replace(&mut sum.begun, true);
        Ok(Some((sum.buffer()?, into(begun))))
    })
}

/// For the sum of a variable's gradients, which are written into it before it is read.
fn new_buffer(var: &Var) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if var.device().is_cuda() {
        return crate::cuda::weights::buffer(var);
    }
    var.zeros_like()
}

fn into(begun: bool) -> Into {
    match begun {
        true => Into::Accumulate,
        false => Into::Overwrite,
    }
}

/// Adds what `found` holds for the variables of the sums that are active on this thread.
pub(crate) fn add_to_sums(found: &mut GradStore) -> Result<()> {
    with_sums(|all| all.take_from(found))
}

/// Adds the gradient of a variable to its sum on this thread, if the pass asks for it.
pub(crate) fn add_to_sum(var: &Tensor, gradient: &Tensor) -> Result<()> {
    with_sums(|all| match all.index.get(&var.id()) {
        Some(&at) => all.sums[at].add(gradient),
        None => Ok(()),
    })
}

fn with_sums(add: impl FnOnce(&mut Gradients) -> Result<()>) -> Result<()> {
    let Some(mut all) = ACTIVE.take() else {
        bail!("run the backward pass through tinyfusion_nn::Gradients, which has sums to add to")
    };
    let added = add(&mut all);
    ACTIVE.set(Some(all));
    added
}

/// Makes sums the active ones of this thread until it is dropped, also by a panic; then those before it are again.
struct Active {
    before: Option<Gradients>,
}

impl Active {
    fn enter(sums: Gradients) -> Self {
        Self {
            before: ACTIVE.replace(Some(sums)),
        }
    }

    fn leave(self) -> Gradients {
        ACTIVE.take().unwrap_or_default()
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        ACTIVE.set(self.before.take());
    }
}

/// Gives `change` the values of a contiguous f32 tensor on the CPU, to be changed in place.
pub(crate) fn mutate(tensor: &Tensor, change: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Mutate(Cell::new(Some(change))))
}

struct Mutate<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Mutate<F> {
    fn name(&self) -> &'static str {
        "mutate"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::F32(values), Some((start, end)), Some(change)) => {
                change(&mut values[start..end])
            }
            _ => bail!("values are changed in place only in a contiguous f32 tensor"),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops;

    fn var(shape: &[usize], phase: f32) -> Var {
        let n = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// A weight that is used twice, a bias, a table that candle differentiates itself, and one that is not used.
    fn loss(vars: &[Var], x: &Tensor) -> Tensor {
        let h = ops::linear_gelu(x, &vars[0], &vars[1]).unwrap();
        let h = ops::linear(&h, &vars[0], None).unwrap();
        h.broadcast_mul(&vars[2])
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
    }

    fn vars() -> Vec<Var> {
        vec![
            var(&[5, 5], 0.0),
            var(&[5], 1.0),
            var(&[5], 2.0),
            var(&[2], 3.0),
        ]
    }

    #[test]
    fn sums_are_those_of_candles_own_backward() {
        let vars = vars();
        let mut sums = Gradients::new(&vars.iter().collect::<Vec<_>>());
        // Twice, so that left-over values would show.
        for round in 0..2 {
            sums.clear();
            let pieces = [var(&[4, 5], 4.0 + round as f32), var(&[3, 5], 5.0)];
            let mut want: Vec<Tensor> = vars.iter().map(|v| v.zeros_like().unwrap()).collect();
            for x in &pieces {
                let x = x.as_detached_tensor();
                sums.backward(&loss(&vars, &x)).unwrap();
                let store = loss(&vars, &x).backward().unwrap();
                for (want, var) in want.iter_mut().zip(&vars) {
                    if let Some(g) = store.get(var) {
                        *want = (&*want + g).unwrap();
                    }
                }
            }
            for (got, want) in sums.sums().unwrap().iter().zip(&want) {
                let apart = (got - want).unwrap().abs().unwrap().max_all().unwrap();
                let size = want
                    .abs()
                    .unwrap()
                    .max_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap();
                assert!(
                    apart.to_scalar::<f32>().unwrap() <= 1e-6 * size,
                    "{got} {want}"
                );
            }
        }
    }

    #[test]
    fn two_sums_add_up_and_an_unused_variable_has_zeros() {
        let vars = vars();
        let refs: Vec<&Var> = vars.iter().collect();
        let (mut a, mut b) = (Gradients::new(&refs), Gradients::new(&refs));
        let x = var(&[4, 5], 4.0).as_detached_tensor();
        a.backward(&loss(&vars, &x)).unwrap();
        b.backward(&loss(&vars, &x)).unwrap();
        let alone = b.sums().unwrap();
        a.add(&b).unwrap();
        for (both, one) in a.sums().unwrap().iter().zip(&alone) {
            let apart = (both - (one * 2.0).unwrap())
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap();
            assert_eq!(apart.to_scalar::<f32>().unwrap(), 0.0);
        }
        assert_eq!(a.sums().unwrap()[3].to_vec1::<f32>().unwrap(), [0.0; 2]);
        let other = var(&[2], 0.0);
        assert!(a.add(&Gradients::new(&[&other])).is_err());
    }

    #[test]
    fn a_failed_pass_leaves_nothing_active() {
        let vars = vars();
        let mut sums = Gradients::new(&[&vars[0]]);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _active = Active::enter(std::mem::take(&mut sums));
            panic!("in the middle");
        }));
        assert!(outcome.is_err());
        assert!(!write_into_sum(&vars[0], |_, _| {}).unwrap());
    }

    #[test]
    fn a_pass_within_a_pass_keeps_its_own_sums() {
        let (vars, x) = (vars(), var(&[4, 5], 4.0).as_detached_tensor());
        let refs: Vec<&Var> = vars.iter().collect();
        let (mut alone, mut inner) = (Gradients::new(&refs), Gradients::new(&refs));
        alone.backward(&loss(&vars, &x)).unwrap();
        let outer = Active::enter(Gradients::new(&refs));
        inner.backward(&loss(&vars, &x)).unwrap();
        let mut outer = outer.leave();
        let zero = |t: &Tensor| {
            t.abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                == 0.0
        };
        assert!(outer.sums().unwrap().iter().all(zero));
        for (a, b) in alone.sums().unwrap().iter().zip(&inner.sums().unwrap()) {
            assert!(zero(&(a - b).unwrap()));
        }
    }

    #[test]
    fn only_contiguous_f32_is_changed_in_place() {
        let t = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(mutate(&t.t().unwrap(), |_| Ok(())).is_err());
        assert!(mutate(&t.to_dtype(DType::F64).unwrap(), |_| Ok(())).is_err());
    }
}
