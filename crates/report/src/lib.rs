#![doc = include_str!("../README.md")]

// What goes in.
mod merge;
mod results;
mod study;

// Which rows may be compared, and the random masks that others are compared with.
mod aggregate;
mod class;

// Seeds of one method taken together, and what can be said of them.
mod comparisons;
mod groups;
mod measure;
mod statistics;

// What the numbers show, in words.
mod correlation;
mod findings;

// Cells of text and pictures.
mod figures;
mod matrix;
mod paper;
pub mod plots;
pub mod svg;
mod table;

// What comes out.
mod combined;
mod html;
mod latex;
mod markdown;
mod report;
mod whole;

#[cfg(test)]
mod sample;

pub use aggregate::{Aggregate, Spread};
pub use combined::{Pages, Part, combined};
pub use comparisons::{Comparison, NOTE, comparisons};
pub use figures::{Read, plain_figures, study_figures};
pub use findings::Verdict;
pub use groups::{Group, groups};
pub use matrix::{Line, Matrix, matrix};
pub use measure::{Measure, plus_minus};
pub use merge::{Error, Merged, Section, Source, merge, parse};
pub use report::{Figure, Grid, Report};
pub use results::{Cost, Failure, Machine, Recovery, ResultRow, Results, Traces};
pub use statistics::{Moments, Paired, holm};
pub use study::{Against, Kind, Study, cell};
pub use table::duration;
pub use whole::Whole;
