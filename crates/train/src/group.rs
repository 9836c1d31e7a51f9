use candle_core::{Tensor, Var};
use tinyfusion_core::{ParamSpec, Result, StateDict};
use tinyfusion_nn::update::{AdamW, ema};

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
    var: Var,
    m: Var,
    v: Var,
    /// A separate copy, updated in place.
    average: Tensor,
}

impl ParamGroup {
    /// A group over `vars`, without weight decay.
    pub fn new(name: impl Into<String>, lr: LrSchedule, vars: Vec<(String, Var)>) -> Result<Self> {
        let params = vars
            .into_iter()
            .map(|(name, var)| {
                let (m, v) = (Var::from_tensor(&var.zeros_like()?)?, Var::from_tensor(&var.zeros_like()?)?);
                let average = var.as_detached_tensor().copy()?;
                Ok(Param { name, var, m, v, average })
            })
            .collect::<Result<_>>()?;
        Ok(Self { name: name.into(), lr, weight_decay: 0.0, params })
    }

    /// Sets decoupled weight decay.
    #[must_use]
    pub fn with_weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay, ..self }
    }

    /// The variables, in order.
    pub fn vars(&self) -> impl Iterator<Item = &Var> {
        self.params.iter().map(|p| &p.var)
    }

    /// The exponential moving averages by name.
    pub fn averages(&self) -> StateDict {
        self.params.iter().map(|p| (p.name.clone(), p.average.clone())).collect()
    }

    /// One AdamW update with `grads` in the order of [`vars`](Self::vars).
    pub(crate) fn step(&self, grads: &[Tensor], adamw: AdamW, t: u64, grad_scale: f64) -> Result<()> {
        for (p, grad) in self.params.iter().zip(grads) {
            adamw.step(&p.var, grad, &p.m, &p.v, t, grad_scale)?;
        }
        Ok(())
    }

    pub(crate) fn update_averages(&self, decay: f64) -> Result<()> {
        for p in &self.params {
            ema(&p.average, p.var.as_tensor(), decay)?;
        }
        Ok(())
    }

    /// Weights, averages and moments for a checkpoint.
    pub(crate) fn export(&self, into: &mut Snapshot) {
        for p in &self.params {
            into.model.insert(&p.name, p.var.as_detached_tensor());
            into.ema.insert(&p.name, p.average.clone());
            into.optimizer.insert(format!("m.{}", p.name), p.m.as_detached_tensor());
            into.optimizer.insert(format!("v.{}", p.name), p.v.as_detached_tensor());
        }
    }

    /// Takes back what [`export`](Self::export) gave. The snapshot has been [checked](Snapshot::check).
    pub(crate) fn import(&self, from: &Snapshot) -> Result<()> {
        for p in &self.params {
            p.var.set(from.model.require(&p.name)?)?;
            ema(&p.average, from.ema.require(&p.name)?, 0.0)?;
            p.m.set(from.optimizer.require(&format!("m.{}", p.name))?)?;
            p.v.set(from.optimizer.require(&format!("v.{}", p.name))?)?;
        }
        Ok(())
    }
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
            dict.iter().map(|(n, t)| ParamSpec { name: n.to_string(), shape: t.dims().to_vec() }).collect()
        })
    }
}
