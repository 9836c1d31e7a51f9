//! Networks told by the names and shapes of their tensors; the names of diffusers both ways.
#![allow(clippy::unwrap_used)] // a test may panic

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use tinyfusion_checkpoint::{Checkpoint, DTypePolicy, Root, load};
use tinyfusion_core::{Error, LatentQuery, ParamSpec, Plan, StateDict, run};
use tinyfusion_models::import::{Hints, Kind, Recognised, Sizes, diffusers, recognise};
use tinyfusion_models::{DiT, DiTConfig, MarConfig, SiTConfig, preset, presets};
use tinyfusion_testing::{largest, max_diff};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../assets/golden/checkpoints")
        .join(name)
}

fn of(params: &[ParamSpec], hints: Hints) -> Result<Recognised, Error> {
    let shapes = params
        .iter()
        .map(|p| (p.name.as_str(), p.shape.as_slice()))
        .collect();
    recognise(&shapes, None, &hints)
}

fn as_kind(kind: Kind) -> Hints {
    Hints {
        kind: Some(kind),
        ..Hints::default()
    }
}

#[test]
fn every_published_size_is_recognised() {
    for p in presets() {
        let found = of(&p.config.params(), as_kind(Kind::Dit)).unwrap();
        assert_eq!(found.sizes, Sizes::Dit(p.config.clone()), "{}", p.name);
        let assumed = found.assumed.join("\n");
        assert!(
            assumed.contains(&format!("{} heads", p.config.num_heads)),
            "{assumed}"
        );
    }
    for p in SiTConfig::presets() {
        let found = of(&p.config.params(), as_kind(Kind::Sit)).unwrap();
        assert_eq!(found.sizes, Sizes::Sit(p.config), "{}", p.name);
    }
    for p in MarConfig::presets() {
        let found = of(&p.config.params(), Hints::default()).unwrap();
        assert_eq!(found.sizes, Sizes::Mar(p.config), "{}", p.name);
    }
}

