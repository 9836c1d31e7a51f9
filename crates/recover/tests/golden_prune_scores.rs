//! Parity with the reference's ShortGPT script (`prune_scores.safetensors`): scores per batch and over all, the blocks that
//! go, and what the cut network says.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{Device, Tensor};
use tinyfusion_core::{LatentQuery, Plan, Result, StateDict, StepRng, run};
use tinyfusion_diffusion::Objective;
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_recover::criteria::{BlockInfluence, Choice, Criterion, Judgement, Subject};
use tinyfusion_testing::Golden;

/// The questions of the file: clean latents at timesteps of the sampler.
struct Recorded;

impl Objective<DiT> for Recorded {
    type Batch = LatentQuery;
    type Draw = LatentQuery;
    type Prediction = Tensor;

    fn draw(&self, query: &LatentQuery, _: &mut StepRng) -> Result<LatentQuery> {
        Ok(query.clone())
    }
    fn rows(&self, _: &LatentQuery, _: usize, _: usize) -> Result<LatentQuery> {
        unreachable!("nothing is trained")
    }
    fn input(&self, _: &LatentQuery) -> Result<LatentQuery> {
        unreachable!("the reference scores without noise")
    }
    fn noise_free(&self, query: &LatentQuery) -> Result<LatentQuery> {
        Ok(query.clone())
    }
    fn predict(&self, _: &DiT, output: Tensor, _: &LatentQuery) -> Result<Tensor> {
        Ok(output)
    }
    fn loss(&self, _: &Tensor, _: &LatentQuery) -> Result<Tensor> {
        unreachable!("only hidden states are compared")
    }
    fn distill(&self, _: &Tensor, _: &Tensor, _: &LatentQuery) -> Result<Tensor> {
        unreachable!("there is no student")
    }
}

struct Fixture {
    golden: Golden,
    config: DiTConfig,
    weights: StateDict,
    batches: Vec<LatentQuery>,
}

fn fixture() -> Fixture {
    let golden = Golden::open("prune_scores.safetensors");
    let config: DiTConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
    let weights: StateDict = golden.strip("w.").into_iter().collect();
    weights.check(&config.params()).unwrap();
    let batches = (0..golden.config["batches"].as_u64().unwrap())
        .map(|b| {
            let t: Vec<f32> = golden
                .ids(&format!("in.{b}.t"))
                .into_iter()
                .map(|t| t as f32)
                .collect();
            LatentQuery {
                x: golden.tensor(&format!("in.{b}.x")),
                t: Tensor::new(t, &Device::Cpu).unwrap(),
                y: Tensor::new(golden.ids(&format!("in.{b}.y")), &Device::Cpu).unwrap(),
            }
        })
        .collect();
    Fixture {
        golden,
        config,
        weights,
        batches,
    }
}

/// The reference's scores of the batches, with so many blocks removed.
fn judge(fixture: &Fixture, batches: &[LatentQuery], removed: usize) -> Judgement {
    let net = DiT::new(&fixture.config, &fixture.weights.detached()).unwrap();
    let subject = Subject {
        net: &net,
        weights: &fixture.weights,
        block_of: &|_| None,
        objective: &Recorded,
        choice: Choice::Any(fixture.config.depth - removed),
        batches: &|k| Ok(batches[k as usize].clone()),
        batch_count: batches.len() as u64,
        seed: 0,
        lanes: 1,
        passed: &|| Ok(()),
    };
    let reference = BlockInfluence { reference: true };
    Box::new(reference).choose(&subject).unwrap()
}

/// The file has similarities, E[cos].
fn similarities(judgement: &Judgement) -> Vec<f32> {
    let similarity = |b: &tinyfusion_recover::criteria::BlockScore| (1.0 - b.score) as f32;
    judgement.blocks.iter().map(similarity).collect()
}

#[test]
fn golden_block_influence_scores() {
    let fixture = fixture();
    let mut rows = Vec::new();
    for batch in &fixture.batches {
        rows.extend(similarities(&judge(
            &fixture,
            std::slice::from_ref(batch),
            1,
        )));
    }
    let shape = (fixture.batches.len(), fixture.config.depth);
    let per_batch = Tensor::from_vec(rows, shape, &Device::Cpu).unwrap();
    fixture.golden.close("scores.per_batch", &per_batch);
    let mean = similarities(&judge(&fixture, &fixture.batches, 1));
    let mean = Tensor::new(mean, &Device::Cpu).unwrap();
    fixture.golden.close("scores.mean", &mean);
}

#[test]
fn golden_pruned_by_block_influence() {
    let fixture = fixture();
    let counts = fixture.golden.config["n_pruned"].as_array().unwrap();
    for n in counts.iter().map(|n| n.as_u64().unwrap()) {
        let judgement = judge(&fixture, &fixture.batches, n as usize);
        let kept: Vec<u32> = judgement.selection.kept.iter().map(|k| *k as u32).collect();
        assert_eq!(kept, fixture.golden.ids(&format!("pruned.{n}.kept")), "{n}");
        // Most alike first.
        let mut blocks = judgement.blocks.clone();
        blocks.pop();
        blocks.sort_by(|a, b| a.score.total_cmp(&b.score));
        let order: Vec<u32> = blocks
            .iter()
            .take(n as usize)
            .map(|b| b.block as u32)
            .collect();
        let expected = fixture
            .golden
            .ids(&format!("pruned.{n}.removed_topk_order"));
        assert_eq!(order, expected, "{n}");

        let net = DiT::new(&fixture.config, &fixture.weights.detached()).unwrap();
        let plan = Plan::keep(fixture.config.depth, &judgement.selection.kept);
        let output = run(&net, &fixture.batches[0], &plan).unwrap().output;
        fixture.golden.close(&format!("pruned.{n}.output"), &output);
    }
}
