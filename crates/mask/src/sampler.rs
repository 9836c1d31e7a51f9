use candle_core::{DType, Device, Tensor};
use serde_json::json;
use tinyfusion_core::{
    Error, Group, GroupDecision, ParamSpec, Result, Selection, StateDict, StepRng, stream,
};

use crate::candidates::candidates;

/// What every logit starts with, so that all candidates begin equally likely.
pub const INITIAL_LOGIT: f32 = 0.02;

/// Name of the logits of group `g`, shape (1, K).
pub fn logit_name(g: usize) -> String {
    format!("mask.logits.{g}")
}

/// How sharply masks are sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// τ > 0 divides logits and noise alike: it smooths the gradient and leaves the sampled masks as
    /// they are.
    pub tau: f64,
    /// Multiplies the logits alone: how far they outweigh the noise.
    pub scale: f64,
}

/// One mask per sample and what it came from.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// (B, depth) f32, exactly 0 or 1; its gradient goes to the logits through `soft`.
    pub mask: Tensor,
    /// Per group (B, K): softmax((scale·logits + noise)/τ).
    pub soft: Vec<Tensor>,
    /// Per group, per sample: the candidate that was drawn.
    pub index: Vec<Vec<u32>>,
}

/// Draws masks that keep N of M blocks in every group, with a gradient for the groups' logits.
///
/// The logits are not in here: they are tensors `mask.logits.{g}` of a dictionary, so that optimizer,
/// EMA and checkpoints treat them as any parameter.
#[derive(Debug, Clone)]
pub struct MaskSampler {
    groups: Vec<Group>,
    /// Per group: kept indices of every candidate.
    candidates: Vec<Vec<Vec<usize>>>,
    /// Per group (K, M) f32: the same as rows of 0 and 1.
    options: Vec<Tensor>,
    device: Device,
}

impl MaskSampler {
    /// The sampler for `groups` (see [`Pattern::groups`](crate::Pattern::groups)).
    pub fn new(groups: impl Into<Vec<Group>>, device: &Device) -> Result<Self> {
        let groups: Vec<Group> = groups.into();
        if groups.is_empty() {
            return Err(Error::usage("a mask needs at least one group of blocks"));
        }
        let candidates = groups
            .iter()
            .map(|g| candidates(*g))
            .collect::<Result<Vec<_>>>()?;
        let options = groups
            .iter()
            .zip(&candidates)
            .map(|(group, all)| {
                let mut rows = vec![0f32; all.len() * group.m];
                for (k, kept) in all.iter().enumerate() {
                    kept.iter().for_each(|i| rows[k * group.m + i] = 1.0);
                }
                Ok(Tensor::from_vec(rows, (all.len(), group.m), device)?) // (K, M)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            groups,
            candidates,
            options,
            device: device.clone(),
        })
    }

    /// The groups, in order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Blocks over all groups.
    pub fn depth(&self) -> usize {
        self.groups.iter().map(|g| g.m).sum()
    }

    /// Per group the candidates as rows of 0 and 1, (K, M) f32, in lexicographic order.
    pub fn options(&self) -> &[Tensor] {
        &self.options
    }

    /// Names and shapes of the logits.
    pub fn param_specs(&self) -> Vec<ParamSpec> {
        (0..self.groups.len())
            .map(|g| ParamSpec {
                name: logit_name(g),
                shape: vec![1, self.candidates[g].len()],
            })
            .collect()
    }

    /// Logits with which every candidate is equally likely.
    pub fn initial_logits(&self) -> Result<StateDict> {
        self.param_specs()
            .into_iter()
            .map(|spec| {
                Ok((
                    spec.name,
                    Tensor::full(INITIAL_LOGIT, spec.shape, &self.device)?,
                ))
            })
            .collect()
    }

