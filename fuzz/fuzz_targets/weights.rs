//! `cargo +nightly fuzz run weights`; README.md has the folders.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/fid/tests/suite/fuzzed.rs"]
mod fuzzed;

fuzz_target!(|bytes: &[u8]| fuzzed::weights(bytes));
