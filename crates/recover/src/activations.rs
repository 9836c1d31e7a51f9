use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tinyfusion_core::{BlockStack, Error, Result, StepRng, stream, walk};
use tinyfusion_diffusion::Objective;

/// Thresholds at which values are called massive, in standard deviations of their sample.
const SIGMAS: [f64; 4] = [1.0, 2.0, 4.0, 8.0];

/// Bins are equally wide in asinh(x), which is linear around zero and logarithmic far from it.
const BIN_WIDTH: f64 = 0.25;
/// Bins on each side of zero: they reach to sinh(14) ≈ 600,000.
const BINS: i32 = 56;

/// The hidden states after one block, over all samples, tokens and channels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Activations {
    /// Index of the block.
    pub layer: usize,
    /// Bounds of the bins, ascending, one more than there are bins.
    pub edges: Vec<f64>,
    /// Values in each bin; what lies beyond the outermost bounds counts as in the outermost bin.
    pub counts: Vec<u64>,
    /// Mean of all values.
    pub mean: f64,
    /// Standard deviation of all values.
    pub std: f64,
    /// The largest absolute value.
    pub max_abs: f64,
    /// How many values are massive.
    pub beyond: Vec<Beyond>,
}

/// The share of values x with |x − μ| ≥ kσ, with μ and σ of their sample (over tokens and channels): what masked feature
/// distillation leaves out at that k on this side (its σ has n − 1 in the place of n).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Beyond {
    /// k.
    pub sigma: f64,
    /// From 0 to 1.
    pub share: f64,
}

/// The distribution of the hidden states after every block of `net`, on noised samples; sums are kept, no activations.
///
/// Batch k draws its timesteps and noise by (seed, k), as a [held-out loss](crate::held_out_loss) does. Build `net` on
/// detached weights, or every forward records a graph for nothing.
pub fn activations<S: BlockStack, O: Objective<S>>(
    net: &S,
    objective: &O,
    batches: impl IntoIterator<Item = Result<O::Batch>>,
    seed: u64,
) -> Result<Vec<Activations>> {
    let mut layers = vec![Tally::default(); net.layout().depth()];
    for (k, batch) in (0u64..).zip(batches) {
        let draw = objective.draw(&batch?, &mut StepRng::new(seed, k, stream::HELD_OUT))?;
        walk(net, &objective.input(&draw)?, |i, h, call| {
            let out = call.all(h)?; // (B, T, D)
            layers[i].add(i, &out)?;
            Ok(out)
        })?;
    }
    layers
        .into_iter()
        .enumerate()
        .map(|(layer, tally)| tally.finish(layer))
        .collect()
}

#[derive(Debug, Clone)]
struct Tally {
    counts: Vec<u64>,
    count: u64,
    sum: f64,
    squares: f64,
    max_abs: f64,
    beyond: [u64; SIGMAS.len()],
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            counts: vec![0; 2 * BINS as usize],
            count: 0,
            sum: 0.0,
            squares: 0.0,
            max_abs: 0.0,
            beyond: [0; SIGMAS.len()],
        }
    }
}

impl Tally {
    /// Adds the hidden states h (B, T, D) after block `layer`.
    fn add(&mut self, layer: usize, h: &Tensor) -> Result<()> {
        for sample in h.to_dtype(DType::F32)?.flatten_from(1)?.to_vec2::<f32>()? {
            let n = sample.len() as f64;
            let mean = sample.iter().copied().map(f64::from).sum::<f64>() / n;
            let off = |x: f32| f64::from(x) - mean;
            let std = (sample.iter().map(|x| off(*x).powi(2)).sum::<f64>() / n).sqrt();
            if !std.is_finite() {
                return Err(Error::run(format!(
                    "the hidden states after block {layer} hold NaN or infinite values"
                )));
            }
            for &x in &sample {
                let value = f64::from(x);
                self.sum += value;
                self.squares += value * value;
                self.max_abs = self.max_abs.max(value.abs());
                for (count, sigma) in self.beyond.iter_mut().zip(SIGMAS) {
                    *count += u64::from(off(x).abs() >= sigma * std);
                }
                self.counts[bin(value)] += 1;
            }
            self.count += sample.len() as u64;
        }
        Ok(())
    }

    fn finish(self, layer: usize) -> Result<Activations> {
        if self.count == 0 {
            return Err(Error::usage("no samples: hidden states need at least one"));
        }
        let n = self.count as f64;
        let mean = self.sum / n;
        let beyond = SIGMAS
            .iter()
            .zip(self.beyond)
            .map(|(&sigma, count)| Beyond {
                sigma,
                share: count as f64 / n,
            });
        Ok(Activations {
            layer,
            edges: (-BINS..=BINS)
                .map(|k| (f64::from(k) * BIN_WIDTH).sinh())
                .collect(),
            counts: self.counts,
            mean,
            std: (self.squares / n - mean * mean).max(0.0).sqrt(),
            max_abs: self.max_abs,
            beyond: beyond.collect(),
        })
    }
}

/// The bin of a value.
fn bin(value: f64) -> usize {
    let k = (value.asinh() / BIN_WIDTH).floor() + f64::from(BINS);
    k.clamp(0.0, f64::from(2 * BINS - 1)) as usize
}
