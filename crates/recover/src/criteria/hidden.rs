use candle_core::Tensor;
use tinyfusion_core::{BlockStack, Error, Result, walk};
use tinyfusion_diffusion::Objective;

use super::{BlockScore, Subject};
use crate::running::Running;

/// One pass over the calibration samples that compares every block's input h_i with its output h_{i+1}, both (B, T, D),
/// by a `distance` per sample, (B,). Only the sums stay.
pub(super) fn block_distances<S: BlockStack, O: Objective<S>>(
    subject: &Subject<'_, S, O>,
    input: impl Fn(&O::Draw) -> Result<S::Input>,
    distance: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Vec<BlockScore>> {
    let mut sums = vec![Running::default(); subject.layout().depth()];
    for k in 0..subject.batch_count {
        let draw = subject.draw(k)?;
        walk(subject.net, &input(&draw)?, |i, h, call| {
            let out = call.all(h)?; // (B, T, D)
            let values = distance(h, &out)?.to_vec1::<f32>()?;
            sums[i].extend(values.into_iter().map(f64::from));
            Ok(out)
        })?;
        (subject.passed)()?;
    }
    scores(&sums)
}

/// Means as scores.
pub(super) fn scores(sums: &[Running]) -> Result<Vec<BlockScore>> {
    if let Some(few) = sums.iter().find(|s| s.count() < 2) {
        return Err(Error::usage(format!(
            "a score needs at least 2 calibration samples, found {}",
            few.count()
        )));
    }
    let score = |(block, sum): (usize, &Running)| BlockScore {
        block,
        score: sum.mean(),
        standard_error: Some(sum.standard_error()),
    };
    Ok(sums.iter().enumerate().map(score).collect())
}
