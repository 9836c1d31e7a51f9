use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::*;

/// Sample i is the number i; augmentation adds a random fraction.
struct Numbers(Option<u64>);

impl Source for Numbers {
    fn len(&self) -> Option<u64> {
        self.0
    }
    fn classes(&self) -> usize {
        1
    }
    fn shape(&self) -> [usize; 3] {
        [1, 1, 1]
    }
    fn batch(&self, indices: &[u64]) -> Result<LatentBatch> {
        let x: Vec<f32> = indices.iter().map(|&i| i as f32).collect();
        Ok(LatentBatch {
            x: Tensor::from_vec(x, (indices.len(), 1, 1, 1), &Device::Cpu)?,
            y: Tensor::zeros(indices.len(), candle_core::DType::U32, &Device::Cpu)?,
        })
    }
    fn augmented(&self, indices: &[u64], rng: &mut StepRng) -> Result<LatentBatch> {
        let mut batch = self.batch(indices)?;
        let noise: Vec<f32> = rng
            .uniform(indices.len())
            .into_iter()
            .map(|u| u as f32)
            .collect();
        batch.x = (batch.x + Tensor::from_vec(noise, (indices.len(), 1, 1, 1), &Device::Cpu)?)?;
        Ok(batch)
    }
}

fn values(batch: &LatentBatch) -> Vec<f32> {
    batch.x.flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    #[test]
    fn every_epoch_holds_every_sample_once(len in 1u64..60, batch in 1usize..25, seed: u64, epochs in 1u64..5) {
        let mut order = Order::new(Some(len), seed).unwrap();
        let steps = (len * epochs).div_ceil(batch as u64);
        let mut seen = Vec::new();
        for step in 0..steps {
            let indices = order.batch_indices(step, batch).unwrap();
            prop_assert_eq!(indices.len(), batch);
            seen.extend(indices);
        }
        for epoch in seen.chunks_exact(len as usize) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_step_does_not_depend_on_what_was_drawn_before(len in 1u64..60, batch in 1usize..25, steps in proptest::collection::vec(0u64..50, 1..12)) {
        let mut order = Order::new(Some(len), 3).unwrap();
        for step in steps {
            prop_assert_eq!(order.batch_indices(step, batch).unwrap(), batch_indices(Some(len), 3, step, batch).unwrap());
        }
    }
}

#[test]
fn epochs_and_seeds_have_their_own_orders() {
    let order = |seed, epoch| batch_indices(Some(100), seed, epoch, 100).unwrap();
    assert_ne!(order(0, 0), order(0, 1));
    assert_ne!(order(0, 0), order(1, 0));
    assert_ne!(order(0, 0), (0..100).collect::<Vec<_>>());
}

#[test]
fn an_endless_source_never_repeats() {
    assert_eq!(batch_indices(None, 0, 0, 3).unwrap(), [0, 1, 2]);
    assert_eq!(batch_indices(None, 9, 7, 3).unwrap(), [21, 22, 23]);
}

#[test]
fn a_resumed_loader_gives_what_an_unbroken_one_gives() {
    for len in [Some(10), None] {
        let source: Arc<dyn Source> = Arc::new(Numbers(len));
        let mut whole = Loader::new(source.clone(), 5, 4).unwrap();
        let unbroken: Vec<_> = (0..10).map(|k| values(&whole.batch(k).unwrap())).collect();
        let mut resumed = Loader::new(source, 5, 4).unwrap();
        for (k, expected) in unbroken.iter().enumerate().skip(5) {
            assert_eq!(
                &values(&resumed.batch(k as u64).unwrap()),
                expected,
                "step {k} of {len:?}"
            );
        }
        // The augmentation is really there and differs from step to step.
        let fractions: Vec<f32> = unbroken.iter().map(|b| b[0].fract()).collect();
        assert!(fractions.windows(2).all(|w| w[0] != w[1]), "{fractions:?}");
    }
}

#[test]
fn the_cached_order_makes_large_epochs_affordable() {
    let mut order = Order::new(Some(1_281_167), 0).unwrap();
    let start = std::time::Instant::now();
    for step in 0..2_000 {
        order.batch_indices(step, 256).unwrap();
    }
    // Shuffling for every batch would take a minute or so; with the cache it is one shuffle.
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

#[test]
fn errors_name_the_value() {
    assert!(
        Order::new(Some(0), 0)
            .unwrap_err()
            .to_string()
            .contains("no samples")
    );
    assert!(
        batch_indices(Some(5), 0, 0, 0)
            .unwrap_err()
            .to_string()
            .contains("batch_size = 0")
    );
    assert!(
        batch_indices(None, 0, u64::MAX, 2)
            .unwrap_err()
            .to_string()
            .contains("beyond")
    );
    assert!(
        Loader::new(Arc::new(Numbers(Some(0))), 0, 1)
            .unwrap_err()
            .to_string()
            .contains("no samples")
    );
    assert!(
        Loader::new(Arc::new(Numbers(None)), 0, 0)
            .unwrap_err()
            .to_string()
            .contains("batch_size = 0")
    );
}
