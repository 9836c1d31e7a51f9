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
    /// Per block, per sample: what the mask says, for the host.
    pub kept: Vec<Vec<bool>>,
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
        let soft = self.soft(logits, noise, temperature)?;
        let index = drawn(&soft)?;
        self.masks(soft, index)
    }

    /// Per group, per row of `noise` (per group (B, K)), the candidate that [`sample`](Self::sample) draws. The host reads
    /// it, and so waits for a GPU; it may ask for all samples of a step at once and make the masks of a part of them with
    /// [`sample_drawn`](Self::sample_drawn).
    pub fn draw(
        &self,
        logits: &StateDict,
        noise: &[Tensor],
        temperature: Temperature,
    ) -> Result<Vec<Vec<u32>>> {
        drawn(&self.soft(&logits.detached(), noise, temperature)?)
    }

    /// As [`sample`](Self::sample), where [`draw`](Self::draw) has said which candidates: `index` per group and sample.
    pub fn sample_drawn(
        &self,
        logits: &StateDict,
        noise: &[Tensor],
        temperature: Temperature,
        index: Vec<Vec<u32>>,
    ) -> Result<Sampled> {
        self.masks(self.soft(logits, noise, temperature)?, index)
    }

    /// Per group softmax((scale·logits + noise)/τ), (B, K).
    fn soft(
        &self,
        logits: &StateDict,
        noise: &[Tensor],
        temperature: Temperature,
    ) -> Result<Vec<Tensor>> {
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
        soft.collect()
    }

    /// The masks of the candidates `index`, with the gradient of `soft`.
    fn masks(&self, soft: Vec<Tensor>, index: Vec<Vec<u32>>) -> Result<Sampled> {
        let hard = one_hot(&soft, &index)?; // (B, K) each
        let masks = soft.iter().zip(hard).zip(&self.options);
        let masks = masks.map(|((soft, hard), options)| {
            // In this order: soft − soft is exactly 0, so the value is exactly the one-hot's.
            let y = (hard + (soft - soft.detach())?)?;
            Ok(y.matmul(options)?) // (B, K) × (K, M) = (B, M)
        });
        Ok(Sampled {
            mask: Tensor::cat(&masks.collect::<Result<Vec<_>>>()?, 1)?, // (B, depth)
            kept: self.kept_by_block(&index),
            soft,
            index,
        })
    }

    /// Per block, per sample, whether the candidates `index` (per group and sample) keep it.
    fn kept_by_block(&self, index: &[Vec<u32>]) -> Vec<Vec<bool>> {
        let groups = self.groups.iter().zip(&self.candidates).zip(index);
        groups
            .flat_map(|((group, candidates), index)| {
                (0..group.m).map(move |i| {
                    let keeps = |k: &u32| candidates[*k as usize].contains(&i);
                    index.iter().map(keeps).collect()
                })
            })
            .collect()
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
        let all = (0..self.groups.len())
            .map(|g| Ok(self.logits(logits, g)?.detach()))
            .collect::<Result<Vec<_>>>()?;
        // Read at once, so that a GPU is waited for once.
        let all = Tensor::cat(&all, 1)?
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?; // (ΣK,)
        let mut rest = all.as_slice();
        let groups = self.candidates.iter().enumerate();
        groups
            .map(|(g, candidates)| {
                let (values, others) = rest.split_at(candidates.len());
                rest = others;
                finite(values, g)?;
                let chosen = arg_max(values);
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

/// Per group, per sample the most likely candidate of `soft` (B, K).
///
/// On the host: there it is decided which samples run through which block. All groups are read at once, so that a GPU is
/// waited for once.
fn drawn(soft: &[Tensor]) -> Result<Vec<Vec<u32>>> {
    let detached: Vec<Tensor> = soft.iter().map(Tensor::detach).collect();
    let rows = Tensor::cat(&detached, 1)?.to_vec2::<f32>()?; // (B, ΣK)
    let mut start = 0;
    let mut index = Vec::with_capacity(soft.len());
    for (g, soft) in soft.iter().enumerate() {
        let end = start + soft.dim(1)?;
        let of = |row: &Vec<f32>| {
            let row = &row[start..end];
            finite(row, g)?;
            Ok(arg_max(row) as u32)
        };
        index.push(rows.iter().map(of).collect::<Result<_>>()?);
        start = end;
    }
    Ok(index)
}

/// Per group the one-hot rows of `index`, in the shape of `soft` (B, K) and beside it; they go there in one copy.
fn one_hot(soft: &[Tensor], index: &[Vec<u32>]) -> Result<Vec<Tensor>> {
    if soft.len() != index.len() {
        return Err(Error::usage(format!(
            "candidates for {} groups, expected {}",
            index.len(),
            soft.len()
        )));
    }
    let mut hard = Vec::new();
    let mut places = Vec::with_capacity(soft.len());
    for (g, (soft, index)) in soft.iter().zip(index).enumerate() {
        let (batch, width) = soft.dims2()?;
        if batch != index.len() || index.iter().any(|k| *k as usize >= width) {
            return Err(Error::usage(format!(
                "group {g}: expected {batch} numbers of candidates below {width}, found {index:?}"
            )));
        }
        let start = hard.len();
        places.push((start, batch, width));
        hard.resize(start + batch * width, 0f32);
        for (b, k) in index.iter().enumerate() {
            hard[start + b * width + *k as usize] = 1.0;
        }
    }
    let device = soft.first().map_or(&Device::Cpu, Tensor::device);
    let hard = Tensor::new(hard, device)?;
    let one = |(start, batch, width)| {
        Ok(hard
            .narrow(0, start, batch * width)?
            .reshape((batch, width))?)
    };
    places.into_iter().map(one).collect()
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
