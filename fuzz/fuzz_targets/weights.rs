//! `cargo +nightly fuzz run weights`; README.md has the folders.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tinyfusion_fid::{Weights, read_tensors};

fuzz_target!(|bytes: &[u8]| {
    drop(read_tensors(bytes));
    drop(Weights::parse(bytes, "fuzz").and_then(|w| w.check_inception()));
});