#[test]
fn what_shapes_do_not_tell_is_asked_for() {
    let xl = preset("DiT-D14/2").unwrap();
    let error = of(&xl.params(), Hints::default()).unwrap_err();
    assert!(matches!(error, Error::Usage(_)), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("#family=dit") && text.contains("#family=sit"),
        "{text}"
    );
    let odd = DiTConfig {
        hidden_size: 24,
        num_heads: 3,
        depth: 2,
        num_classes: 7,
        learn_sigma: false,
        ..xl.clone()
    };
    let error = of(&odd.params(), as_kind(Kind::Dit)).unwrap_err();
    assert!(
        matches!(error, Error::Usage(_)) && error.to_string().contains("#heads=N"),
        "{error}"
    );
    let hints = Hints {
        num_heads: Some(3),
        num_classes: Some(7),
        ..as_kind(Kind::Dit)
    };
    assert_eq!(
        of(&odd.params(), hints).unwrap().sizes,
        Sizes::Dit(odd.clone())
    );
    // Eight rows and eight classes: no null class.
    let hints = Hints {
        num_classes: Some(8),
        ..hints
    };
    let Sizes::Dit(found) = of(&odd.params(), hints).unwrap().sizes else {
        panic!("a DiT");
    };
    assert_eq!((found.num_classes, found.class_dropout_prob), (8, 0.0));
    for (hints, says) in [
        (
            Hints {
                num_classes: Some(3),
                ..hints
            },
            "8 rows",
        ),
        (as_kind(Kind::Mar), "family"),
        (
            Hints {
                num_heads: Some(5),
                ..hints
            },
            "5 heads",
        ),
    ] {
        let error = of(&odd.params(), hints).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let mar = MarConfig::default();
    let error = of(&mar.params(), as_kind(Kind::Sit)).unwrap_err();
    assert!(error.to_string().contains("MAR"), "{error}");
}

#[test]
fn tensors_that_do_not_fit_name_the_key() {
    let config = preset("DiT-S/4").unwrap();
    let changed = |change: &dyn Fn(&mut Vec<ParamSpec>)| {
        let mut params = config.params();
        change(&mut params);
        of(&params, as_kind(Kind::Dit)).unwrap_err().to_string()
    };
    let find = |params: &mut Vec<ParamSpec>, name: &str| {
        params.iter().position(|p| p.name == name).unwrap()
    };
    let error = changed(&|p| {
        let i = find(p, "blocks.3.attn.proj.bias");
        p.remove(i);
    });
    assert!(
        error.contains("missing `blocks.3.attn.proj.bias` [384]"),
        "{error}"
    );
    let error = changed(&|p| {
        let i = find(p, "blocks.3.mlp.fc2.weight");
        p[i].shape = vec![384, 3];
    });
    assert!(
        error.contains("[384, 3]") && error.contains("[384, 1536]"),
        "{error}"
    );
    let error = changed(&|p| p.retain(|p| !p.name.starts_with("blocks.3.")));
    assert!(error.contains("no block 3"), "{error}");
    let error = changed(&|p| {
        let i = find(p, "blocks.5.attn.qkv.weight");
        p[i].shape[0] = 3 * 320;
    });
    assert!(
        error.contains("cut in width") && error.contains("block 5"),
        "{error}"
    );
    let error = changed(&|p| {
        let i = find(p, "pos_embed");
        p[i].shape[1] = 63;
    });
    assert!(error.contains("no square"), "{error}");
    let error = changed(&|p| {
        let i = find(p, "final_layer.linear.weight");
        p[i].shape[0] = 5;
    });
    assert!(error.contains("final_layer.linear.weight"), "{error}");
    let error = changed(&|p| {
        let i = find(p, "x_embedder.proj.weight");
        p[i].shape.pop();
    });
    assert!(error.contains("4 sides"), "{error}");
    let other = [ParamSpec {
        name: "conv_in.weight".into(),
        shape: vec![1],
    }];
    let error = of(&other, Hints::default()).unwrap_err().to_string();
    assert!(
        error.contains("conv_in.weight") && error.contains("no DiT"),
        "{error}"
    );
}

#[test]
fn sizes_that_are_absurd_are_errors() {
    let config = preset("DiT-S/2").unwrap();
    for name in [
        "x_embedder.proj.weight",
        "pos_embed",
        "y_embedder.embedding_table.weight",
    ] {
        for axis in 0..2 {
            for huge in [0, usize::MAX, 1 << 62] {
                let mut params = config.params();
                let i = params.iter().position(|p| p.name == name).unwrap();
                params[i].shape[axis] = huge;
                of(&params, as_kind(Kind::Dit)).unwrap_err();
            }
        }
    }
}

/// What diffusers' own network answered (time frequencies as in the official code), from its folder.
#[test]
fn a_folder_of_diffusers_computes_what_diffusers_does() {
    let checkpoint = Checkpoint::open(golden("pipeline")).unwrap();
    let tensors = checkpoint.tensors(Root::Plain);
    let shapes = tensors
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice()))
        .collect();
    let found = recognise(&shapes, checkpoint.config(), &Hints::default()).unwrap();
    let Sizes::Dit(config) = &found.sizes else {
        panic!("a DiT");
    };
    assert_eq!(
        (config.depth, config.num_heads, config.num_classes),
        (2, 2, 3)
    );
    let weights = checkpoint
        .load(Root::Plain, DTypePolicy::F32, &Device::Cpu)
        .unwrap();
    let weights = found.translate(&weights.tensors).unwrap();
    weights.check(&config.params()).unwrap();
    let answers = load(golden("pipeline/answers.safetensors"), &Device::Cpu)
        .unwrap()
        .tensors;
    let get = |name: &str| answers.require(name).unwrap().clone();
    let query = LatentQuery {
        x: get("in.x"),
        t: get("in.t").to_dtype(DType::F32).unwrap(),
        y: get("in.y").to_dtype(DType::U32).unwrap(),
    };
    let net = DiT::new(config, &weights).unwrap();
    let ours = run(&net, &query, &Plan::full(config.depth)).unwrap().output;
    let theirs = get("out");
    let scale = largest(tinyfusion_testing::flat(&theirs));
    let apart = max_diff(&ours, &theirs);
    assert!(apart <= 1e-5 * scale, "{apart} of {scale}");
    // Frequencies agree at t = 0 whatever they are divided by: as diffusers is, without a change.
    let (first, as_is) = (
        ours.narrow(0, 0, 1).unwrap(),
        get("out.as_is").narrow(0, 0, 1).unwrap(),
    );
    assert!(max_diff(&first, &as_is) <= 1e-5 * scale);
    // And elsewhere they do not: what the export's card says.
    assert!(max_diff(&ours, &get("out.as_is")) > 1e-3 * scale);
}

#[test]
fn blocks_with_embedders_of_their_own_are_an_error() {
    let config = DiTConfig {
        hidden_size: 8,
        num_heads: 2,
        depth: 2,
        ..DiTConfig::default()
    };
    let weights = config.init(1, &Device::Cpu).unwrap();
    let (described, mut theirs) = diffusers::export(&config, &weights).unwrap();
    let name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias";
    theirs.insert(name, Tensor::ones(8, DType::F32, &Device::Cpu).unwrap());
    let shapes = theirs.iter().map(|(n, t)| (n, t.dims())).collect();
    let found = recognise(&shapes, Some(&described), &Hints::default()).unwrap();
    let error = found.translate(&theirs).unwrap_err().to_string();
    assert!(
        error.contains(name) && error.contains("another block"),
        "{error}"
    );
}

