//! Resize, weights and network against `resize.safetensors` and `inception.safetensors`.

use tinyfusion_fid::{Inception, resize};

use crate::golden_file::Golden;
use crate::synthetic::{checksum, tensors, weights};

fn size(text: &str) -> [usize; 2] {
    let (height, width) = text.split_once('x').unwrap();
    [height.parse().unwrap(), width.parse().unwrap()]
}

fn crop(resized: &[f32], from: usize) -> Vec<f32> {
    (from..from + 24)
        .flat_map(|y| &resized[(y * 299 + from) * 3..][..24 * 3])
        .copied()
        .collect()
}

#[test]
fn golden_resize_is_exact() {
    let golden = Golden::open("resize.safetensors");
    for case in golden.metadata["cases"].split(',') {
        let (from, to) = case.split_once("_to_").unwrap();
        let (from, to) = (size(from), size(to));
        let found = resize(&golden.bytes_of(&format!("{case}.in_u8_hwc")), from, to);
        assert_eq!(found, golden.f32s(&format!("{case}.tf1_f32_hwc")), "{case}");
        if from != to && from != [1, 1] {
            assert_ne!(
                found,
                golden.f32s(&format!("{case}.halfpixel_f32_hwc")),
                "{case}"
            );
        }
    }
}

#[test]
fn golden_resize_of_the_images_is_exact() {
    let golden = Golden::open("inception.safetensors");
    for image in golden.metadata["images"].split(',') {
        let bytes = golden.bytes_of(&format!("{image}.image_u8_hwc"));
        let resized = resize(&bytes, size(image), [299, 299]);
        for (part, from) in [("tl", 0), ("mid", 140), ("br", 275)] {
            let want = golden.f32s(&format!("{image}.resized_{part}"));
            assert_eq!(crop(&resized, from), want, "{image} {part}");
        }
        let hash = format!("{:016x}", checksum(&resized));
        assert_eq!(
            hash,
            golden.metadata[&format!("{image}.resized_words_hash_hwc")]
        );
    }
}

#[test]
fn golden_weights_are_the_formula() {
    let golden = Golden::open("inception.safetensors");
    let seed = golden.metadata["weight_seed"].parse().unwrap();
    let tensors = tensors(seed);
    let hash = |values: &[f32]| format!("{:016x}", checksum(values));
    let mut all = 0u64;
    for (key, (_, values)) in &tensors {
        all = all.wrapping_mul(0x100_0000_01B3) ^ checksum(values);
        if let Some(want) = golden.metadata.get(&format!("weight_words_hash.{key}")) {
            assert_eq!(&hash(values), want, "{key}");
        }
    }
    assert_eq!(
        format!("{all:016x}"),
        golden.metadata["weight_words_hash.ALL"]
    );
}

/// Largest difference, and the length of the difference relative to the length of `want`.
fn difference(found: &[f32], want: &[f64]) -> (f64, f64) {
    assert_eq!(found.len(), want.len());
    let differences = || found.iter().zip(want).map(|(&f, w)| f64::from(f) - w);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    (
        differences().fold(0.0, |worst, d| worst.max(d.abs())),
        norm(&mut differences()) / norm(&mut want.iter().copied()),
    )
}

#[test]
fn golden_network_agrees_at_every_tap() {
    let golden = Golden::open("inception.safetensors");
    let seed = golden.metadata["weight_seed"].parse().unwrap();
    let net = Inception::new(&weights(seed)).unwrap();
    for image in golden.metadata["images"].split(',') {
        let bytes = golden.bytes_of(&format!("{image}.image_u8_hwc"));
        let mut taps = Vec::new();
        let found = net.traced(&bytes, size(image), &mut |name, mean| {
            taps.push((name.to_owned(), mean()));
        });
        let close = |what: &str, found: &[f32], want: &[f64]| {
            let (worst, relative) = difference(found, want);
            println!("{image} {what}: at most {worst:.1e}, relative {relative:.1e}");
            assert!(
                worst <= 2e-5 && relative <= 5e-6,
                "{image} {what}: {worst:.1e} {relative:.1e}"
            );
        };
        for (name, mean) in &taps {
            let block = format!("{image}.tap.{name}.f32");
            let torch = if golden.has(&block) {
                golden.f32s(&block).into_iter().map(f64::from).collect()
            } else {
                match golden.has(&format!("{image}.{name}.f64")) {
                    true => golden.f64s(&format!("{image}.{name}.f64")),
                    false => continue,
                }
            };
            close(name, mean, &torch);
        }
        let mixed_6e = &taps.iter().find(|(name, _)| name == "Mixed_6e").unwrap().1;
        close("768", mixed_6e, &golden.f64s(&format!("{image}.768.f64")));
        let want = |what: &str| golden.f64s(&format!("{image}.{what}.f64"));
        close("2048", &found.pool, &want("2048"));
        close("spatial", &found.spatial, &want("spatial"));
        close("logits_unbiased", &found.logits, &want("logits_unbiased"));
        let biased: Vec<f32> = found
            .logits
            .iter()
            .zip(net.logit_bias())
            .map(|(a, b)| a + b)
            .collect();
        close("logits", &biased, &want("logits"));
        // What another resize and normalisation give is far away.
        let wrong = golden.f32s(&format!("{image}.pytorch_fid_default_2048.f32"));
        let wrong: Vec<f64> = wrong.into_iter().map(f64::from).collect();
        assert!(difference(&found.pool, &wrong).1 > 1e-3, "{image}");
    }
}
