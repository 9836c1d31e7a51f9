//! What the golden tests of this crate share.

use candle_core::Tensor;
use tinyfusion_diffusion::GaussianDiffusion;
use tinyfusion_testing::Golden;

/// Compares with the recorded tensor `key`, against which `got` may broadcast: our variances keep axes of
/// one value that the reference expands.
#[track_caller]
pub(crate) fn check(golden: &Golden, key: &str, got: &Tensor) {
    let want = golden.tensor(key);
    let got = got
        .broadcast_as(want.shape())
        .unwrap_or_else(|e| panic!("{key}: {e}"));
    golden.close(key, &got);
}

/// The first channels of a network output, as many as the process wants for samples of `channels`.
pub(crate) fn output_for(
    diffusion: &GaussianDiffusion,
    channels: usize,
    output: &Tensor,
) -> Tensor {
    output
        .narrow(1, 0, diffusion.output_channels(channels))
        .unwrap()
}
