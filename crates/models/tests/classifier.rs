//! The classifier: gradients, independence of samples, and sizes that are refused.
#![allow(clippy::unwrap_used)] // a test may panic

use candle_core::{Device, Tensor};
use tinyfusion_core::{Error, StateDict, StepRng, stream};
use tinyfusion_models::{Classifier, ClassifierConfig};
use tinyfusion_testing::{flat, max_diff};

fn config() -> ClassifierConfig {
    ClassifierConfig {
        input_size: 8,
        patch_size: 4,
        in_channels: 3,
        hidden_size: 16,
        depth: 2,
        num_heads: 2,
        num_classes: 5,
    }
}

/// Every tensor random: initial weights have zero biases and norms of one, which hide mistakes.
fn random_weights(config: &ClassifierConfig) -> StateDict {
    let mut rng = StepRng::new(5, 0, stream::INIT);
    config
        .params()
        .iter()
        .map(|s| {
            let values = rng.normal(s.shape.as_slice(), &Device::Cpu).unwrap();
            (s.name.clone(), (values * 0.3).unwrap())
        })
        .collect()
}

fn images() -> Tensor {
    StepRng::new(6, 0, stream::DRAW)
        .normal((3, 3, 8, 8), &Device::Cpu)
        .unwrap()
}

#[test]
fn every_tensor_gets_a_gradient() {
    let config = config();
    let mut weights = random_weights(&config);
    let vars = weights.make_trainable(|_| true).unwrap();
    assert_eq!(vars.len(), config.params().len());
    let net = Classifier::new(&config, &weights).unwrap();
    let logits = net.logits(&net.features(&images()).unwrap()).unwrap();
    // A fixed random weighting, so that no symmetry of the network hides a gradient.
    let weighting = StepRng::new(7, 0, stream::DRAW)
        .normal(logits.shape().clone(), &Device::Cpu)
        .unwrap();
    let loss = (logits * weighting).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    for (name, var) in &vars {
        let grad = flat(
            grads
                .get(var)
                .unwrap_or_else(|| panic!("{name} has no gradient")),
        );
        assert!(grad.iter().all(|g| g.is_finite()), "{name}: not finite");
        let size = |part: &[f64]| part.iter().fold(0f64, |m, g| m.max(g.abs()));
        assert!(size(&grad) > 1e-6, "{name}: zero gradient");
        if name.ends_with("attn.qkv.bias") {
            // A constant added to every key moves all scores of a query alike, which softmax ignores.
            let (q, k, v) = (&grad[..16], &grad[16..32], &grad[32..]);
            assert!(size(q) > 1e-6 && size(v) > 1e-6, "{name}: q or v");
            assert!(
                size(k) < 1e-4 * size(v),
                "{name}: k has a gradient of {}",
                size(k)
            );
        } else {
            let zeros = grad.iter().filter(|g| **g == 0.0).count();
            assert_eq!(zeros, 0, "{name}: zeros among {} entries", grad.len());
        }
    }
}

#[test]
fn batched_is_single() {
    let config = config();
    let net = Classifier::new(&config, &random_weights(&config)).unwrap();
    let x = images();
    let features = net.features(&x).unwrap();
    let logits = net.logits(&features).unwrap();
    assert_eq!(
        (features.dims(), logits.dims()),
        (&[3, 16][..], &[3, 5][..])
    );
    assert!(
        max_diff(&logits.get(0).unwrap(), &logits.get(1).unwrap()) > 1e-3,
        "the samples differ"
    );
    for b in 0..3 {
        let alone = net.features(&x.narrow(0, b, 1).unwrap()).unwrap();
        let row = features.narrow(0, b, 1).unwrap();
        assert!(max_diff(&alone, &row) < 1e-5, "features of sample {b}");
        let row = logits.narrow(0, b, 1).unwrap();
        assert!(
            max_diff(&net.logits(&alone).unwrap(), &row) < 1e-5,
            "logits of sample {b}"
        );
    }
}

#[test]
fn initial_weights_fit_and_depend_on_the_seed() {
    let config = config();
    let weights = config.init(1, &Device::Cpu).unwrap();
    weights.check(&config.params()).unwrap();
    Classifier::new(&config, &weights).unwrap();
    let other = config.init(2, &Device::Cpu).unwrap();
    let key = "head.weight";
    assert!(max_diff(weights.require(key).unwrap(), other.require(key).unwrap()) > 0.0);
}

#[test]
fn sizes_out_of_bounds_are_usage_errors_that_name_the_field() {
    type Change = fn(&mut ClassifierConfig, usize);
    let fields: [(&str, Change); 7] = [
        ("input_size", |c, n| c.input_size = n),
        ("patch_size", |c, n| c.patch_size = n),
        ("in_channels", |c, n| c.in_channels = n),
        ("hidden_size", |c, n| c.hidden_size = n),
        ("depth", |c, n| c.depth = n),
        ("num_heads", |c, n| c.num_heads = n),
        ("num_classes", |c, n| c.num_classes = n),
    ];
    for (field, change) in fields {
        for value in [0, (1 << 20) + 1, 1 << 32, usize::MAX / 3, usize::MAX] {
            let mut hostile = config();
            change(&mut hostile, value);
            let errors = [
                hostile.validate().unwrap_err(),
                hostile.init(0, &Device::Cpu).unwrap_err(),
                Classifier::new(&hostile, &StateDict::new()).unwrap_err(),
            ];
            for error in errors {
                assert!(
                    matches!(&error, Error::Usage(m) if m.contains(field) && m.contains(&value.to_string())),
                    "{field} = {value}: {error}"
                );
            }
        }
    }
}

#[test]
fn sizes_that_do_not_fit_together_are_usage_errors() {
    let misfits = [
        (
            ClassifierConfig {
                patch_size: 3,
                ..config()
            },
            "patch_size 3 does not divide input_size 8",
        ),
        (
            ClassifierConfig {
                num_heads: 3,
                ..config()
            },
            "do not divide hidden_size 16",
        ),
        // Each size is in bounds, their product is not: 2⁶⁰ positions times channels.
        (
            ClassifierConfig {
                input_size: 1 << 20,
                patch_size: 1,
                hidden_size: 1 << 20,
                ..config()
            },
            "values",
        ),
        (
            ClassifierConfig {
                input_size: 1 << 20,
                patch_size: 1 << 20,
                in_channels: 1 << 20,
                hidden_size: 1 << 20,
                depth: 4096,
                ..config()
            },
            "values",
        ),
    ];
    for (config, text) in misfits {
        let error = config.validate().unwrap_err();
        assert!(
            matches!(&error, Error::Usage(m) if m.contains(text)),
            "{error}"
        );
    }
    // The bounds themselves are allowed where the product is small.
    ClassifierConfig {
        depth: 4096,
        num_classes: 1 << 20,
        ..config()
    }
    .validate()
    .unwrap();
}
