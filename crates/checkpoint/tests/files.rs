//! Saving and loading weight files: what goes in comes out, and what is wrong is said clearly.

use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use tinyfusion_checkpoint::{
    DTypePolicy, Metadata, Root, inspect, load, load_as, load_expected, save, sha256_file,
    write_atomic,
};
use tinyfusion_core::{Error, ParamSpec, StateDict, StepRng};

const CPU: Device = Device::Cpu;

fn sample() -> StateDict {
    let mut rng = StepRng::new(1, 0, 0);
    let mut normal = |shape: &[usize]| rng.normal(shape, &CPU).expect("normal");
    let mut tensors = StateDict::new();
    tensors.insert("blocks.0.w", normal(&[3, 4]));
    tensors.insert("blocks.1.w", normal(&[3, 4]).t().expect("2-d")); // not contiguous
    tensors.insert("t_embedder.mlp.0.w", normal(&[5]));
    tensors.insert("t_embedder.mlp.2.w", normal(&[5]));
    tensors.insert("half", normal(&[7]).to_dtype(DType::F16).expect("cast"));
    tensors.insert("ids", Tensor::new(&[1i64, -2, 3], &CPU).expect("ids"));
    tensors.insert("scalar", Tensor::new(2.5f64, &CPU).expect("scalar"));
    tensors.insert(
        "empty",
        Tensor::zeros((0, 3), DType::F32, &CPU).expect("empty"),
    );
    tensors
}

fn metadata() -> Metadata {
    (0..9)
        .map(|i| (format!("key {i}"), format!("value \"{i}\" ü")))
        .collect()
}

fn specs(tensors: &StateDict) -> Vec<ParamSpec> {
    tensors
        .iter()
        .map(|(n, t)| ParamSpec {
            name: n.into(),
            shape: t.dims().to_vec(),
        })
        .collect()
}

/// Raw bytes of a tensor, for comparisons bit by bit.
fn bits(t: &Tensor) -> Vec<u8> {
    safetensors::View::data(&t.contiguous().expect("contiguous")).into_owned()
}

fn file_error(result: Result<impl Sized, Error>, path: &Path) -> String {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(Error::File {
            path: named,
            message,
        }) => {
            assert_eq!(named, path);
            message
        }
        Err(other) => panic!("an error about the file was expected, found: {other}"),
    }
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder)
        .expect("folder")
        .map(|e| e.expect("entry").file_name().into_string().expect("utf-8"))
        .collect()
}

#[test]
fn round_trip_is_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let (tensors, metadata) = (sample(), metadata());
    let sha256 = save(&path, &tensors, &metadata, DTypePolicy::Keep).unwrap();
    let loaded = load(&path, &CPU).unwrap();
    assert_eq!(loaded.metadata, metadata);
    assert_eq!(loaded.sha256, sha256);
    assert_eq!(sha256, sha256_file(&path).unwrap());
    assert!(loaded.tensors.names().eq(tensors.names()));
    for (name, t) in tensors.iter() {
        let back = loaded.tensors.require(name).unwrap();
        assert_eq!((back.dims(), back.dtype()), (t.dims(), t.dtype()), "{name}");
        assert_eq!(bits(back), bits(t), "{name}");
    }
    assert_eq!(names(folder.path()), ["a.safetensors"]);
}

#[test]
fn the_hash_is_sha256() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hello");
    fs::write(&path, b"hello world").unwrap();
    assert_eq!(
        sha256_file(&path).unwrap(),
        "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"
    );
}

#[test]
fn the_library_reads_our_files_and_equal_content_gives_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<Vec<u8>> = (0..4)
        .map(|i| {
            let path = folder.path().join(i.to_string());
            save(&path, &sample(), &metadata(), DTypePolicy::Keep).unwrap();
            fs::read(&path).unwrap()
        })
        .collect();
    assert!(files.windows(2).all(|w| w[0] == w[1]));
    let (n, header) = safetensors::SafeTensors::read_metadata(&files[0]).unwrap();
    assert_eq!(n % 8, 0);
    assert_eq!(header.metadata().as_ref().unwrap().len(), 9);
    let read = safetensors::SafeTensors::deserialize(&files[0]).unwrap();
    for (name, t) in sample().iter() {
        assert_eq!(read.tensor(name).unwrap().data(), bits(t), "{name}");
    }
}

