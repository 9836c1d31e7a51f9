use std::collections::BTreeSet;

use serde_json::json;
use tinyfusion_core::{BlockStack, Error, Result};
use tinyfusion_diffusion::Objective;

use super::calibration::mask_losses;
use super::{Criterion, Judgement, MaskScore, Subject, random};

/// The mask of a given rank by calibration loss among many random ones.
///
/// The lowest loss is what criteria without recovery aim at; a median one is the control that an honest table needs
/// (TinyFusion, table 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomSearch {
    /// How many masks are drawn; equal ones are judged once.
    pub masks: u64,
    /// 0 takes the lowest loss, 0.5 the median, 1 the highest, of those that are finite numbers.
    pub quantile: f64,
}

impl Default for RandomSearch {
    fn default() -> Self {
        Self {
            masks: 1000,
            quantile: 0.0,
        }
    }
}

impl<S, O> Criterion<S, O> for RandomSearch
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    fn name(&self) -> &'static str {
        "random-search"
    }

    /// An upper bound: equal masks are judged once.
    fn passes(&self, subject: &Subject<'_, S, O>) -> u64 {
        subject.batch_count * self.masks
    }

    fn choose(self: Box<Self>, subject: &Subject<'_, S, O>) -> Result<Judgement> {
        let name = Criterion::<S, O>::name(&*self);
        if self.masks == 0 || !(0.0..=1.0).contains(&self.quantile) {
            return Err(Error::usage(format!(
                "{name} needs at least 1 mask and a quantile from 0 to 1, found {} and {}",
                self.masks, self.quantile
            )));
        }
        let mut drawn = BTreeSet::new();
        for number in 0..self.masks {
            drawn.insert(random::draw(subject, number)?.kept);
        }
        let masks = mask_losses(subject, &drawn.into_iter().collect::<Vec<_>>())?;
        let mut ranked: Vec<&MaskScore> = masks.iter().filter(|m| m.loss.is_some()).collect();
        ranked.sort_by(|a, b| {
            let loss = |m: &MaskScore| m.loss.unwrap_or(f64::INFINITY);
            loss(a).total_cmp(&loss(b))
        });
        if ranked.is_empty() {
            return Err(Error::run(format!(
                "{name}: none of the {} masks has a loss that is a number; are there NaN or infinite values in the model's \
                 weights?",
                masks.len()
            )));
        }
        let rank = (self.quantile * (ranked.len() - 1) as f64).round() as usize;
        let settings = json!({
            "seed": subject.seed, "drawn": self.masks, "distinct": masks.len(), "finite": ranked.len(),
            "quantile": self.quantile,
        });
        let kept = ranked[rank].kept.clone();
        Ok(Judgement {
            selection: subject.selection(name, settings, kept)?,
            blocks: Vec::new(),
            masks,
        })
    }
}
