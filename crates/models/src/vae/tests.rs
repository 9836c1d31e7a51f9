//! Parity of every module with diffusers, each on the recorded output of the one before (`vae.safetensors`).

use candle_core::Tensor;
use tinyfusion_core::StateDict;
use tinyfusion_testing::Golden;

use super::{AutoencoderKl, VaeConfig};

fn fixture() -> (Golden, AutoencoderKl) {
    let golden = Golden::open("vae.safetensors");
    let config: VaeConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
    let weights: StateDict = golden.strip("w.").into_iter().collect();
    let net = AutoencoderKl::new(&config, &weights).unwrap();
    (golden, net)
}

/// The first element of a batch, which is the one whose insides were recorded.
fn first(x: &Tensor) -> Tensor {
    x.narrow(0, 0, 1).unwrap()
}

#[test]
fn golden_inside_the_encoder() {
    let (golden, net) = fixture();
    let (close, recorded) = (
        |key: &str, got: &Tensor| golden.close(&format!("mid.{key}"), got),
        |key: &str| golden.tensor(&format!("mid.{key}")),
    );
    let encoder = &net.encoder;
    let h = encoder.conv_in.forward(&first(&golden.tensor("in.image")));
    close("encoder.conv_in", &h.unwrap());
    let mut before = recorded("encoder.conv_in");
    for (i, stage) in encoder.stages.iter().enumerate() {
        let key = format!("encoder.down_blocks.{i}");
        close(&key, &stage.forward(&before).unwrap());
        before = recorded(&key);
    }
    let middle = &encoder.middle;
    close("encoder.mid_block", &middle.forward(&before).unwrap());
    close(
        "encoder.mid_block.resnets.0",
        &middle.first.forward(&before).unwrap(),
    );
    let attention = middle.attention.as_ref().unwrap();
    let before = recorded("encoder.mid_block.resnets.0");
    close(
        "encoder.mid_block.attentions.0",
        &attention.forward(&before).unwrap(),
    );
    let before = recorded("encoder.mid_block.attentions.0");
    close(
        "encoder.mid_block",
        &middle.second.forward(&before).unwrap(),
    );
    let before = recorded("encoder.mid_block");
    close(
        "encoder.conv_norm_out",
        &encoder.norm_out.forward(&before).unwrap(),
    );
    let activated = encoder.norm_out.forward_silu(&before).unwrap();
    close(
        "encoder.conv_out",
        &encoder.conv_out.forward(&activated).unwrap(),
    );
    let before = recorded("encoder.conv_out");
    let quant = encoder.quant.as_ref().unwrap();
    close("quant_conv", &quant.forward(&before).unwrap());
}

#[test]
fn golden_inside_the_decoder() {
    let (golden, net) = fixture();
    let (close, recorded) = (
        |key: &str, got: &Tensor| golden.close(&format!("mid.{key}"), got),
        |key: &str| golden.tensor(&format!("mid.{key}")),
    );
    let decoder = &net.decoder;
    let post_quant = decoder.post_quant.as_ref().unwrap();
    let h = post_quant.forward(&first(&golden.tensor("in.latent")));
    close("post_quant_conv", &h.unwrap());
    let h = decoder.conv_in.forward(&recorded("post_quant_conv"));
    close("decoder.conv_in", &h.unwrap());
    let before = recorded("decoder.conv_in");
    let middle = &decoder.middle;
    close(
        "decoder.mid_block.resnets.0",
        &middle.first.forward(&before).unwrap(),
    );
    close("decoder.mid_block", &middle.forward(&before).unwrap());
    let attention = middle.attention.as_ref().unwrap();
    let before = recorded("decoder.mid_block.resnets.0");
    close(
        "decoder.mid_block.attentions.0",
        &attention.forward(&before).unwrap(),
    );
    let before = recorded("decoder.mid_block.attentions.0");
    close(
        "decoder.mid_block",
        &middle.second.forward(&before).unwrap(),
    );
    let mut before = recorded("decoder.mid_block");
    for (i, stage) in decoder.stages.iter().enumerate() {
        let key = format!("decoder.up_blocks.{i}");
        close(&key, &stage.forward(&before).unwrap());
        before = recorded(&key);
    }
    close(
        "decoder.conv_norm_out",
        &decoder.norm_out.forward(&before).unwrap(),
    );
    let activated = decoder.norm_out.forward_silu(&before).unwrap();
    close(
        "decoder.conv_out",
        &decoder.conv_out.forward(&activated).unwrap(),
    );
}
