//! What is done with a file's bytes when the readers are fuzzed: by the targets in `/fuzz`, which include this file, and by
//! the tests over damaged files.

use tinyfusion_fid::{Npz, StoredStatistics, Weights, read_tensors};

/// The reader of `.npz` and `.npy`.
#[allow(dead_code, reason = "each fuzz target calls one of the two")]
pub(crate) fn npz(bytes: &[u8]) {
    let Ok(mut file) = Npz::parse(bytes.to_vec(), "fuzz") else {
        return;
    };
    drop(StoredStatistics::read(&mut file));
    drop(file.integers("arr_1"));
    drop(file.number("n"));
    drop(file.matrix("arr_0"));
    drop(file.for_each_batch("arr_0", 16, &mut |_| Ok(())));
}

/// The reader of weights.
#[allow(dead_code, reason = "each fuzz target calls one of the two")]
pub(crate) fn weights(bytes: &[u8]) {
    drop(read_tensors(bytes));
    drop(Weights::parse(bytes, "fuzz").and_then(|w| w.check_inception()));
}
