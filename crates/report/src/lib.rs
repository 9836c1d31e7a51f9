#![doc = include_str!("../README.md")]

// What goes in.
mod results;
mod study;

// What the numbers show, in words.
mod correlation;
mod findings;

// Cells of text and pictures.
mod paper;
pub mod plots;
pub mod svg;
mod table;

// What comes out.
mod html;
mod markdown;
mod report;
mod whole;

#[cfg(test)]
mod sample;

pub use report::{Figure, Grid, Report};
pub use results::{
    Aggregate, Cost, Failure, Machine, Recovery, ResultRow, Results, Spread, Traces,
};
pub use study::{Kind, Study, cell};
pub use table::duration;
pub use whole::Whole;
