//! Stochastic interpolants (Albergo & Vanden-Eijnden, 2209.15571; SiT: Ma et al., 2401.08740): the process in
//! continuous time t ∈ [0, 1], from noise at t = 0 to data at t = 1.

mod config;
mod form;
mod objective;
mod path;
mod process;

pub use config::{InterpolantConfig, Prediction, Weighting};
pub use form::DiffusionForm;
pub use objective::{InterpolantDraw, InterpolantObjective};
pub use path::Path;
pub use process::Interpolant;
pub(crate) use process::Mix;
