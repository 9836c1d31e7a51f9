#![doc = include_str!("../README.md")]

mod source;
mod uint8;

pub mod shapes;

pub use source::Source;
pub use uint8::{grid, to_uint8};
