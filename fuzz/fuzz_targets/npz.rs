//! `cargo +nightly fuzz run npz`; README.md has the folders.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tinyfusion_fid::{Npz, StoredStatistics};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = Npz::parse(bytes.to_vec(), "fuzz") else {
        return;
    };
    drop(StoredStatistics::read(&mut file));
    drop(file.integers("arr_1"));
    drop(file.for_each_batch("arr_0", 16, &mut |_| Ok(())));
});
