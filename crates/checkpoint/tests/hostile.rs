//! Files that somebody made to do harm, or that came to harm: one error that names the file and what is wrong, and nothing
//! allocated that a header only claims.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Device;
use tinyfusion_checkpoint::{Checkpoint, DTypePolicy, Loaded, Root};
use tinyfusion_core::Result;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../assets/golden/checkpoints")
        .join(name)
}

fn read(path: &Path, root: Option<Root>) -> Result<Loaded> {
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.load(checkpoint.choose(root)?, DTypePolicy::Keep, &Device::Cpu)
}

/// An archive like that of `torch.save`.
fn archive(path: &Path, members: &[(&str, &[u8])], method: CompressionMethod) {
    let mut zip = ZipWriter::new(fs::File::create(path).unwrap());
    let options = SimpleFileOptions::default().compression_method(method);
    for (name, content) in members {
        zip.start_file(*name, options).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap();
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn number(out: &mut Vec<u8>, n: i64) {
    out.extend([0x8a, 8]);
    out.extend(n.to_le_bytes());
}

fn numbers(out: &mut Vec<u8>, all: &[i64]) {
    out.push(b'(');
    all.iter().for_each(|&n| number(out, n));
    out.push(b't');
}

/// `{"w": a tensor}` of values that are claimed to be there.
fn claim(class: &str, numel: i64, offset: i64, shape: &[i64], stride: &[i64]) -> Vec<u8> {
    let mut out = vec![0x80, 2, b'}', b'('];
    text(&mut out, "w");
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text(&mut out, "storage");
    out.extend(format!("ctorch\n{class}\n").as_bytes());
    text(&mut out, "0");
    text(&mut out, "cpu");
    number(&mut out, numel);
    out.extend(b"tQ");
    number(&mut out, offset);
    numbers(&mut out, shape);
    numbers(&mut out, stride);
    out.extend(b"\x89ccollections\nOrderedDict\n)RtRu.");
    out
}

fn error_of(pickle: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.pt");
    let data = [0u8; 24];
    archive(
        &path,
        &[("archive/data.pkl", pickle), ("archive/data/0", &data)],
        CompressionMethod::Stored,
    );
    let error = read(&path, None).unwrap_err().to_string();
    assert!(error.contains("hostile.pt"), "names the file: {error}");
    error
}

#[test]
fn a_claim_that_holds_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fine.pt");
    archive(
        &path,
        &[
            (
                "archive/data.pkl",
                &claim("FloatStorage", 6, 0, &[2, 3], &[3, 1]),
            ),
            ("archive/data/0", &[0u8; 24]),
        ],
        CompressionMethod::Stored,
    );
    let loaded = read(&path, None).unwrap();
    assert_eq!(loaded.tensors.require("w").unwrap().dims(), [2, 3]);
}

#[test]
fn claims_that_do_not_hold() {
    let huge = i64::MAX / 8;
    for (class, numel, offset, shape, stride, says) in [
        ("FloatStorage", huge, 0, &[huge][..], &[1][..], "24 bytes"),
        ("FloatStorage", 6, 0, &[huge, huge], &[1, 1], "storage of 6"),
        (
            "FloatStorage",
            6,
            0,
            &[0, huge, huge],
            &[1, 1, 1],
            "storage of 6",
        ),
        ("FloatStorage", 6, 0, &[7], &[1], "storage of 6"),
        ("FloatStorage", 6, 4, &[3], &[1], "storage of 6"),
        ("FloatStorage", 6, huge, &[3], &[1], "storage of 6"),
        ("FloatStorage", 6, 0, &[3, 3], &[0, 1], "storage of 6"),
        ("FloatStorage", 6, 0, &[2, 3], &[3], "storage of 6"),
        ("FloatStorage", 6, 0, &[2], &[huge], "storage of 6"),
        ("FloatStorage", 6, 0, &[-1], &[1], "the size -1"),
        ("FloatStorage", -6, 0, &[1], &[1], "the size -6"),
        ("FloatStorage", 5, 0, &[5], &[1], "24 bytes"),
        ("DoubleStorage", 6, 0, &[6], &[1], "24 bytes"),
        ("BoolStorage", 24, 0, &[24], &[1], "stored as Bool"),
        (
            "ComplexFloatStorage",
            3,
            0,
            &[3],
            &[1],
            "ComplexFloatStorage",
        ),
        ("FloatStorage", 6, 0, &[1; 9], &[1; 9], "the shape"),
    ] {
        let error = error_of(&claim(class, numel, offset, shape, stride));
        assert!(
            error.contains(says) && error.contains("`w`"),
            "{class} {shape:?}: {error}"
        );
    }
}

#[test]
fn pickles_that_would_do_harm() {
    // Nested a million deep: dropping such a value recursively ends the process.
    let mut deep = vec![0x80, 2];
    deep.extend(vec![b')'; 1]);
    deep.extend(vec![0x85; 1_000_000]);
    deep.push(b'.');
    // Doubled at every step: 2^60 values.
    let mut doubled = vec![0x80, 2, b'N'];
    for _ in 0..60 {
        doubled.extend(b"q\x00h\x00\x86");
    }
    doubled.push(b'.');
    // A text of 4 GB that is not there.
    let claimed = [&[0x80, 2, b'X'][..], &u32::MAX.to_le_bytes(), b"short."].concat();
    let mut integer = vec![0x80, 2, 0x8a, 255];
    integer.extend([1; 255]);
    integer.push(b'.');
    let mut many = vec![0x80, 2];
    many.extend(vec![b'N'; 5_000_000]);
    many.push(b'.');
    for (pickle, says) in [
        (&deep[..], "nested more than"),
        (&doubled, "over and over"),
        (&claimed, "cut off"),
        (&integer, "255 bytes"),
        (&many, "instructions"),
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", "`os.system`"),
        (b"\x80\x02cbuiltins\neval\n.", "`builtins.eval`"),
        (b"\x80\x02ctorch.hub\nload\n.", "`torch.hub.load`"),
        (b"\x80\x04\x95\0\0\0\0\0\0\0\0.", "protocol 4"),
        (b"\x80\x02i.", "0x69"),
        (b"\x80\x02(.", "mark"),
        (b"\x80\x02.", "stack is empty"),
        (b"\x80\x02t.", "no mark"),
        (b"\x80\x02h\x05.", "memo"),
        (b"\x80\x02}", "cut off"),
        (b"\x80\x02}.", "holds nothing"),
        (b"\x80\x02N.", "no dictionary of tensors"),
        (b"\x80\x02Ns.", "stack is empty"),
        (b"\x80\x02NNNs.", "damaged"),
        (b"\x80\x02}(NNNu.", "damaged"),
        (b"", "cut off"),
    ] {
        let error = error_of(pickle);
        assert!(error.contains(says), "{says}: {error}");
    }
    // A dictionary filled entry by entry is no deeper for it, and neither is a list.
    let mut filled = vec![0x80, 2, b'}'];
    for i in 0..1000u32 {
        filled.push(b'J');
        filled.extend(i.to_le_bytes());
        filled.extend(b"]NaNas");
    }
    filled.push(b'.');
    let error = error_of(&filled);
    assert!(error.contains("holds no tensors"), "{error}");
    // Without nesting: a wide value copied again and again.
    let mut wide = vec![0x80, 2, b'('];
    wide.extend(vec![b'N'; 1000]);
    wide.extend(b"tq\x00");
    for _ in 0..5000 {
        wide.extend(b"h\x00");
    }
    wide.push(b'.');
    let error = error_of(&wide);
    assert!(error.contains("over and over"), "{error}");
}

#[test]
fn entries_that_are_no_tensors() {
    let mut out = vec![0x80, 2, b'}', b'('];
    text(&mut out, "model");
    out.extend(b"}(");
    text(&mut out, "w");
    out.extend(b"K\x01uu.");
    let error = error_of(&out);
    assert!(
        error.contains("`model.w`") && error.contains("no tensor"),
        "{error}"
    );
    let mut out = vec![0x80, 2, b'}', b'('];
    text(&mut out, "state_dict");
    out.extend(b"}");
    text(&mut out, "epoch");
    out.extend(b"K\x01u.");
    let error = error_of(&out);
    assert!(
        error.contains("`epoch`") && error.contains("`model_ema`"),
        "{error}"
    );
}

#[test]
fn archives_that_are_damaged_or_would_do_harm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.pt");
    let pickle = claim("FloatStorage", 6, 0, &[6], &[1]);
    let error = || {
        let error = read(&path, None).unwrap_err().to_string();
        assert!(error.contains("hostile.pt"), "{error}");
        error
    };
    // A bomb: 64 MB of zeros in a few kilobytes.
    let zeros = vec![0u8; 64 << 20];
    let bomb = claim("FloatStorage", 16 << 20, 0, &[16 << 20], &[1]);
    archive(
        &path,
        &[("a/data.pkl", &bomb), ("a/data/0", &zeros)],
        CompressionMethod::Deflated,
    );
    assert!(error().contains("compressed"));
    archive(&path, &[("a/data.pkl", &pickle)], CompressionMethod::Stored);
    let missing = error();
    assert!(
        missing.contains("`w`") && missing.contains("a/data/0") && missing.contains("missing"),
        "{missing}"
    );
    archive(&path, &[("a/readme", b"x")], CompressionMethod::Stored);
    assert!(error().contains("data.pkl"));
    archive(
        &path,
        &[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)],
        CompressionMethod::Stored,
    );
    assert!(error().contains("data.pkl"));
    let members: [(&str, &[u8]); 3] = [
        ("a/data.pkl", &pickle),
        ("a/byteorder", b"big"),
        ("a/data/0", &[0; 24]),
    ];
    archive(&path, &members, CompressionMethod::Stored);
    assert!(error().contains("big-endian"));
    let nan = [
        f32::NAN.to_le_bytes(),
        [0; 4],
        [0; 4],
        [0; 4],
        [0; 4],
        [0; 4],
    ]
    .concat();
    archive(
        &path,
        &[("a/data.pkl", &pickle), ("a/data/0", &nan)],
        CompressionMethod::Stored,
    );
    let found = error();
    assert!(found.contains("`w`") && found.contains("NaN"), "{found}");
    // Cut off anywhere, never a panic and never weights.
    let whole = fs::read(golden("plain.pt")).unwrap();
    for end in (4..whole.len()).step_by(997) {
        fs::write(&path, &whole[..end]).unwrap();
        error();
    }
    // A byte that is another: an error, or (in a value, or in what nobody reads) a file that loads.
    for at in (0..whole.len()).step_by(211) {
        let mut changed = whole.clone();
        changed[at] ^= 0x41;
        fs::write(&path, &changed).unwrap();
        let _ = read(&path, None);
    }
    fs::write(&path, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").unwrap();
    assert!(error().contains("before PyTorch 1.6"));
}

#[test]
fn paths_that_are_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let error = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(error(&folder.path().join("none.pt")).contains("does not exist"));
    assert!(error(folder.path()).contains("config.json"));
    fs::write(
        folder.path().join("model_index.json"),
        r#"{"_class_name": "StableDiffusionPipeline"}"#,
    )
    .unwrap();
    assert!(error(folder.path()).contains("StableDiffusionPipeline"));
    let transformer = folder.path().join("transformer");
    fs::create_dir(&transformer).unwrap();
    assert!(error(folder.path()).contains("config.json"));
    fs::write(transformer.join("config.json"), "{}").unwrap();
    fs::write(transformer.join("flax_model.msgpack"), "").unwrap();
    let found = error(folder.path());
    assert!(
        found.contains("diffusion_pytorch_model") && found.contains("flax_model.msgpack"),
        "{found}"
    );
}
