//! What MAR's config refuses, and how its blocks are numbered.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

use candle_core::Device;
use tinyfusion_core::{Error, StateDict};
use tinyfusion_diffusion::{MarTraining, Respacing};
use tinyfusion_models::{Mar, MarConfig};

/// Pixel patches as tokens: 3×3 of 2·2·3 values.
fn config() -> MarConfig {
    MarConfig {
        img_size: 6,
        vae_stride: 1,
        patch_size: 2,
        encoder_embed_dim: 12,
        encoder_depth: 2,
        encoder_num_heads: 2,
        decoder_embed_dim: 16,
        decoder_depth: 3,
        decoder_num_heads: 4,
        vae_embed_dim: 3,
        class_num: 4,
        attn_dropout: 0.2,
        proj_dropout: 0.3,
        buffer_size: 2,
        diffloss_d: 2,
        diffloss_w: 8,
        diffusion_batch_mul: 2,
        ..MarConfig::default()
    }
}

#[test]
fn kept_blocks_are_split_by_stage() {
    let c = config();
    assert_eq!(c.split_kept(&[1, 2, 4]).unwrap(), [vec![1], vec![0, 2]]);
    for (kept, said) in [
        (&[0usize, 1][..], "decoder"),
        (&[2, 3], "encoder"),
        (&[0, 5], "block 5"),
    ] {
        let error = c.split_kept(kept).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn misfits_are_usage_errors_that_name_the_field() {
    type Change = fn(&mut MarConfig);
    let changes: [(&str, Change); 17] = [
        ("patch_size", |c| c.patch_size = 4),
        ("vae_stride", |c| c.vae_stride = 5),
        ("encoder_num_heads", |c| c.encoder_num_heads = 5),
        ("decoder_num_heads", |c| c.decoder_num_heads = 3),
        ("mask_ratio_min", |c| c.mask_ratio_min = f64::NAN),
        ("mask_ratio_min", |c| c.mask_ratio_min = 1.1),
        ("label_drop_prob", |c| c.label_drop_prob = -0.1),
        ("attn_dropout", |c| c.attn_dropout = 1.0),
        ("proj_dropout", |c| c.proj_dropout = f64::NAN),
        ("mlp_ratio", |c| c.mlp_ratio = f64::NAN),
        ("mlp_ratio", |c| c.mlp_ratio = 1e300),
        ("depth", |c| c.decoder_depth = 4097),
        ("diffloss_d", |c| c.diffloss_d = 4097),
        ("diffusion_batch_mul is 1025", |c| {
            c.diffusion_batch_mul = MarTraining::MAX_BATCH_MUL + 1;
        }),
        ("num_sampling_steps", |c| {
            c.num_sampling_steps = "many".into();
        }),
        ("num_sampling_steps", |c| {
            c.num_sampling_steps = "1001".into();
        }),
        ("num_sampling_steps", |c| {
            c.num_sampling_steps = "ddim999".into();
        }),
    ];
    for (field, change) in changes {
        let mut bad = config();
        change(&mut bad);
        match bad.validate() {
            Err(Error::Usage(m)) => assert!(m.contains(field), "{m}"),
            other => panic!("{field}: {other:?}"),
        }
    }
    let wrong = serde_json::from_str::<MarConfig>("{\"encoder_dim\": 3}").unwrap_err();
    assert!(wrong.to_string().contains("encoder_dim"));
}

#[test]
fn what_training_and_sampling_read_is_in_the_config() {
    let c = config();
    let training = c.training();
    assert_eq!(training.labels.num_classes, 4);
    assert_eq!(training.labels.probability, c.label_drop_prob);
    assert_eq!(training.diffusion_batch_mul, 2);
    assert!(training.dropout && !training.held_out().dropout);
    let calm = MarConfig {
        attn_dropout: 0.0,
        proj_dropout: 0.0,
        num_sampling_steps: "ddim50".into(),
        ..config()
    };
    assert!(!calm.training().dropout);
    assert_eq!(calm.sampling_steps().unwrap(), Respacing::Ddim(50));
}

#[test]
fn sizes_out_of_bounds_are_usage_errors_that_name_the_field() {
    type Change = fn(&mut MarConfig, usize);
    let fields: [(&str, Change); 15] = [
        ("img_size", |c, n| c.img_size = n),
        ("vae_stride", |c, n| c.vae_stride = n),
        ("patch_size", |c, n| c.patch_size = n),
        ("encoder_embed_dim", |c, n| c.encoder_embed_dim = n),
        ("encoder_depth", |c, n| c.encoder_depth = n),
        ("encoder_num_heads", |c, n| c.encoder_num_heads = n),
        ("decoder_embed_dim", |c, n| c.decoder_embed_dim = n),
        ("decoder_depth", |c, n| c.decoder_depth = n),
        ("decoder_num_heads", |c, n| c.decoder_num_heads = n),
        ("vae_embed_dim", |c, n| c.vae_embed_dim = n),
        ("class_num", |c, n| c.class_num = n),
        ("buffer_size", |c, n| c.buffer_size = n),
        ("diffloss_d", |c, n| c.diffloss_d = n),
        ("diffloss_w", |c, n| c.diffloss_w = n),
        ("diffusion_batch_mul", |c, n| c.diffusion_batch_mul = n),
    ];
    for (field, change) in fields {
        for value in [0, (1 << 20) + 1, 1 << 32, usize::MAX / 3, usize::MAX] {
            let mut hostile = config();
            change(&mut hostile, value);
            for error in [
                hostile.validate().unwrap_err(),
                hostile.init(0, &Device::Cpu).unwrap_err(),
                Mar::new(&hostile, &StateDict::new()).unwrap_err(),
            ] {
                assert!(
                    matches!(&error, Error::Usage(m)
                        if m.contains(field) && m.contains(&value.to_string())),
                    "{field} = {value}: {error}"
                );
            }
        }
    }
    // In bounds one by one, absurd together.
    let big = 1 << 20;
    for hostile in [
        MarConfig {
            img_size: 512,
            patch_size: 1,
            diffusion_batch_mul: 1024,
            ..config()
        },
        MarConfig {
            img_size: big,
            patch_size: 1,
            ..config()
        },
        MarConfig {
            img_size: big,
            patch_size: big,
            vae_embed_dim: big,
            diffloss_w: big,
            diffloss_d: 4096,
            class_num: big,
            buffer_size: big,
            ..config()
        },
    ] {
        let error = hostile.validate().unwrap_err();
        assert!(
            matches!(&error, Error::Usage(m) if m.contains("values")),
            "{error}"
        );
    }
}
