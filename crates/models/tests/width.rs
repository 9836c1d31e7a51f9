//! Networks cut in width: what is left computes what the whole would with the removed heads and channels silent.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::laws::{self, Subject};
use tinyfusion_core::{
    BlockStack, Error, LatentQuery, Plan, Result, StateDict, StepRng, TokenQuery, WidthGroups,
    WidthPart, run, stream,
};
use tinyfusion_models::{BlockWidth, DiT, DiTConfig, Mar, MarConfig, SiT, SiTConfig};
use tinyfusion_testing::{flat, largest, max_diff};

const DEPTH: usize = 3;

fn dit() -> DiTConfig {
    DiTConfig {
        input_size: 8,
        patch_size: 4,
        in_channels: 3,
        hidden_size: 24,
        depth: DEPTH,
        num_heads: 4,
        mlp_ratio: 2.0,
        num_classes: 5,
        ..DiTConfig::default()
    }
}

fn mar() -> MarConfig {
    MarConfig {
        img_size: 6,
        vae_stride: 1,
        patch_size: 2,
        encoder_embed_dim: 12,
        encoder_depth: 1,
        encoder_num_heads: 3,
        decoder_embed_dim: 16,
        decoder_depth: 2,
        decoder_num_heads: 4,
        mlp_ratio: 2.0,
        vae_embed_dim: 3,
        class_num: 4,
        buffer_size: 2,
        diffloss_d: 1,
        diffloss_w: 8,
        ..MarConfig::default()
    }
}

/// Every tensor random, the zero-initialised ones included, as large as in the laws of the dense networks: larger ones multiply
/// f32 noise through the gates.
fn random(params: Vec<tinyfusion_core::ParamSpec>) -> StateDict {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    params
        .into_iter()
        .map(|s| {
            let t = rng.normal(s.shape, &Device::Cpu).unwrap();
            (s.name, (t * 0.2).unwrap())
        })
        .collect()
}

fn latents(times: &[f32; 3]) -> LatentQuery {
    LatentQuery {
        x: StepRng::new(6, 0, stream::DRAW)
            .normal((3, 3, 8, 8), &Device::Cpu)
            .unwrap(),
        t: Tensor::new(times, &Device::Cpu).unwrap(),
        y: Tensor::new(&[0u32, 4, 5], &Device::Cpu).unwrap(),
    }
}

fn tokens() -> TokenQuery {
    let row = [1f32, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0];
    TokenQuery {
        tokens: StepRng::new(6, 0, stream::DRAW)
            .normal((2, 9, 12), &Device::Cpu)
            .unwrap(),
        mask: Tensor::new(&[row, row], &Device::Cpu).unwrap(),
        y: Tensor::new(&[0u32, 4], &Device::Cpu).unwrap(),
        dropout: None,
    }
}

fn output<S: BlockStack>(net: &S, query: &S::Input) -> Tensor {
    let depth = net.layout().depth();
    run(net, query, &Plan::full(depth)).unwrap().output
}

/// Some groups of each layer, a different choice in every block; no two blocks need keep equally many.
fn some(groups: &[WidthGroups]) -> Vec<Vec<usize>> {
    let kept = |g: &WidthGroups| (0..g.count).filter(|k| (k + g.block) % 3 != 1).collect();
    groups.iter().map(kept).collect()
}

fn every(groups: &[WidthGroups]) -> Vec<Vec<usize>> {
    groups.iter().map(|g| (0..g.count).collect()).collect()
}

/// The weights with removed groups silenced by hand: zeros in the columns by which a layer's groups reach its output.
fn silenced(weights: &StateDict, groups: &[WidthGroups], kept: &[Vec<usize>]) -> StateDict {
    let mut weights = weights.clone();
    for (groups, kept) in groups.iter().zip(kept) {
        let (name, size) = groups
            .rows
            .iter()
            .find(|r| r.axis == 1)
            .map(|r| (r.tensor.clone(), r.size))
            .unwrap();
        let keep: Vec<f32> = (0..groups.count * size)
            .map(|c| f32::from(u8::from(kept.contains(&(c / size)))))
            .collect();
        let mask = Tensor::new(keep, &Device::Cpu).unwrap();
        let w = weights
            .require(&name)
            .unwrap()
            .broadcast_mul(&mask)
            .unwrap();
        weights.insert(name, w);
    }
    weights
}