    /// The Gumbel noise of one training step: per group (B, K), independent for every sample and group.
    /// Micro-batches take rows of it.
    pub fn draw_noise(&self, seed: u64, step: u64, batch: usize) -> Result<Vec<Tensor>> {
        let mut rng = StepRng::new(seed, step, stream::MASK);
        self.candidates
            .iter()
            .map(|all| rng.gumbel((batch, all.len()), &self.device))
            .collect()
    }

    /// Samples one mask per row of `noise` (per group (B, K)).
    ///
    /// y = one-hot(argmax softmax((scale·logits + noise)/τ)), mask = y·options; the backward pass sees
    /// the softmax in place of the one-hot (straight-through).
    pub fn sample(
        &self,
        logits: &StateDict,
        noise: &[Tensor],
        temperature: Temperature,
    ) -> Result<Sampled> {
        let Temperature { tau, scale } = temperature;
        if !(tau > 0.0 && tau.is_finite() && scale.is_finite()) {
            return Err(Error::usage(format!(
                "τ must be positive and the scale finite, found {tau} and {scale}"
            )));
        }
        if noise.len() != self.groups.len() {
            return Err(Error::usage(format!(
                "noise for {} groups, expected {}",
                noise.len(),
                self.groups.len()
            )));
        }
        let soft = (0..self.groups.len()).zip(noise).map(|(g, noise)| {
            let logits = (self.logits(logits, g)? * scale)?; // (1, K)
            softmax(&(logits.broadcast_add(noise)? / tau)?) // (B, K)
        });
        let soft = soft.collect::<Result<Vec<_>>>()?;
        let mut masks = Vec::with_capacity(self.groups.len());
        let mut sampled = Vec::with_capacity(self.groups.len());
        for (g, (soft, values)) in soft.iter().zip(read(&soft)?).enumerate() {
            let (hard, index) = one_hot(soft, &values, g)?; // (B, K)
            // In this order: soft − soft is exactly 0, so the value is exactly the one-hot's.
            let y = (hard + (soft - soft.detach())?)?;
            masks.push(y.matmul(&self.options[g])?); // (B, K) × (K, M) = (B, M)
            sampled.push((soft.clone(), index));
        }
        let mask = Tensor::cat(&masks, 1)?; // (B, depth)
        let (soft, index) = sampled.into_iter().unzip();
        Ok(Sampled { mask, soft, index })
    }

    /// Takes the most likely candidate of every group (the first of equals). `logits` are those of the EMA
    /// in the reference; the confidence is the largest of softmax(scale·logits).
    pub fn decide(&self, logits: &StateDict, scale: f64) -> Result<Selection> {
        let decisions = self.decisions(logits, scale)?;
        Selection {
            depth: self.depth(),
            kept: self.kept(decisions.iter().map(|d| d.chosen)),
            groups: self.groups.clone(),
            criterion: "learned".into(),
            settings: json!({ "scale": scale }),
            decisions,
            source_sha256: None,
        }
        .validated()
    }

    /// Per group the probability of every candidate, softmax(scale·logits) in f64, and the arg-max.
    pub(crate) fn decisions(&self, logits: &StateDict, scale: f64) -> Result<Vec<GroupDecision>> {
        (0..self.groups.len())
            .map(|g| {
                let values = self
                    .logits(logits, g)?
                    .detach()
                    .to_dtype(DType::F64)?
                    .flatten_all()?
                    .to_vec1::<f64>()?; // (K,)
                finite(&values, g)?;
                let chosen = arg_max(&values);
                let exps: Vec<f64> = values
                    .iter()
                    .map(|v| (scale * (v - values[chosen])).exp())
                    .collect();
                let sum: f64 = exps.iter().sum();
                let probabilities: Vec<f64> = exps.iter().map(|e| e / sum).collect();
                Ok(GroupDecision {
                    confidence: probabilities[chosen],
                    chosen,
                    probabilities,
                })
            })
            .collect()
    }

