//! Blocks of a network as single nodes of candle's graph, with a backward that stores what candle's adds to zeros.
//!
//! candle's backward begins every gradient as a tensor of zeros and adds to it what comes, also where nothing else will: four
//! passes over memory for a value that was just written; and everything that was kept for it lives until its end. Inside a
//! recorded block the first gradient of a tensor is stored as it is, and what an operation kept goes when its backward is
//! through.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, TensorId, bail,
};

use crate::gradients::{add_to_sum, has_sums};
use crate::storage::Handed;

/// f(x, c) as one operation, where its backward will be that of the [`Gradients`](crate::Gradients) whose `recording` is under
/// way; f itself elsewhere, and where it does more than this crate's operations. The gradients are the same, bit for bit.
///
/// c is what f is told beside its input; x again where that is nothing.
pub fn record(
    x: &Tensor,
    c: &Tensor,
    f: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    if !has_sums() || !(x.track_op() || c.track_op()) {
        return f(x, c);
    }
    let (out, tape) = Tape::of(x, c, f)?;
    let Some(tape) = tape else { return Ok(out) };
    let out = Handed::take(&out)?;
    let tape = Mutex::new(Some(tape));
    x.apply_op2(c, Block { tape, out })
}

struct Block {
    /// Taken by the backward.
    tape: Mutex<Option<Tape>>,
    /// Taken by the forward.
    out: Handed,
}

impl CustomOp2 for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.out.cpu()
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.out.cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        c: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(tape) = self.tape.lock().ok().and_then(|mut tape| tape.take()) else {
            bail!("a recorded block has one backward, and it was run")
        };
        tape.backward(x, c, out, dout)
    }
}

/// An operation of this crate, as candle's graph holds it.
pub(crate) enum Op {
    One(Arc<Box<dyn CustomOp1 + Send + Sync>>),
    Two(Arc<Box<dyn CustomOp2 + Send + Sync>>),
    Three(Arc<Box<dyn CustomOp3 + Send + Sync>>),
}

struct Record {
    op: Op,
    args: Vec<Tensor>,
    out: Tensor,
}

/// Operations in the order in which they ran, as far as their gradients go nowhere but to x, c, each other and variables.
#[derive(Default)]
pub(crate) struct Tape {
    /// x, c and all outputs.
    known: HashSet<TensorId>,
    records: Vec<Record>,
}

thread_local! {
    /// The tape of the block that is being computed on this thread.
    static RUNNING: RefCell<Option<Tape>> = const { RefCell::new(None) };
    /// See [`found_so_far`].
    static SO_FAR: RefCell<Option<(TensorId, Tensor)>> = const { RefCell::new(None) };
}

/// What was found so far of the gradient of the first argument of the operation whose backward runs, for a kernel that adds to it
/// as it writes. Whoever takes it returns the sum.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) fn found_so_far(x: &Tensor) -> Option<Tensor> {
    SO_FAR.with_borrow_mut(|so_far| {
        let (_, sum) = so_far.take_if(|(id, _)| *id == x.id())?;
        Some(sum)
    })
}

impl Tape {
    /// f(x, c) with its tape; with none if the way from there to x, c and the variables leads through operations that are not
    /// this crate's.
    pub(crate) fn of(
        x: &Tensor,
        c: &Tensor,
        f: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Option<Self>)> {
        let running = Running::enter(Self {
            known: HashSet::from([x.id(), c.id()]),
            records: Vec::new(),
        });
        let out = f(x, c);
        let (out, mut tape) = (out?, running.leave());
        let is_out = |record: &Record| record.out.id() == out.id();
        let Some(last) = tape.records.iter().rposition(is_out) else {
            return Ok((out, None));
        };
        tape.records.truncate(last + 1);
        Ok((out, Some(tape)))
    }

    /// Gradients for x and c, from the output of the last operation and its gradient. Those of variables go to the sums of the
    /// pass that is under way.
    pub(crate) fn backward(
        mut self,
        x: &Tensor,
        c: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut found = HashMap::new();
        let Some(last) = self.records.last_mut() else {
            bail!("a tape of nothing")
        };
        // Its own tensor has handed its values on.
        last.out = out.clone();
        found.insert(out.id(), dout.clone());
        // Each record goes with what it kept.
        while let Some(Record { op, args, out }) = self.records.pop() {
            if let Some(gradient) = found.remove(&out.id()) {
                let first = args.first().map(Tensor::id);
                let so_far = first.and_then(|id| Some((id, found.remove(&id)?)));
                let before = SO_FAR.replace(so_far);
                let gradients = op.backward(&args, &out, &gradient);
                found.extend(SO_FAR.replace(before)); // what the operation has not added to
                for (arg, gradient) in args.iter().zip(gradients?) {
                    self.spread(&mut found, arg, gradient)?;
                }
            }
        }
        let dx = found.remove(&x.id());
        Ok((dx, found.remove(&c.id())))
    }

