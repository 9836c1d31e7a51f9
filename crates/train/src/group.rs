use std::collections::BTreeSet;

use candle_core::{DType, Tensor, Var};
use rayon::prelude::*;
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};
use tinyfusion_nn::update::{AdamW, Parameter, Scale};

use crate::LrSchedule;

/// Parameters that share a learning rate, in a fixed order, with their AdamW moments and their average.
#[derive(Debug)]
pub struct ParamGroup {
    /// Shown in logs: `lr_NAME`.
    pub name: String,
    /// Learning rate.
    pub lr: LrSchedule,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    params: Vec<Param>,
}

#[derive(Debug)]
struct Param {
    name: String,
    at: Parameter,
}

impl ParamGroup {
    /// A group over `vars` (f32, names unique), without weight decay.
    ///
    /// The average starts at the present values.
    pub fn new(name: impl Into<String>, lr: LrSchedule, vars: Vec<(String, Var)>) -> Result<Self> {
        let group = name.into();
        let params = vars
            .into_iter()
            .map(|(name, var)| {
                if var.dtype() != DType::F32 || !var.is_contiguous() {
                    return Err(Error::usage(format!(
                        "group `{group}`: `{name}` is {:?} with strides {:?}; a trained parameter is a contiguous f32",
                        var.dtype(),
                        var.stride()
                    )));
                }
                Ok(Param { name, at: Parameter::new(var)? })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            name: group,
            lr,
            weight_decay: 0.0,
            params,
        })
    }

    /// Sets decoupled weight decay.
    #[must_use]
    pub fn with_weight_decay(self, weight_decay: f64) -> Self {
        Self {
            weight_decay,
            ..self
        }
    }

    /// Without averages, for parameters whose last value is all that is wanted: a quarter less memory.
    #[must_use]
    pub fn without_averages(mut self) -> Self {
        self.params.iter_mut().for_each(|p| p.at.average = None);
        self
    }

    /// The variables, in order.
    pub fn vars(&self) -> impl Iterator<Item = &Var> {
        self.params.iter().map(|p| &p.at.var)
    }

    /// The exponential moving averages by name, of the parameters that have one. They share storage with the group:
    /// later steps move them.
    pub fn averages(&self) -> StateDict {
        self.params
            .iter()
            .filter_map(|p| Some((p.name.clone(), p.at.average.as_ref()?.as_detached_tensor())))
            .collect()
    }

    /// One AdamW update with `grads` in the order of [`vars`](Self::vars), then the averages' step.
    ///
    /// Parameters are spread over the threads; each is elementwise arithmetic, so their number does not show.
    pub(crate) fn step(
        &self,
        grads: &[Tensor],
        adamw: AdamW,
        t: u64,
        scale: &Scale,
        decay: f64,
    ) -> Result<()> {
        let step = |(p, grad): (&Param, &Tensor)| Ok(adamw.step(&p.at, grad, t, scale, decay)?);
        // A GPU's device orders what one thread gives it; threads of their own would each have a stream.
        if grads.iter().any(|grad| !grad.device().is_cpu()) {
            return self.params.iter().zip(grads).try_for_each(step);
        }
        self.params.par_iter().zip(grads).try_for_each(step)
    }

    /// Weights, averages and moments for a checkpoint.
    fn export(&self, into: &mut Snapshot) {
        for p in &self.params {
            into.model.insert(&p.name, p.at.var.as_detached_tensor());
            if let Some(average) = &p.at.average {
                into.ema.insert(&p.name, average.as_detached_tensor());
            }
            into.optimizer
                .insert(format!("m.{}", p.name), p.at.m.as_detached_tensor());
            into.optimizer
                .insert(format!("v.{}", p.name), p.at.v.as_detached_tensor());
        }
    }

    /// Takes back what [`export`](Self::export) gave: names, shapes and types have been checked, so that
    /// either everything is taken or nothing.
    pub(crate) fn import(&self, from: &Snapshot) -> Result<()> {
        for p in &self.params {
            p.at.var.set(from.model.require(&p.name)?)?;
            if let Some(average) = &p.at.average {
                average.set(from.ema.require(&p.name)?)?;
            }
            p.at.m
                .set(from.optimizer.require(&format!("m.{}", p.name))?)?;
            p.at.v
                .set(from.optimizer.require(&format!("v.{}", p.name))?)?;
        }
        Ok(())
    }
}

/// Refuses groups that would overwrite each other: in a checkpoint by name, in a step by variable, in the
/// log by the group's name.
pub(crate) fn check_groups(groups: &[ParamGroup]) -> Result<()> {
    let fail = |what: String| Err(Error::usage(format!("training: {what}")));
    let (mut groups_seen, mut names, mut vars) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for group in groups {
        let LrSchedule {
            peak,
            last,
            warmup: _,
        } = group.lr;
        for (what, value) in [
            ("lr peak", peak),
            ("lr last", last),
            ("weight decay", group.weight_decay),
        ] {
            if !value.is_finite() || value < 0.0 {
                return fail(format!(
                    "group `{}`: {what} is {value}; a finite number of at least 0 is expected",
                    group.name
                ));
            }
        }
        if !groups_seen.insert(&group.name) {
            return fail(format!("two groups are called `{}`", group.name));
        }
        for p in &group.params {
            if !names.insert(&p.name) {
                return fail(format!("two parameters are called `{}`", p.name));
            }
            vars.push((p.at.var.id(), &p.name));
        }
    }
    for (i, (id, name)) in vars.iter().enumerate() {
        if let Some((_, other)) = vars[..i].iter().find(|(earlier, _)| earlier == id) {
            return fail(format!("`{other}` and `{name}` are the same variable"));
        }
    }
    if vars.is_empty() {
        return fail("there is no parameter to train".into());
    }
    Ok(())
}

/// Everything of a run that lives in tensors.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) model: StateDict,
    pub(crate) ema: StateDict,
    pub(crate) optimizer: StateDict,
}

impl Snapshot {
    pub(crate) fn of(groups: &[ParamGroup]) -> Self {
        let mut all = Self::default();
        groups.iter().for_each(|g| g.export(&mut all));
        all
    }

    /// Names and shapes that a snapshot of `groups` has.
    pub(crate) fn specs(groups: &[ParamGroup]) -> [Vec<ParamSpec>; 3] {
        let all = Self::of(groups);
        [all.model, all.ema, all.optimizer].map(|dict| {
            dict.iter()
                .map(|(n, t)| ParamSpec {
                    name: n.to_string(),
                    shape: t.dims().to_vec(),
                })
                .collect()
        })
    }
}