/// Keeping everything is the network itself; a removed group is one that is silent.
fn keeps_the_laws<C, S: BlockStack>(
    (config, weights, groups): (&C, &StateDict, Vec<WidthGroups>),
    narrow: impl Fn(&[Vec<usize>]) -> (C, StateDict),
    build: impl Fn(&C, &StateDict) -> S,
    query: &S::Input,
) where
    C: PartialEq + std::fmt::Debug,
{
    let dense = output(&build(config, weights), query);
    let (same, whole) = narrow(&every(&groups));
    assert_eq!(&same, config, "a config says nothing of dense blocks");
    assert_eq!(max_diff(&output(&build(&same, &whole), query), &dense), 0.0);

    let scale = largest(flat(&dense));
    let kept = some(&groups);
    let (config, narrowed) = narrow(&kept);
    assert!(narrowed.elem_count() < weights.elem_count());
    let left = output(&build(&config, &narrowed), query);
    let silent = build(&same, &silenced(weights, &groups, &kept));
    let silent = output(&silent, query);
    let off = max_diff(&left, &silent);
    assert!(off < 2e-6 * scale, "{off} of {scale}");
    assert!(
        max_diff(&left, &dense) > 1e-2 * scale,
        "something was removed"
    );

    // One head of one block, and one channel of it.
    for part in [WidthPart::Heads, WidthPart::Hidden] {
        let mut kept = every(&groups);
        let at = groups.iter().position(|g| g.block == 1 && g.part == part);
        kept[at.unwrap()].remove(1);
        let (config, narrowed) = narrow(&kept);
        let left = output(&build(&config, &narrowed), query);
        let silent = output(&build(&same, &silenced(weights, &groups, &kept)), query);
        let off = max_diff(&left, &silent);
        assert!(off < 2e-6 * scale, "{part:?}: {off} of {scale}");
        assert!(max_diff(&left, &dense) > 1e-4 * scale, "{part:?}");
    }
}

#[test]
fn a_removed_group_is_a_silent_one() {
    let weights = random(dit().params());
    keeps_the_laws(
        (&dit(), &weights, dit().width_groups()),
        |kept| dit().narrow(&weights, kept).unwrap(),
        |config, weights| DiT::new(config, weights).unwrap(),
        &latents(&[3.0, 480.0, 990.0]),
    );
    let sit = SiTConfig(dit());
    keeps_the_laws(
        (&sit, &weights, sit.width_groups()),
        |kept| sit.narrow(&weights, kept).unwrap(),
        |config, weights| SiT::new(config, weights).unwrap(),
        &latents(&[0.1, 0.5, 0.9]),
    );
    let weights = random(mar().params());
    keeps_the_laws(
        (&mar(), &weights, mar().width_groups()),
        |kept| mar().narrow(&weights, kept).unwrap(),
        |config, weights| Mar::new(config, weights).unwrap(),
        &tokens(),
    );
}

/// A DiT whose blocks have widths of their own.
struct Narrow;

impl Narrow {
    fn config() -> DiTConfig {
        let width = |heads, hidden| BlockWidth { heads, hidden };
        dit().with_widths(vec![width(1, 7), width(3, 48), width(4, 1)])
    }
}

impl Subject for Narrow {
    type Net = DiT;
    fn depth(&self) -> usize {
        DEPTH
    }
    fn weights(&self) -> Result<StateDict> {
        Ok(random(Self::config().params()))
    }
    fn build(&self, weights: &StateDict) -> Result<DiT> {
        DiT::new(&Self::config(), weights)
    }
    fn rebuild(&self, weights: &StateDict, kept: &[usize]) -> Result<DiT> {
        let cut = tinyfusion_checkpoint::keep_blocks(weights, "blocks", kept)?;
        DiT::new(&Self::config().with_blocks(kept), &cut)
    }
    fn input(&self, rows: Option<&[usize]>) -> Result<LatentQuery> {
        let q = latents(&[3.0, 480.0, 990.0]);
        let Some(rows) = rows else { return Ok(q) };
        let index: Vec<u32> = rows.iter().map(|&r| r as u32).collect();
        let index = Tensor::new(index, &Device::Cpu)?;
        Ok(LatentQuery {
            x: q.x.index_select(&index, 0)?,
            t: q.t.index_select(&index, 0)?,
            y: q.y.index_select(&index, 0)?,
        })
    }
    fn selections(&self) -> Vec<Vec<usize>> {
        vec![vec![0, 2], vec![1], vec![1, 2]]
    }
    fn is_fixed(&self, name: &str) -> bool {
        DiTConfig::is_fixed(name)
    }
}