    /// Adds the gradient of an argument to what was found for it.
    fn spread(
        &self,
        found: &mut HashMap<TensorId, Tensor>,
        arg: &Tensor,
        gradient: Option<Tensor>,
    ) -> Result<()> {
        let Some(gradient) = gradient else {
            return Ok(());
        };
        if !self.known.contains(&arg.id()) {
            return match arg.is_variable() {
                true => add_to_sum(arg, &gradient),
                false => Ok(()), // frozen
            };
        }
        let sum = match found.remove(&arg.id()) {
            None => gradient,
            Some(others) => (others + gradient)?,
        };
        found.insert(arg.id(), sum);
        Ok(())
    }
}

impl Op {
    fn backward(
        &self,
        args: &[Tensor],
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        Ok(match (self, args) {
            (Self::One(op), [a]) => vec![op.bwd(a, out, dout)?],
            (Self::Two(op), [a, b]) => <[_; 2]>::from(op.bwd(a, b, out, dout)?).into(),
            (Self::Three(op), [a, b, c]) => <[_; 3]>::from(op.bwd(a, b, c, out, dout)?).into(),
            _ => bail!("an operation was recorded with {} arguments", args.len()),
        })
    }
}

/// Makes a tape that of this thread until it is dropped; then the one before it is again.
struct Running {
    before: Option<Tape>,
}

impl Running {
    fn enter(tape: Tape) -> Self {
        Self {
            before: RUNNING.replace(Some(tape)),
        }
    }

    fn leave(self) -> Tape {
        RUNNING.take().unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(self.before.take());
    }
}

/// Notes an operation on the tape of this thread, if there is one.
///
/// An argument that has a gradient and is neither known nor a variable comes from an operation that the tape has not seen; what
/// comes after it is left to candle.
fn note(op: impl FnOnce() -> Op, args: &[&Tensor], out: &Tensor) {
    RUNNING.with_borrow_mut(|tape| {
        let Some(tape) = tape else { return };
        let ends =
            |arg: &&Tensor| !arg.track_op() || arg.is_variable() || tape.known.contains(&arg.id());
        if !out.track_op() || !args.iter().all(ends) {
            return;
        }
        tape.known.insert(out.id());
        tape.records.push(Record {
            op: op(),
            args: args.iter().map(|&arg| arg.clone()).collect(),
            out: out.clone(),
        });
    });
}

/// `op` of x, in candle's graph and on the tape.
pub(crate) fn apply1(x: &Tensor, op: impl CustomOp1 + Send + Sync + 'static) -> Result<Tensor> {
    let op: Arc<Box<dyn CustomOp1 + Send + Sync>> = Arc::new(Box::new(op));
    let out = x.apply_op1_arc(op.clone())?;
    note(|| Op::One(op), &[x], &out);
    Ok(out)
}

/// As [`apply1`] of two tensors.
pub(crate) fn apply2(
    x: &Tensor,
    y: &Tensor,
    op: impl CustomOp2 + Send + Sync + 'static,
) -> Result<Tensor> {
    let op: Arc<Box<dyn CustomOp2 + Send + Sync>> = Arc::new(Box::new(op));
    let out = x.apply_op2_arc(y, op.clone())?;
    note(|| Op::Two(op), &[x, y], &out);
    Ok(out)
}

/// As [`apply1`] of three tensors.
pub(crate) fn apply3(
    x: &Tensor,
    y: &Tensor,
    z: &Tensor,
    op: impl CustomOp3 + Send + Sync + 'static,
) -> Result<Tensor> {
    let op: Arc<Box<dyn CustomOp3 + Send + Sync>> = Arc::new(Box::new(op));
    let out = x.apply_op3_arc(y, z, op.clone())?;
    note(|| Op::Three(op), &[x, y, z], &out);
    Ok(out)
}

#[cfg(test)]
mod tests;