#[test]
fn floats_are_stored_and_loaded_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    for (policy, dtype) in [
        (DTypePolicy::F32, DType::F32),
        (DTypePolicy::F16, DType::F16),
        (DTypePolicy::Bf16, DType::BF16),
    ] {
        save(&path, &sample(), &Metadata::new(), policy).unwrap();
        let stored = load(&path, &CPU).unwrap();
        let as_f32 = load_as(&path, DTypePolicy::F32, &CPU).unwrap();
        assert_eq!(stored.sha256, as_f32.sha256);
        for (name, t) in sample().iter() {
            let (stored, as_f32) = (
                stored.tensors.require(name).unwrap(),
                as_f32.tensors.require(name).unwrap(),
            );
            if name == "ids" {
                assert_eq!((stored.dtype(), as_f32.dtype()), (DType::I64, DType::I64));
                continue;
            }
            assert_eq!((stored.dtype(), as_f32.dtype()), (dtype, DType::F32));
            let expected = t.to_dtype(dtype).unwrap();
            assert_eq!(bits(stored), bits(&expected), "{name} as {dtype:?}");
            assert_eq!(
                bits(as_f32),
                bits(&expected.to_dtype(DType::F32).unwrap()),
                "{name}"
            );
        }
    }
}

#[test]
fn missing_unexpected_and_mismatched_keys_come_in_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let tensors = sample();
    save(&path, &tensors, &Metadata::new(), DTypePolicy::Keep).unwrap();
    load_expected(&path, &specs(&tensors), DTypePolicy::F32, &CPU).unwrap();

    let mut expected = specs(&tensors);
    expected.retain(|s| s.name != "half");
    expected[0].shape = vec![9, 9];
    expected.push(ParamSpec {
        name: "absent".into(),
        shape: vec![2],
    });
    let message = file_error(
        load_expected(&path, &expected, DTypePolicy::F32, &CPU),
        &path,
    );
    for part in [
        "missing `absent` [2]",
        "unexpected `half`",
        "`blocks.0.w` has shape [3, 4], expected [9, 9]",
    ] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    save(&path, &sample(), &Metadata::new(), DTypePolicy::Keep).unwrap();
    let good = fs::read(&path).unwrap();

    let one = |values: &[f32]| -> StateDict {
        [("bad.w".to_string(), Tensor::new(values, &CPU).unwrap())]
            .into_iter()
            .collect()
    };
    for (values, policy, found) in [
        (&[1.0, f32::NAN][..], DTypePolicy::Keep, "NaN"),
        (&[1.0, f32::NEG_INFINITY], DTypePolicy::Bf16, "-inf"),
        (&[1.0, 70000.0], DTypePolicy::F16, "inf"),
    ] {
        let message = file_error(save(&path, &one(values), &Metadata::new(), policy), &path);
        assert!(
            message.contains("`bad.w`")
                && message.contains(found)
                && message.contains("position 1"),
            "{message}"
        );
        assert!(message.contains("unchanged"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), good, "the old file stands");
        assert_eq!(names(folder.path()).len(), 1);
    }
    // The same values in a file from elsewhere.
    for (dtype, bad) in [
        (DType::F32, f64::NAN),
        (DType::F64, f64::INFINITY),
        (DType::F16, f64::NAN),
        (DType::BF16, f64::INFINITY),
    ] {
        let t = Tensor::new(&[0.0, 0.0, bad], &CPU)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        fs::write(
            &path,
            safetensors::serialize([("bad.w", &t)], None).unwrap(),
        )
        .unwrap();
        let message = file_error(load(&path, &CPU), &path);
        assert!(
            message.contains("`bad.w` [3]") && message.contains("position 2"),
            "{message}"
        );
    }
}

#[test]
fn files_that_are_not_safetensors_get_clear_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let header = |text: &str, data: usize| {
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.as_bytes());
        file.extend(vec![0u8; data]);
        file
    };
    assert!(file_error(load(&path, &CPU), &path).contains("could not be opened"));
    assert!(file_error(load(folder.path(), &CPU), folder.path()).contains("not a file"));
    for (content, expected) in [
        (vec![], "at least 8"),
        (b"PK\x03\x04 a zip archive".to_vec(), "zip archive"),
        (vec![0xff; 64], "at most 100000000"),
        (
            200u64.to_le_bytes().to_vec(),
            "header should have 200 bytes, 0 are there",
        ),
        (header("no json", 0), "does not parse"),
        (
            header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                7,
            ),
            "8 bytes of tensor data are expected, 7",
        ),
        (
            header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                9,
            ),
            "left over",
        ),
        (
            header(
                r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
                8,
            ),
            "does not parse",
        ),
        (
            header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "`a`",
        ),
        (
            header(
                r#"{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#,
                2,
            ),
            "stored as F8_E4M3",
        ),
        (
            header(
                r#"{"a":{"dtype":"F32","shape":[0,9223372036854775807,4],"data_offsets":[0,0]}}"#,
                0,
            ),
            "impossible shape",
        ),
    ] {
        fs::write(&path, content).unwrap();
        let message = file_error(load(&path, &CPU), &path);
        assert!(
            message.contains(expected),
            "expected `{expected}` in: {message}"
        );
    }
}