    /// Block indices kept by one candidate per group.
    pub(crate) fn kept(&self, chosen: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut start = 0;
        let mut kept = Vec::new();
        for ((group, all), k) in self.groups.iter().zip(&self.candidates).zip(chosen) {
            kept.extend(all[k].iter().map(|i| start + i));
            start += group.m;
        }
        kept
    }

    /// Per block the probability of being kept: Σ_k p_k·option_k.
    pub(crate) fn keep_probability(&self, decisions: &[GroupDecision]) -> Vec<f64> {
        let mut all_blocks = Vec::with_capacity(self.depth());
        for ((group, all), decision) in self.groups.iter().zip(&self.candidates).zip(decisions) {
            let mut blocks = vec![0.0; group.m];
            for (kept, p) in all.iter().zip(&decision.probabilities) {
                kept.iter().for_each(|&i| blocks[i] += p);
            }
            all_blocks.extend(blocks);
        }
        all_blocks
    }

    /// The logits (1, K) of group `g`, checked.
    fn logits<'a>(&self, logits: &'a StateDict, g: usize) -> Result<&'a Tensor> {
        let name = logit_name(g);
        let tensor = logits.require(&name)?;
        let expected = [1, self.candidates[g].len()];
        if tensor.dims() != expected {
            return Err(Error::usage(format!(
                "`{name}` has shape {:?}, expected {expected:?}: it belongs to another pattern",
                tensor.dims()
            )));
        }
        Ok(tensor)
    }
}

/// softmax over the last axis of z (B, K), from operations that all have a backward.
fn softmax(z: &Tensor) -> Result<Tensor> {
    // The softmax does not depend on what is subtracted, so the maximum needs no gradient.
    let exp = z.broadcast_sub(&z.detach().max_keepdim(1)?)?.exp()?; // (B, K) − (B, 1)
    Ok(exp.broadcast_div(&exp.sum_keepdim(1)?)?) // (B, K) / (B, 1)
}

/// The rows of several tensors (B, K), each with a K of its own, read at once: a GPU is waited for once, not for every group.
fn read(all: &[Tensor]) -> Result<Vec<Vec<Vec<f32>>>> {
    let detached: Vec<Tensor> = all.iter().map(Tensor::detach).collect();
    let rows = Tensor::cat(&detached, 1)?.to_vec2::<f32>()?; // (B, ΣK)
    let mut start = 0;
    let mut split = Vec::with_capacity(all.len());
    for tensor in all {
        let end = start + tensor.dim(1)?;
        split.push(rows.iter().map(|row| row[start..end].to_vec()).collect());
        start = end;
    }
    Ok(split)
}

/// The arg-max of every row of `soft` (B, K), whose values are `rows`, as one-hot (B, K), and as indices.
///
/// On the host: the masks are needed there anyway, to run kept and dropped rows apart.
fn one_hot(soft: &Tensor, rows: &[Vec<f32>], g: usize) -> Result<(Tensor, Vec<u32>)> {
    let (batch, width) = soft.dims2()?;
    let mut hard = vec![0f32; batch * width];
    let mut index = Vec::with_capacity(batch);
    for (b, row) in rows.iter().enumerate() {
        finite(row, g)?;
        let k = arg_max(row);
        hard[b * width + k] = 1.0;
        index.push(k as u32);
    }
    Ok((
        Tensor::from_vec(hard, (batch, width), soft.device())?,
        index,
    ))
}

/// Index of the largest value, the first of equals.
fn arg_max<T: PartialOrd + Copy>(values: &[T]) -> usize {
    (1..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

fn finite<T: Copy + Into<f64>>(values: &[T], g: usize) -> Result<()> {
    match values
        .iter()
        .map(|v| (*v).into())
        .find(|v: &f64| !v.is_finite())
    {
        None => Ok(()),
        Some(v) => Err(Error::run(format!(
            "`{}` leads to {v}: the logits are no longer finite",
            logit_name(g)
        ))),
    }
}