/// The audit of gradients among them, and that a cut in depth carries the widths of the kept blocks along.
#[test]
fn a_narrow_dit_keeps_the_laws_of_every_stack() {
    laws::check(&Narrow).unwrap();
}

#[test]
fn a_config_says_only_what_is_not_dense() {
    let dense = serde_json::to_value(dit()).unwrap();
    assert!(dense.get("widths").is_none());
    assert_eq!(serde_json::from_value::<DiTConfig>(dense).unwrap(), dit());
    let config = Narrow::config();
    let text = serde_json::to_value(&config).unwrap();
    assert_eq!(
        text["widths"],
        serde_json::json!([{"heads": 1, "hidden": 7}, {"heads": 3, "hidden": 48}, {"heads": 4, "hidden": 1}])
    );
    assert_eq!(serde_json::from_value::<DiTConfig>(text).unwrap(), config);
    // By hand: 6 values in a head; removed are 3 heads and 41 channels of block 0, a head of 1, 47 channels of 2.
    let (d, head, channel) = (24, 6 * (3 * 25 + 24), 24 + 1 + 24);
    assert_eq!(dit().hidden_size, d);
    assert_eq!(
        dit().parameters() - config.parameters(),
        (3 + 1) * head + (41 + 47) * channel
    );
    // A cut keeps the widths of the blocks it keeps, and forgets them where only dense ones are left.
    assert_eq!(
        config.with_blocks(&[1, 2]).widths,
        Some(config.widths.as_ref().unwrap()[1..].to_vec())
    );
    let one = dit().with_widths(vec![
        dit().block_width(0),
        config.block_width(0),
        dit().block_width(2),
    ]);
    assert_eq!(one.with_blocks(&[0, 2]).widths, None);
    let (cut, weights) = mar()
        .narrow(&random(mar().params()), &some(&mar().width_groups()))
        .unwrap();
    let (shallow, weights) = cut.keep(&weights, &[0, 2]).unwrap();
    weights.check(&shallow.params()).unwrap();
    assert_eq!(shallow.block_width(1), cut.block_width(2));
}

#[test]
fn widths_that_do_not_fit_are_named() {
    let width = |heads, hidden| BlockWidth { heads, hidden };
    let good = width(2, 5);
    for (widths, says) in [
        (vec![good; 2], "2 entries for 3 blocks"),
        (vec![good, good, width(0, 5)], "widths[2].heads is 0"),
        (
            vec![good, width(5, 5), good],
            "widths[1].heads is 5; it must be in 1..=4",
        ),
        (vec![width(1, 0), good, good], "widths[0].hidden is 0"),
        (vec![width(1, usize::MAX), good, good], "1..=48"),
    ] {
        let config = DiTConfig {
            widths: Some(widths.clone()),
            ..dit()
        };
        let error = config.validate().unwrap_err();
        assert!(
            matches!(&error, Error::Usage(m) if m.contains(says)),
            "{error}"
        );
        let config = MarConfig {
            mlp_ratio: 4.0,
            encoder_num_heads: 4,
            widths: Some(widths),
            ..mar()
        };
        assert!(config.validate().is_err());
    }
    assert!(
        Narrow::config().with_depth(2).validate().is_err(),
        "widths stay and do not fit"
    );
    let unknown = serde_json::json!({ "widths": [{ "heads": 1, "hidden": 1, "mlp": 2 }] });
    assert!(serde_json::from_value::<DiTConfig>(unknown).is_err());
}

#[test]
fn groups_that_cannot_be_kept_are_refused() {
    let weights = random(dit().params());
    let groups = dit().width_groups();
    for (at, kept, says) in [
        (0, vec![], "block 0: none of its 4 heads"),
        (2, vec![1, 0], "block 1: kept heads must ascend"),
        (3, vec![3, 3], "block 1: kept hidden channels must ascend"),
        (5, vec![0, 48], "hidden channels 48 cannot be kept"),
    ] {
        let mut all = every(&groups);
        all[at] = kept;
        let error = dit().narrow(&weights, &all).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = dit().narrow(&weights, &every(&groups)[1..]).unwrap_err();
    assert!(error.to_string().contains("5 layers"), "{error}");
    let mut other = weights.clone();
    let wrong = Tensor::zeros((24, 30), DType::F32, &Device::Cpu).unwrap();
    other.insert("blocks.2.mlp.fc2.weight", wrong);
    let error = dit()
        .narrow(&other, &every(&groups))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("blocks.2.mlp.fc2.weight") && error.contains("[24, 30]"),
        "{error}"
    );
}
