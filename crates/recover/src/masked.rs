use std::ops::Range;

use candle_core::{Device, Tensor, Var};
use tinyfusion_core::{BlockStack, Plan, Result, StateDict, run, run_exact};
use tinyfusion_diffusion::Objective;
use tinyfusion_mask::{MaskSampler, Sampled, Temperature};

use crate::delta::trainable;
use crate::{Blend, LearnConfig};

/// The trained network whose blocks are in question, and how to build it.
pub struct Teacher<'a, S> {
    /// Its weights, f32. They are not changed, and those that are copied to be trained are freed unless somebody else
    /// holds them: a clone (which shares them) keeps them, giving them away saves their memory.
    pub weights: StateDict,
    /// Whether the tensor of that name is a fixed table rather than a trained weight.
    pub is_fixed: &'a dyn Fn(&str) -> bool,
    /// The network on weights that may have low-rank factors beside them, to be scaled by the number
    /// (α/r). It must share the weights' storage, as every network of this workspace does.
    pub build: &'a dyn Fn(&StateDict, f64) -> Result<S>,
}

/// What is trained, by name.
#[derive(Debug)]
pub struct Variables {
    /// The weight update; empty if frozen.
    pub weights: Vec<(String, Var)>,
    /// The logits `mask.logits.{g}` (1, K) of every group.
    pub logits: Vec<(String, Var)>,
}

/// Everything random of one learning step.
#[derive(Debug)]
pub struct Drawn<D> {
    /// The objective's draw.
    pub draw: D,
    /// Gumbel noise per group (B, K).
    pub noise: Vec<Tensor>,
    /// τ and scale of the step.
    pub temperature: Temperature,
}

/// Which candidate each group's mask is, for every sample of a step.
#[derive(Debug, Clone)]
pub struct Candidates(Vec<Vec<u32>>);

impl Candidates {
    /// Those of some samples, per group.
    fn rows(&self, rows: &Range<usize>) -> Vec<Vec<u32>> {
        let of = |group: &Vec<u32>| group.get(rows.clone()).unwrap_or_default().to_vec();
        self.0.iter().map(of).collect()
    }
}

/// A network whose depth is random: every forward samples one mask per sample and blends the blocks
/// by it (TinyFusion, arXiv 2412.01199).
pub struct MaskedStack<S> {
    net: S,
    /// The same network on the same storage, recording nothing: it follows every update.
    untracked: S,
    sampler: MaskSampler,
    logits: StateDict,
    blend: Blend,
}

impl<S: BlockStack> MaskedStack<S> {
    /// The teacher with `config`'s weight update and fresh logits, and the variables of both.
    pub fn new(config: &LearnConfig, teacher: Teacher<'_, S>) -> Result<(Self, Variables)> {
        config.validate()?;
        let device = teacher
            .weights
            .iter()
            .next()
            .map_or(Device::Cpu, |(_, t)| t.device().clone());
        let ready = trainable(
            teacher.weights,
            &config.delta,
            teacher.is_fixed,
            config.seed,
            &device,
        )?;
        let net = (teacher.build)(&ready.weights, ready.lora_scale)?;
        let untracked = (teacher.build)(&ready.weights.detached(), ready.lora_scale)?;
        let sampler = MaskSampler::new(config.pattern.groups(net.layout())?, &device)?;
        let mut logits = sampler.initial_logits()?;
        let variables = Variables {
            weights: ready.vars,
            logits: logits.make_trainable(|_| true)?,
        };
        Ok((
            Self {
                net,
                untracked,
                sampler,
                logits,
                blend: config.blend,
            },
            variables,
        ))
    }

    /// How masks are sampled.
    pub fn sampler(&self) -> &MaskSampler {
        &self.sampler
    }

    /// The network's output for `input` with one mask per sample, drawn by `noise` (per group (B, K)).
    pub fn output(
        &self,
        input: &S::Input,
        noise: &[Tensor],
        temperature: Temperature,
    ) -> Result<Tensor> {
        self.blended(
            input,
            self.sampler.sample(&self.logits, noise, temperature)?,
        )
    }

    /// The network's output for `input` with the masks `sampled`.
    fn blended(&self, input: &S::Input, sampled: Sampled) -> Result<Tensor> {
        let plan = Plan::blend_known(&sampled.mask, sampled.kept)?;
        let trace = match self.blend {
            Blend::Exact => run_exact(&self.net, &self.untracked, input, &plan)?,
            Blend::Plain => run(&self.net, input, &plan)?,
        };
        Ok(trace.output)
    }

    /// The candidates that a step draws for its masks, per group and sample. A GPU is waited for here, and not again by
    /// [`losses`](Self::losses) of all parts of the draw.
    pub fn candidates<D>(&self, drawn: &Drawn<D>) -> Result<Candidates> {
        let Drawn {
            noise, temperature, ..
        } = drawn;
        let drawn = self.sampler.draw(&self.logits, noise, *temperature)?;
        Ok(Candidates(drawn))
    }

    /// The objective's loss (R,) of the samples `rows` of a draw, with its graph to the variables. `candidates` are those
    /// of the whole draw by the logits as they are.
    pub fn losses<O: Objective<S>>(
        &self,
        objective: &O,
        drawn: &Drawn<O::Draw>,
        candidates: &Candidates,
        rows: Range<usize>,
    ) -> Result<Tensor> {
        let draw = objective.rows(&drawn.draw, rows.start, rows.len())?;
        let noise = drawn
            .noise
            .iter()
            .map(|n| n.narrow(0, rows.start, rows.len())) // (R, K)
            .collect::<candle_core::Result<Vec<_>>>()?;
        let index = candidates.rows(&rows); // too few of another draw are an error of the sampler
        let sampled = self
            .sampler
            .sample_drawn(&self.logits, &noise, drawn.temperature, index)?;
        let output = self.blended(&objective.input(&draw)?, sampled)?;
        objective.loss(&objective.predict(&self.net, output, &draw)?, &draw)
    }
}
