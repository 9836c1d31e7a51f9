//! The distribution of hidden states, on values that are known.
#![allow(clippy::unwrap_used)] // also in helpers of tests: a panic is a failed test

mod common;

use candle_core::{Device, Tensor};
use common::{Imitate, batch, build, weights};
use tinyfusion_core::{BlockLayout, BlockStack, LatentQuery, Result};
use tinyfusion_recover::activations;

/// One block that adds 1.
struct AddOne(BlockLayout);

impl BlockStack for AddOne {
    type Input = LatentQuery;
    type Cond = Tensor;

    fn layout(&self) -> &BlockLayout {
        &self.0
    }
    fn embed(&self, q: &LatentQuery) -> Result<(Tensor, Tensor)> {
        Ok((q.x.flatten_from(2)?, q.t.clone())) // (B, C, H·W)
    }
    fn block(&self, _: usize, h: &Tensor, _: &Tensor) -> Result<Tensor> {
        Ok((h + 1.0)?)
    }
    fn head(&self, h: &Tensor, _: &Tensor) -> Result<Tensor> {
        Ok(h.clone())
    }
}

/// 99 zeros and one 100 in each sample, before 1 is added.
fn spike() -> Result<Tensor> {
    let mut values = vec![0f32; 200];
    values[7] = 100.0;
    values[150] = 100.0;
    Ok(Tensor::from_vec(values, (2, 1, 10, 10), &Device::Cpu)?)
}

#[test]
fn a_spike_is_found_where_it_is() {
    let net = || AddOne(BlockLayout::single(1));
    let found = activations(&net(), &Imitate(net()), [spike()], 0).unwrap();
    let [layer] = &found[..] else {
        panic!("{found:?}")
    };
    assert_eq!(layer.layer, 0);
    // 99 ones and a 101: mean 2, variance 100²·0.01·0.99.
    assert!((layer.mean - 2.0).abs() < 1e-12);
    assert!((layer.std - 99f64.sqrt()).abs() < 1e-9, "{}", layer.std);
    assert_eq!(layer.max_abs, 101.0);
    let shares: Vec<f64> = layer.beyond.iter().map(|b| b.share).collect();
    assert_eq!(shares, [0.01; 4]); // 99 / 9.95 = 9.9 standard deviations
    assert_eq!(layer.counts.iter().sum::<u64>(), 200);
    assert_eq!(layer.edges.len(), layer.counts.len() + 1);
    for (value, count) in [(1.0, 198), (101.0, 2)] {
        let at = layer.edges.partition_point(|edge| *edge <= value) - 1;
        assert_eq!(layer.counts[at], count, "{value}");
    }
}

#[test]
fn every_layer_is_tallied_and_nothing_odd_passes() {
    let weights = weights();
    let net = build(&weights, 0.0).unwrap();
    let objective = Imitate::toy(&weights);
    let found = activations(&net, &objective, (0..3).map(batch), 0).unwrap();
    assert_eq!(found.len(), 6);
    assert!(
        found
            .iter()
            .all(|l| l.counts.iter().sum::<u64>() == 3 * 12 * 4 * 3)
    );
    let none: [Result<Tensor>; 0] = [];
    assert!(activations(&net, &objective, none, 0).is_err());
    let nan = [Ok(
        Tensor::full(f32::NAN, (2, 3, 2, 2), &Device::Cpu).unwrap()
    )];
    let error = activations(&net, &objective, nan, 0).unwrap_err();
    assert!(error.to_string().contains("after block 0"), "{error}");
}
