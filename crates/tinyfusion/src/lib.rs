#![doc = include_str!("../README.md")]

pub use tinyfusion_checkpoint as checkpoint;
pub use tinyfusion_core as core;
pub use tinyfusion_data as data;
pub use tinyfusion_diffusion as diffusion;
pub use tinyfusion_distill as distill;
pub use tinyfusion_fid as fid;
pub use tinyfusion_hub as hub;
pub use tinyfusion_mask as mask;
pub use tinyfusion_models as models;
pub use tinyfusion_nn as nn;
pub use tinyfusion_recover as recover;
pub use tinyfusion_report as report;
pub use tinyfusion_train as train;
