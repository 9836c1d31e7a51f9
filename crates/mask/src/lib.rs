#![doc = include_str!("../README.md")]

mod candidates;
mod choose;
mod history;
mod pattern;
mod sampler;
mod schedule;

pub use pattern::Pattern;

pub use candidates::{MAX_CANDIDATES, candidate_count, candidates};
pub use sampler::{INITIAL_LOGIT, MaskSampler, Sampled, Temperature, logit_name};
pub use schedule::Linear;

pub use choose::{oracle_selection, random_selection};
pub use history::{HistoryRecord, parse_history};
