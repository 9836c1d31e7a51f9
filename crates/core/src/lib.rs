#![doc = include_str!("../README.md")]

mod blend;
mod error;
mod layout;
mod plan;
mod rng;
mod selection;
mod stack;
mod state_dict;
mod width;

pub mod laws;
/// Small stacks in the shapes of the model families, on which the laws are tested without a model crate.
pub mod toy;

pub use blend::{Gate, Part, Parts};
pub use error::{Error, Result};
pub use layout::BlockLayout;
pub use plan::{BlockPlan, Plan, Trace, run, run_exact};
pub use rng::{StepRng, stream};
pub use selection::{Group, GroupDecision, Selection};
pub use stack::{
    BlockCall, BlockStack, Index, LatentBatch, LatentQuery, Rows, TokenDenoiser, TokenQuery, walk,
};
pub use state_dict::{ParamSpec, StateDict, check_shapes};
pub use width::{GroupRows, WidthGroups, WidthPart, values_f64};
