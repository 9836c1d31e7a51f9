//! Parity of every step of the forward pass with the official DiT (`dit_forward.safetensors`).
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Device, Tensor};
use tinyfusion_core::{LatentQuery, Plan, StateDict, run};
use tinyfusion_models::{DiT, DiTConfig};
use tinyfusion_nn::{Scope, layers, ops};
use tinyfusion_testing::Golden;

struct Fixture {
    golden: Golden,
    config: DiTConfig,
    weights: StateDict,
}

fn fixture() -> Fixture {
    let golden = Golden::open("dit_forward.safetensors");
    let config: DiTConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
    let weights: StateDict = golden.strip("w.").into_iter().collect();
    weights
        .check(&config.params())
        .expect("the official keys are ours");
    Fixture {
        golden,
        config,
        weights,
    }
}

fn ids(golden: &Golden, key: &str) -> Tensor {
    Tensor::new(golden.ids(key), &Device::Cpu).unwrap()
}

fn times(golden: &Golden, key: &str) -> Tensor {
    golden
        .tensor(key)
        .to_dtype(candle_core::DType::F32)
        .unwrap()
}

#[test]
fn golden_embeddings() {
    let f = fixture();
    let root = Scope::new(&f.weights, 0.0);
    let d = f.config.hidden_size;
    let t_embedder = layers::TimestepEmbedder::load(&root.at("t_embedder"), d).unwrap();
    f.golden.close(
        "out.t_freq",
        &layers::timestep_frequencies(&times(&f.golden, "in.t")).unwrap(),
    );
    f.golden.close(
        "out.t_emb",
        &t_embedder.forward(&times(&f.golden, "in.t")).unwrap(),
    );
    f.golden.close(
        "out.t_emb_frac",
        &t_embedder.forward(&times(&f.golden, "in.t_frac")).unwrap(),
    );
    let rows = f
        .weights
        .require("y_embedder.embedding_table.weight")
        .unwrap()
        .dim(0)
        .unwrap();
    let y_embedder = layers::LabelEmbedder::load(&root.at("y_embedder"), rows, d).unwrap();
    f.golden.close(
        "out.y_emb_eval",
        &y_embedder.forward(&ids(&f.golden, "in.y")).unwrap(),
    );
    let forced: Vec<u32> = f
        .golden
        .ids("in.y")
        .into_iter()
        .zip(f.golden.ids("in.force_drop_ids"))
        .map(|(y, drop)| {
            if drop == 1 {
                f.config.num_classes as u32
            } else {
                y
            }
        })
        .collect();
    let forced = Tensor::new(forced, &Device::Cpu).unwrap();
    f.golden.close(
        "out.y_emb_train_forced",
        &y_embedder.forward(&forced).unwrap(),
    );
    let net = DiT::new(&f.config, &f.weights).unwrap();
    f.golden.close(
        "out.c",
        &net.condition(&times(&f.golden, "in.t"), &ids(&f.golden, "in.y"))
            .unwrap(),
    );
    let patch = layers::PatchEmbed::load(
        &root.at("x_embedder"),
        f.config.in_channels,
        f.config.patch_size,
        d,
    )
    .unwrap();
    f.golden.close(
        "out.x_embed",
        &patch.forward(&f.golden.tensor("in.x")).unwrap(),
    );
}

#[test]
fn golden_positions() {
    let f = fixture();
    let ours = layers::sincos_2d(f.config.hidden_size, f.config.grid(), &Device::Cpu).unwrap();
    f.golden.close("pos_embed", &ours);
    f.golden.close_within("pos_embed_f64", &ours, 1e-7);
    let xl = DiTConfig::default();
    let table = layers::sincos_2d(xl.hidden_size, xl.grid(), &Device::Cpu).unwrap();
    let rows = table
        .squeeze(0)
        .unwrap()
        .index_select(&ids(&f.golden, "in.xl_rows"), 0)
        .unwrap();
    f.golden.close("pos_embed_xl_rows", &rows);
}

#[test]
fn golden_inside_the_first_block() {
    let f = fixture();
    let (d, at) = (
        f.config.hidden_size,
        Scope::new(&f.weights, 0.0).at("blocks.0"),
    );
    let linear = |name: &str, i, o| layers::Linear::load(&at.at(name), i, o).unwrap();
    let c = ops::silu(&f.golden.tensor("out.c")).unwrap();
    let m = linear("adaLN_modulation.1", d, 6 * d).forward(&c).unwrap();
    f.golden.close("block.0.adaln", &m);
    let x = f.golden.tensor("out.tokens0");
    let attn_in = ops::layer_norm_modulate(&x, &m, 0, 1, 1e-6).unwrap();
    f.golden.close("block.0.attn_in", &attn_in);
    let attention = layers::Attention::load(&at.at("attn"), d, f.config.num_heads).unwrap();
    let attn = attention.forward(&attn_in).unwrap();
    f.golden.close("block.0.attn_out", &attn);
    let x = ops::gated_residual(&x, &attn, &m, 2).unwrap();
    let mlp_in = ops::layer_norm_modulate(&x, &m, 3, 4, 1e-6).unwrap();
    f.golden.close("block.0.mlp_in", &mlp_in);
    let mlp = layers::Mlp::load(&at.at("mlp"), d, f.config.mlp_hidden())
        .unwrap()
        .forward(&mlp_in)
        .unwrap();
    f.golden.close("block.0.mlp_out", &mlp);
    f.golden
        .close("block.0", &ops::gated_residual(&x, &mlp, &m, 5).unwrap());
}

#[test]
fn golden_blocks_and_output() {
    let f = fixture();
    let net = DiT::new(&f.config, &f.weights).unwrap();
    let query = LatentQuery {
        x: f.golden.tensor("in.x"),
        t: times(&f.golden, "in.t"),
        y: ids(&f.golden, "in.y"),
    };
    let all: Vec<usize> = (0..f.config.depth).collect();
    let trace = run(&net, &query, &Plan::full(f.config.depth).with_taps(all)).unwrap();
    for (i, tap) in trace.taps.iter().enumerate() {
        f.golden.close(&format!("block.{i}"), tap);
    }
    f.golden.close("out.final", &trace.output);
    let dropped: Vec<u32> = f
        .golden
        .ids("in.y")
        .into_iter()
        .zip(f.golden.ids("in.force_drop_ids"))
        .map(|(y, drop)| {
            if drop == 1 {
                f.config.num_classes as u32
            } else {
                y
            }
        })
        .collect();
    let query = LatentQuery {
        y: Tensor::new(dropped, &Device::Cpu).unwrap(),
        ..query
    };
    f.golden.close(
        "out.final_forced_drop",
        &run(&net, &query, &Plan::full(f.config.depth))
            .unwrap()
            .output,
    );
}

#[test]
fn golden_raw_output_under_guidance() {
    let f = fixture();
    let net = DiT::new(&f.config, &f.weights).unwrap();
    let x = f.golden.tensor("in.cfg_x");
    let half = x.narrow(0, 0, x.dim(0).unwrap() / 2).unwrap();
    let query = LatentQuery {
        x: Tensor::cat(&[&half, &half], 0).unwrap(),
        t: times(&f.golden, "in.cfg_t"),
        y: ids(&f.golden, "in.cfg_y"),
    };
    f.golden.close(
        "out.cfg_raw",
        &run(&net, &query, &Plan::full(f.config.depth))
            .unwrap()
            .output,
    );
}
