//! Parity with the golden files, laws, and what happens with bad input.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic and print; clippy exempts only the test functions themselves"
)]

mod bad_input;
mod evaluating;
mod folders;
mod fuzzed;
mod golden_file;
mod golden_files;
mod golden_frechet;
mod golden_inception;
mod golden_is_pr;
mod hostile;
mod images;
mod laws;
mod odd_members;
mod pictures;
mod sides;
mod streams;
mod synthetic;
