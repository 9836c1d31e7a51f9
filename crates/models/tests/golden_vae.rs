//! Parity of the autoencoder's inputs and outputs with diffusers (`vae.safetensors`); its insides are compared in
//! `src/vae/tests.rs`.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::Tensor;
use tinyfusion_core::StateDict;
use tinyfusion_models::{AutoencoderKl, VaeConfig};
use tinyfusion_testing::{Golden, max_diff};

fn fixture() -> (Golden, AutoencoderKl) {
    let golden = Golden::open("vae.safetensors");
    let config: VaeConfig = serde_json::from_value(golden.config["model"].clone()).unwrap();
    let weights: StateDict = golden.strip("w.").into_iter().collect();
    weights
        .check(&config.params())
        .expect("the keys of diffusers are ours");
    let net = AutoencoderKl::new(&config, &weights).unwrap();
    (golden, net)
}

#[test]
fn golden_encode() {
    let (golden, net) = fixture();
    let posterior = net.encode(&golden.tensor("in.image")).unwrap();
    golden.close("out.moments", posterior.moments());
    golden.close("out.mean", &posterior.mean().unwrap());
    golden.close("out.mean", &posterior.mode().unwrap());
    golden.close("out.logvar", &posterior.logvar().unwrap());
    golden.close("out.std", &posterior.std().unwrap());
    let sample = posterior.sample(&golden.tensor("in.eps")).unwrap();
    golden.close("out.sample_scaled", &net.scaled(&sample).unwrap());
}

#[test]
fn golden_decode() {
    let (golden, net) = fixture();
    let latent = golden.tensor("in.latent");
    golden.close("out.decoded", &net.decode(&latent).unwrap());
    // A scaled latent unscaled is the latent, to rounding.
    let again = net.unscaled(&net.scaled(&latent).unwrap()).unwrap();
    assert!(max_diff(&again, &latent) <= golden.tolerance("in.latent"));
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let (golden, net) = fixture();
    let one = |x: &Tensor, i: usize| x.narrow(0, i, 1).unwrap();
    let (images, latents) = (golden.tensor("in.image"), golden.tensor("in.latent"));
    let moments = net.encode(&images).unwrap();
    let decoded = net.decode(&latents).unwrap();
    for i in 0..images.dim(0).unwrap() {
        let alone = net.encode(&one(&images, i)).unwrap();
        assert_eq!(max_diff(alone.moments(), &one(moments.moments(), i)), 0.0);
        let alone = net.decode(&one(&latents, i)).unwrap();
        assert_eq!(max_diff(&alone, &one(&decoded, i)), 0.0);
    }
}
