//! Parity of every step of the forward pass with the official DiT (`dit_forward.safetensors`).
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{DType, Device, Tensor};
use tinyfusion_core::{BlockStack, LatentQuery, Plan, StateDict, run};
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

fn query(golden: &Golden) -> LatentQuery {
    LatentQuery {
        x: golden.tensor("in.x"),
        t: times(golden, "in.t"),
        y: ids(golden, "in.y"),
    }
}

/// The labels, those of `in.force_drop_ids` replaced by the null class.
fn forced_labels(f: &Fixture) -> Vec<u32> {
    let drops = f.golden.ids("in.force_drop_ids");
    f.golden
        .ids("in.y")
        .into_iter()
        .zip(drops)
        .map(|(y, drop)| {
            if drop == 1 {
                f.config.num_classes as u32
            } else {
                y
            }
        })
        .collect()
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
        &t_embedder
            .forward(&times(&f.golden, "in.t"), DType::F32)
            .unwrap(),
    );
    f.golden.close(
        "out.t_emb_frac",
        &t_embedder
            .forward(&times(&f.golden, "in.t_frac"), DType::F32)
            .unwrap(),
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
        &y_embedder
            .forward(&ids(&f.golden, "in.y"), DType::F32)
            .unwrap(),
    );
    let forced = forced_labels(&f);
    // Which samples lost their label: our null ids are where the reference dropped.
    let null = f.config.num_classes as u32;
    let lost: Vec<u32> = forced.iter().map(|y| u32::from(*y == null)).collect();
    assert_eq!(lost, f.golden.ids("out.drop_ids"));
    let forced = Tensor::new(forced, &Device::Cpu).unwrap();
    f.golden.close(
        "out.y_emb_train_forced",
        &y_embedder.forward(&forced, DType::F32).unwrap(),
    );
    let net = DiT::new(&f.config, &f.weights).unwrap();
    f.golden.close(
        "out.c",
        &net.condition(
            &times(&f.golden, "in.t"),
            &ids(&f.golden, "in.y"),
            DType::F32,
        )
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
    let (tokens, _) = net.embed(&query(&f.golden)).unwrap();
    f.golden.close("out.tokens0", &tokens);
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
    let query = query(&f.golden);
    let all: Vec<usize> = (0..f.config.depth).collect();
    let trace = run(&net, &query, &Plan::full(f.config.depth).with_taps(all)).unwrap();
    for (i, tap) in trace.taps.iter().enumerate() {
        f.golden.close(&format!("block.{i}"), tap);
    }
    f.golden.close("out.final", &trace.output);
    let dropped = forced_labels(&f);
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
fn golden_final_layer() {
    let f = fixture();
    let (d, p, out) = (
        f.config.hidden_size,
        f.config.patch_size,
        f.config.out_channels(),
    );
    let at = Scope::new(&f.weights, 0.0).at("final_layer");
    let linear = |name: &str, o| layers::Linear::load(&at.at(name), d, o).unwrap();
    let c = ops::silu(&f.golden.tensor("out.c")).unwrap();
    let m = linear("adaLN_modulation.1", 2 * d).forward(&c).unwrap(); // (B, 2·D): shift, scale
    let last = f.golden.tensor(&format!("block.{}", f.config.depth - 1)); // (B, T, D)
    let normed = ops::layer_norm_modulate(&last, &m, 0, 1, 1e-6).unwrap();
    let patches = linear("linear", p * p * out).forward(&normed).unwrap(); // (B, T, p·p·C_out)
    f.golden.close("out.final_layer", &patches);
    // The image is the recorded patches put in place, value for value.
    let recorded = f.golden.tensor("out.final_layer");
    let image = layers::unpatchify(&recorded, f.config.grid(), p, out).unwrap(); // (B, C_out, H, W)
    f.golden.close_within("out.final", &image, 0.0);
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
