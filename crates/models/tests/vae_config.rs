//! What config.json of an autoencoder may say.
#![allow(clippy::unwrap_used)] // a test may panic

use serde_json::{Value, json};
use tinyfusion_models::VaeConfig;
use tinyfusion_models::vae::DownBlock;

/// As the folder of ft-mse has it: fields that came later are absent.
fn published() -> Value {
    let (down, up) = ("DownEncoderBlock2D", "UpDecoderBlock2D");
    json!({
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": [down, down, down, down],
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": [up, up, up, up],
    })
}

fn read(config: &Value) -> Result<VaeConfig, String> {
    VaeConfig::from_diffusers(&config.to_string()).map_err(|e| e.to_string())
}

#[test]
fn the_published_config_is_stable_diffusions() {
    assert_eq!(read(&published()).unwrap(), VaeConfig::sd());
    // Absent fields are diffusers' defaults.
    let least = read(&json!({"_class_name": "AutoencoderKL"})).unwrap();
    assert_eq!(least, VaeConfig::default());
}

#[test]
fn a_config_there_and_back_is_the_same() {
    for config in [VaeConfig::sd(), VaeConfig::kl16(), VaeConfig::default()] {
        config.validate().unwrap();
        let text = config.to_diffusers().unwrap();
        assert_eq!(VaeConfig::from_diffusers(&text).unwrap(), config);
    }
    let text = VaeConfig::kl16().to_diffusers().unwrap();
    assert!(
        text.contains("AttnDownEncoderBlock2D") && text.contains("0.2325"),
        "{text}"
    );
    assert_eq!(VaeConfig::kl16().down_block_types[4], DownBlock::Attention);
}

#[test]
fn what_is_not_supported_is_an_error() {
    for (field, value, part) in [
        (
            "_class_name",
            json!("AutoencoderTiny"),
            "\"AutoencoderTiny\", expected \"AutoencoderKL\"",
        ),
        ("shift_factor", json!(0.1159), "shift_factor is 0.1159"),
        ("latents_mean", json!([0.0]), "latents_mean is [0.0]"),
        (
            "act_fn",
            json!("relu"),
            "unknown variant `relu`, expected `silu`",
        ),
        ("later_field", json!(1), "unknown field `later_field`"),
        ("sample_size", json!([256, 256]), "invalid type"),
        (
            "scaling_factor",
            json!(0.0),
            "scaling_factor 0 is not a positive",
        ),
        (
            "norm_num_groups",
            json!(48),
            "48 groups (norm_num_groups) do not divide 128",
        ),
        ("norm_num_groups", json!(0), "norm_num_groups is 0"),
        ("layers_per_block", json!(0), "layers_per_block is 0"),
        ("block_out_channels", json!([]), "names 0 stages"),
        (
            "block_out_channels",
            json!([128, 256]),
            "down_block_types names 4 stages, block_out_channels 2",
        ),
        ("block_out_channels", json!(vec![32; 40]), "names 40 stages"),
        (
            "up_block_types",
            json!(["CrossAttnUpBlock2D"]),
            "unknown variant `CrossAttnUpBlock2D`",
        ),
        ("latent_channels", json!(1u64 << 40), "latent_channels is"),
    ] {
        let mut config = published();
        config[field] = value;
        let error = read(&config).unwrap_err();
        assert!(error.contains(part), "{field}: {error}");
    }
    let mut config = published();
    config.as_object_mut().unwrap().remove("_class_name");
    assert!(
        read(&config)
            .unwrap_err()
            .contains("_class_name is missing")
    );
    for name in ["shift_factor", "latents_mean", "latents_std"] {
        let mut config = published();
        config[name] = Value::Null;
        assert_eq!(read(&config).unwrap(), VaeConfig::sd(), "{name}");
    }
    assert!(VaeConfig::from_diffusers("[]").is_err());
    assert!(VaeConfig::from_diffusers("{").is_err());
}
