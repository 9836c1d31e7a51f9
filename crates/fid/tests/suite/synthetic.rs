//! The golden files' weights, which are a formula.

use std::collections::BTreeMap;

use tinyfusion_fid::Weights;

/// 24 random bits for every element of the tensor `key`: splitmix64, seeded with FNV-1a of the name.
fn bits(key: &str, count: usize, seed: u64) -> impl Iterator<Item = i32> {
    let hash = key.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, c| {
        (h ^ u64::from(c)).wrapping_mul(0x100_0000_01B3)
    });
    let start = hash ^ seed.wrapping_mul(0xD1B5_4A32_D192_ED03);
    (1..=count as u64).map(move |i| {
        let mut z = start.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as i32
    })
}

fn tensor(key: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let scale = 1.0 / f32::from(1u16 << 12) / f32::from(1u16 << 12); // 2^-24
    let unit = |k: i32| k as f32 * scale;
    let sign = |k: i32| (2 * k - (1 << 24)) as f32 * scale;
    let bound = |fan: f64, count: usize| (fan / count as f64).sqrt() as f32;
    let kind = key.rsplit_once('.').map_or("", |(_, kind)| kind);
    let normalised = key.contains(".bn.");
    bits(key, shape.iter().product(), seed)
        .map(|k| match (kind, normalised) {
            ("weight" | "running_var", true) => 0.8 + unit(k) * 0.4,
            ("bias" | "running_mean", true) => sign(k) * 0.1,
            _ if key == "fc.weight" => sign(k) * bound(4.0, 2048),
            _ if key == "fc.bias" => sign(k) * 0.5,
            _ => sign(k) * bound(6.0, shape[1..].iter().product()),
        })
        .collect()
}

/// All tensors of the network.
pub(crate) fn tensors(seed: u64) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    tinyfusion_fid::Inception::tensors()
        .into_iter()
        .map(|(key, shape)| {
            let values = tensor(&key, &shape, seed);
            (key, (shape, values))
        })
        .collect()
}

pub(crate) fn weights(seed: u64) -> Weights {
    Weights::from_tensors(tensors(seed), "synthetic").unwrap()
}

/// The golden files' checksum of f32 values.
pub(crate) fn checksum(values: &[f32]) -> u64 {
    values.iter().enumerate().fold(0u64, |sum, (i, value)| {
        let t = (u64::from(value.to_bits()) + 1)
            .wrapping_mul(2 * i as u64 + 1)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15);
        sum.wrapping_add(t ^ (t >> 32))
    })
}