#[test]
fn what_diffusers_cannot_hold() {
    let config = DiTConfig {
        hidden_size: 8,
        num_heads: 2,
        depth: 1,
        ..DiTConfig::default()
    };
    let error = |config: &DiTConfig| {
        let weights = config.init(1, &Device::Cpu).unwrap();
        diffusers::export(config, &weights).unwrap_err().to_string()
    };
    let narrow = tinyfusion_models::BlockWidth {
        heads: 1,
        hidden: 8,
    };
    for (config, says) in [
        (config.with_widths(vec![narrow]), "cut in width"),
        (
            DiTConfig {
                mlp_ratio: 2.0,
                ..config.clone()
            },
            "4 times",
        ),
        (
            DiTConfig {
                class_dropout_prob: 0.0,
                ..config.clone()
            },
            "null class",
        ),
    ] {
        let found = error(&config);
        assert!(
            found.contains(says) && found.contains("safetensors"),
            "{found}"
        );
    }
    let mut weights = config.init(1, &Device::Cpu).unwrap();
    let moved = (weights.require("pos_embed").unwrap() + 1e-3).unwrap();
    weights.insert("pos_embed", moved);
    let found = diffusers::export(&config, &weights)
        .unwrap_err()
        .to_string();
    assert!(found.contains("`pos_embed`"), "{found}");
    // Once rounded to half precision it is still that table.
    let table = config.init(1, &Device::Cpu).unwrap();
    let table = table.require("pos_embed").unwrap();
    for dtype in [DType::F16, DType::BF16] {
        let rounded = table.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
        weights.insert("pos_embed", rounded);
        diffusers::export(&config, &weights).unwrap();
    }
}

#[test]
fn a_config_of_another_network_is_an_error() {
    let config = preset("DiT-S/2").unwrap();
    let weights = DiTConfig {
        depth: 1,
        hidden_size: 8,
        num_heads: 2,
        ..config
    };
    let (described, theirs) =
        diffusers::export(&weights, &weights.init(0, &Device::Cpu).unwrap()).unwrap();
    let shapes = theirs.iter().map(|(n, t)| (n, t.dims())).collect();
    for (key, value, says) in [
        ("_class_name", "UNet2DModel".into(), "UNet2DModel"),
        ("norm_type", "layer_norm".into(), "norm_type"),
        ("activation_fn", "geglu".into(), "activation_fn"),
        ("attention_bias", false.into(), "attention_bias"),
        ("num_embeds_ada_norm", serde_json::Value::Null, "classes"),
        ("out_channels", 5.into(), "out_channels"),
        ("num_layers", 3.into(), "transformer_blocks.1"),
        ("num_layers", "many".into(), "many"),
        ("num_attention_heads", u64::MAX.into(), "hidden_size"),
        ("sample_size", 33.into(), "patch_size"),
    ] {
        let mut changed = described.clone();
        changed[key] = value;
        let error = recognise(&shapes, Some(&changed), &Hints::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{key}: {error}");
    }
    let error = recognise(&shapes, None, &Hints::default()).unwrap_err();
    assert!(error.to_string().contains("config.json"), "{error}");
}

fn bits(t: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// There and back, every size and every value is the same, bit for bit.
    #[test]
    fn to_diffusers_and_back(
        depth in 1usize..4,
        heads in 1usize..4,
        head in 1usize..4,
        patch in 1usize..3,
        grid in 1usize..4,
        channels in 1usize..4,
        classes in 1usize..5,
        learn_sigma: bool,
        seed in 0u64..1000,
    ) {
        let config = DiTConfig {
            input_size: grid * patch,
            patch_size: patch,
            in_channels: channels,
            hidden_size: 4 * heads * head,
            depth,
            num_heads: heads,
            num_classes: classes,
            learn_sigma,
            ..DiTConfig::default()
        };
        // No zeros, so that nothing is equal by chance.
        let weights: StateDict = config
            .init(seed, &Device::Cpu)
            .unwrap()
            .iter()
            .enumerate()
            .map(|(i, (name, t))| {
                let moved = if DiTConfig::is_fixed(name) { t.clone() } else { (t + (0.1 + i as f64)).unwrap() };
                (name.to_string(), moved)
            })
            .collect();
        let (described, theirs) = diffusers::export(&config, &weights).unwrap();
        let shapes = theirs.iter().map(|(n, t)| (n, t.dims())).collect();
        let found = recognise(&shapes, Some(&described), &Hints::default()).unwrap();
        prop_assert_eq!(&found.sizes, &Sizes::Dit(config));
        let back = found.translate(&theirs).unwrap();
        prop_assert!(back.names().eq(weights.names()));
        for ((name, a), (_, b)) in back.iter().zip(weights.iter()) {
            prop_assert_eq!(bits(a), bits(b), "{}", name);
        }
    }
}
