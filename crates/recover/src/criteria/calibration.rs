use candle_core::Device;
use tinyfusion_core::{BlockStack, Plan, Result};
use tinyfusion_diffusion::Objective;
use tinyfusion_nn::Lanes;

use super::{MaskScore, Subject};
use crate::held_out::sample_losses;
use crate::running::Running;

/// Runs every plan on every calibration batch, all on the same draws, and hands the losses of the samples of one batch
/// to `visit`, plan by plan. Plans run side by side, and what `visit` sees does not depend on how many do.
pub(super) fn each_batch<S, O>(
    subject: &Subject<'_, S, O>,
    plans: &[Plan],
    mut visit: impl FnMut(&[Vec<f64>]),
) -> Result<()>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    let device = subject.weights.iter().next().map(|(_, t)| t.device());
    let lanes = Lanes::new(subject.lanes)?.on(device.unwrap_or(&Device::Cpu));
    let (net, objective, passed) = (subject.net, subject.objective, subject.passed);
    for k in 0..subject.batch_count {
        let draw = subject.draw(k)?;
        let losses = lanes.run(plans.iter().collect(), |plan| {
            let losses = sample_losses(net, plan, objective, &draw)?;
            passed()?;
            Ok(losses)
        })?;
        visit(&losses);
    }
    Ok(())
}

/// The calibration loss of the network with only the blocks of each mask.
pub(super) fn mask_losses<S, O>(
    subject: &Subject<'_, S, O>,
    masks: &[Vec<usize>],
) -> Result<Vec<MaskScore>>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    let depth = subject.layout().depth();
    let plans: Vec<Plan> = masks.iter().map(|kept| Plan::keep(depth, kept)).collect();
    let mut losses = vec![Running::default(); masks.len()];
    each_batch(subject, &plans, |batch| {
        for (all, samples) in losses.iter_mut().zip(batch) {
            all.extend(samples.iter().copied());
        }
    })?;
    let finite = |x: f64| x.is_finite().then_some(x);
    let score = |(kept, loss): (&Vec<usize>, &Running)| {
        Ok(MaskScore {
            kept: kept.clone(),
            loss: finite(loss.estimate("a calibration loss")?.loss),
            standard_error: finite(loss.standard_error()),
        })
    };
    masks.iter().zip(&losses).map(score).collect()
}