#[test]
fn truncated_anywhere_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    save(&path, &sample(), &metadata(), DTypePolicy::Keep).unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        file_error(load(&path, &CPU), &path);
        file_error(inspect(&path), &path);
    }
}

proptest! {
    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..6)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        save(&path, &sample(), &metadata(), DTypePolicy::Keep).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        fs::write(&path, bytes).unwrap();
        // Either outcome is right (a name may have changed); what matters is that it returns, and
        // that both readers of the header agree on whether it is one.
        let (loaded, inspected) = (load(&path, &CPU), inspect(&path));
        if loaded.is_ok() {
            prop_assert!(inspected.is_ok());
        }
    }
}

#[test]
fn a_full_disk_is_one_clear_error_and_the_old_file_stands() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.json");
    write_atomic(&path, |w| w.write_all(b"old")).unwrap();
    // The system's own full device gives the very error that a full disk gives.
    let full = || {
        fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
            .write_all(b"x")
            .unwrap_err()
    };
    let message = file_error(
        write_atomic(&path, |w| {
            w.write_all(&[7u8; 3 << 20])?; // more than the buffer: part of it is on disk already
            Err(full())
        }),
        &path,
    );
    assert!(
        message.contains("No space left")
            && message.contains("unchanged")
            && message.contains("free some space"),
        "{message}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["state.json"]);

    let new = folder.path().join("new.json");
    let message = file_error(write_atomic(&new, |_| Err(full())), &new);
    assert!(message.contains("nothing was left behind"), "{message}");
    assert_eq!(names(folder.path()), ["state.json"]);
}

#[test]
fn a_missing_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("absent/a.txt");
    let message = file_error(write_atomic(&path, |w| w.write_all(b"x")), &path);
    assert!(message.contains("its folder must exist"), "{message}");
}

#[test]
fn inspection_tells_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    save(&path, &sample(), &metadata(), DTypePolicy::Bf16).unwrap();
    let seen = inspect(&path).unwrap();
    assert_eq!(seen.parameters, sample().elem_count());
    assert_eq!(seen.metadata, metadata());
    assert_eq!(seen.bytes, fs::metadata(&path).unwrap().len());
    assert!(
        seen.blocks.into_iter().eq([("blocks".to_string(), 2)]),
        "an MLP with layers 0 and 2 is no stack"
    );
    assert!(
        seen.tensors
            .iter()
            .map(|t| t.name.as_str())
            .eq(sample().names())
    );
    let w = &seen.tensors[1];
    assert_eq!(
        (w.name.as_str(), w.shape.as_slice(), w.dtype.as_str()),
        ("blocks.1.w", &[4, 3][..], "BF16")
    );
    assert!(seen.config.is_none() && seen.provenance.is_none());
}

#[test]
fn roots_are_chosen_and_errors_list_them() {
    let one = |value: f32| Tensor::new(&[value], &CPU).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let rooted: StateDict = [
        ("ema.w".to_string(), one(1.0)),
        ("model.w".to_string(), one(2.0)),
    ]
    .into_iter()
    .collect();
    save(&path, &rooted, &Metadata::new(), DTypePolicy::Keep).unwrap();
    for (root, value) in [(Root::Ema, 1.0), (Root::Model, 2.0)] {
        let loaded = load(&path, &CPU).unwrap().select(root).unwrap();
        assert!(loaded.tensors.names().eq(["w"]));
        assert_eq!(
            loaded
                .tensors
                .require("w")
                .unwrap()
                .to_vec1::<f32>()
                .unwrap(),
            [value]
        );
        assert_eq!(root.to_string().parse::<Root>().unwrap(), root);
    }
    let message = file_error(load(&path, &CPU).unwrap().select(Root::Plain), &path);
    assert!(
        message.contains("has no root `plain`; it has `ema`, `model`"),
        "{message}"
    );

    let plain: StateDict = [("w".to_string(), one(3.0))].into_iter().collect();
    save(&path, &plain, &Metadata::new(), DTypePolicy::Keep).unwrap();
    load(&path, &CPU).unwrap().select(Root::Plain).unwrap();
    let message = file_error(load(&path, &CPU).unwrap().select(Root::Ema), &path);
    assert!(
        message.contains("has no root `ema`; it has `plain`"),
        "{message}"
    );
    assert!(
        "emma"
            .parse::<Root>()
            .unwrap_err()
            .to_string()
            .contains("`emma`")
    );
}
