use std::collections::BTreeSet;

use candle_core::{Device, Var};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};
use tinyfusion_nn::layers::LoraSpec;

use crate::DeltaW;

/// A teacher's weights with a trainable update.
pub(crate) struct Trainable {
    /// Variables where something is trained, the teacher's own storage elsewhere.
    pub(crate) weights: StateDict,
    pub(crate) vars: Vec<(String, Var)>,
    /// α/r of low-rank updates; 0 without.
    pub(crate) lora_scale: f64,
}

/// Adds ΔΦ to `teacher`, none of whose tensors will be written to: variables are copies
/// ([`StateDict::make_trainable`]), and only variables are updated.
pub(crate) fn trainable(
    teacher: StateDict,
    delta: &DeltaW,
    is_fixed: &dyn Fn(&str) -> bool,
    seed: u64,
    device: &Device,
) -> Result<Trainable> {
    // The caller's tensors may be variables of another run; these must record nothing here.
    let mut weights = teacher.into_detached();
    let (vars, lora_scale) = match delta {
        DeltaW::Frozen => (Vec::new(), 0.0),
        DeltaW::Full => (weights.make_trainable(|name| !is_fixed(name))?, 0.0),
        DeltaW::Lora {
            rank,
            alpha,
            layers,
        } => {
            let spec = LoraSpec {
                rank: *rank,
                alpha: *alpha,
            };
            let shapes: Vec<ParamSpec> = weights
                .iter()
                .map(|(name, t)| ParamSpec {
                    name: name.into(),
                    shape: t.dims().to_vec(),
                })
                .collect();
            let factors = spec.init(&shapes, |name| layers.chooses(name), seed, device)?;
            if factors.is_empty() {
                return Err(Error::usage(format!(
                    "no linear layer of the network is chosen by {layers:?} for a low-rank update; choose other layers, \
                     or `full` or `frozen`"
                )));
            }
            let names: BTreeSet<String> = factors.names().map(str::to_string).collect();
            factors
                .iter()
                .for_each(|(name, t)| weights.insert(name, t.clone()));
            (
                weights.make_trainable(|name| names.contains(name))?,
                spec.scale(),
            )
        }
    };
    Ok(Trainable {
        weights,
        vars,
        lora_scale,
    })
}
