use candle_core::{DType, Tensor};
use tinyfusion_core::Result;

use crate::run_dir::State;

/// Skipped steps in a row after which a run is lost.
pub(crate) const HOPELESS: u64 = 50;

/// Steps of a GPU of which the host does not know yet whether they were skipped.
///
/// Asking would wait for the GPU at every step. So their number is added up there, and until it is asked for, when a line of
/// the log or a checkpoint is due or so many wait that the run may be lost, every step counts as an update: the bias
/// corrections of AdamW are those of up to [`HOPELESS`] updates too many for so long.
#[derive(Default)]
pub(crate) struct Pending {
    /// How many were skipped: an f32 scalar on the GPU.
    skipped: Option<Tensor>,
    steps: u64,
}

impl Pending {
    /// A step whose gradients were multiplied by `scale`: NaN where it was skipped.
    pub(crate) fn note(&mut self, scale: &Tensor) -> Result<()> {
        let skipped = scale.ne(scale)?.to_dtype(DType::F32)?; // NaN alone differs from itself
        self.skipped = Some(match &self.skipped {
            None => skipped,
            Some(others) => (others + skipped)?,
        });
        self.steps += 1;
        Ok(())
    }

    /// Whether the steps that wait would be too many if all were skipped.
    pub(crate) fn may_be_hopeless(&self) -> bool {
        self.steps >= HOPELESS
    }

    /// Puts into `state` what was skipped, and begins anew.
    pub(crate) fn settle(&mut self, state: &mut State) -> Result<()> {
        let Self { skipped, steps } = std::mem::take(self);
        let Some(skipped) = skipped else {
            return Ok(());
        };
        let skipped = skipped.to_scalar::<f32>()? as u64;
        // In a row only if all were: which of them is not known.
        if skipped < steps {
            state.skipped_in_a_row = 0;
        }
        if skipped == 0 {
            return Ok(());
        }
        tracing::warn!(
            step = state.step,
            skipped,
            of = steps,
            "not finite: steps skipped"
        );
        state.updates -= skipped;
        state.skip(skipped);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn skipped_steps_are_taken_back_when_they_are_known() {
        let scale = |v: f32| Tensor::new(v, &Device::Cpu).unwrap();
        let mut state = State {
            updates: 3,
            ..State::default()
        };
        let mut pending = Pending::default();
        for v in [0.5, f32::NAN, 1.0] {
            pending.note(&scale(v)).unwrap();
        }
        pending.settle(&mut state).unwrap();
        assert_eq!((state.updates, state.skipped), (2, 1));
        pending.settle(&mut state).unwrap();
        assert_eq!((state.updates, state.skipped), (2, 1));
        for in_a_row in [3, 5] {
            state.updates += 2;
            for _ in 0..2 {
                pending.note(&scale(f32::NAN)).unwrap();
            }
            pending.settle(&mut state).unwrap();
            assert_eq!((state.updates, state.skipped_in_a_row), (2, in_a_row));
        }
        pending.note(&scale(1.0)).unwrap();
        pending.settle(&mut state).unwrap();
        assert_eq!((state.skipped, state.skipped_in_a_row), (5, 0));
    }

    /// However seldom a line is due.
    #[test]
    fn a_run_that_skips_every_step_is_found_out() {
        let scale = Tensor::new(f32::NAN, &Device::Cpu).unwrap();
        let (mut state, mut pending) = (State::default(), Pending::default());
        let mut steps = 0;
        while state.skipped_in_a_row < HOPELESS {
            assert!(steps < HOPELESS, "{steps} steps were skipped");
            pending.note(&scale).unwrap();
            (state.updates, steps) = (state.updates + 1, steps + 1);
            if pending.may_be_hopeless() {
                pending.settle(&mut state).unwrap();
            }
        }
        assert_eq!(
            (steps, state.updates, state.skipped),
            (HOPELESS, 0, HOPELESS)
        );
        assert!(!pending.may_be_hopeless());
    }
}
