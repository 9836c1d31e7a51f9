//! Damaged files: the fuzz targets' functions over the golden files with bytes changed, cut off and repeated. Nothing
//! may panic, and nothing may allocate what a header claims.

use std::path::PathBuf;

use tinyfusion_fid::{FeatureSet, read_tensors};

use crate::fuzzed::{npz, weights};
use crate::golden_file::folder;

/// The golden files of one reader, and what was found to break it once (`tests/hostile`).
fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let found = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hostile");
    let mut paths: Vec<PathBuf> = [folder().join(name), PathBuf::from(found).join(name)]
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten())
        .map(|e| e.unwrap().path())
        .collect();
    paths.retain(|p| p.extension().is_some_and(|e| e != "json"));
    paths.sort();
    assert!(!paths.is_empty());
    paths
        .into_iter()
        .map(|p| (p.clone(), std::fs::read(p).unwrap()))
        .collect()
}

fn damaged(bytes: &[u8], round: u64) -> Vec<u8> {
    let mut state = round.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    let mut out = bytes.to_vec();
    for _ in 0..=next(4) {
        if out.is_empty() {
            break;
        }
        let at = next(out.len());
        match next(5) {
            0 => out[at] ^= 1 << next(8),
            1 => out[at] = [0, 1, 0x7f, 0x80, 0xff][next(5)],
            2 => out.truncate(at),
            3 => {
                let end = (at + 1 + next(16)).min(out.len());
                let piece = out[at..end].to_vec();
                out.splice(at..at, piece);
            }
            // Near the ends, where sizes and directories stand.
            _ => {
                let place = if next(2) == 0 {
                    next(64)
                } else {
                    out.len().saturating_sub(1 + next(200))
                };
                if let Some(byte) = out.get_mut(place) {
                    *byte = next(256) as u8;
                }
            }
        }
    }
    out
}

#[test]
fn damaged_files_never_panic() {
    for (_, bytes) in corpus("npz") {
        npz(&bytes);
        let rounds = if bytes.len() > 20_000 { 20 } else { 400 };
        (0..rounds).for_each(|round| npz(&damaged(&bytes, round)));
    }
    for (_, bytes) in corpus("pth") {
        weights(&bytes);
        (0..3000).for_each(|round| weights(&damaged(&bytes, round)));
    }
}

#[test]
fn a_damaged_feature_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    // A header of valid metadata with the given array in it.
    let with = |array: &str| {
        let provenance = r#"{\"images_sha256\":\"\",\"weights_sha256\":\"\",\"preprocessing\":\"\",\"size\":[1,1],\"warnings\":[]}"#;
        let header = format!(
            r#"{{"__metadata__":{{"tinyfusion_fid":"{{\"format\":1,\"provenance\":{provenance}}}"}},"pool":{array}}}"#
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes
    };
    for bytes in [
        Vec::new(),
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}".to_vec(),
        b"\x02\0\0\0\0\0\0\0{}".to_vec(),
        // Ends before it begins; more than there is; more than there can be; no other array.
        with(r#"{"dtype":"F32","shape":[1,2048],"data_offsets":[8192,0]}"#),
        with(r#"{"dtype":"F32","shape":[1000000000,2048],"data_offsets":[0,8192000000000]}"#),
        with(
            r#"{"dtype":"F32","shape":[4611686018427387904,1],"data_offsets":[0,18446744073709551612]}"#,
        ),
        with(r#"{"dtype":"F32","shape":[0,2048],"data_offsets":[0,0]}"#),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let said = FeatureSet::read(&path).unwrap_err().to_string();
        assert!(said.contains("not a feature file"), "{said}");
    }
}

#[test]
fn a_pickle_that_calls_functions_is_refused() {
    // (PROTO 2) os.system('x'), as a legacy file's first pickle.
    let said = read_tensors(b"\x80\x02cos\nsystem\nU\x01x\x85R.").unwrap_err();
    assert!(
        said.contains("a call of `os system`, which is not run"),
        "{said}"
    );
}

#[test]
fn a_storage_whose_size_wraps_is_refused() {
    // Claims 2^62 values of 4 bytes, which are 0 in 64 bits, as many as are there.
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/hostile/pth/storage_size_wraps.pth"
    );
    let said = read_tensors(&std::fs::read(path).unwrap()).unwrap_err();
    assert!(
        said.contains("its storage has 0 bytes, expected 4611686018427387904 values"),
        "{said}"
    );
}
