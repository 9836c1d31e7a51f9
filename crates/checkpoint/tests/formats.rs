//! Checkpoints that PyTorch and diffusers wrote (`assets/golden/checkpoints`, by `tests/python/make_checkpoints.py`), and
//! files that somebody else made to do harm.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use tinyfusion_checkpoint::{
    Checkpoint, DTypePolicy, Format, Loaded, Root, load, save_torch, sha256_file,
};
use tinyfusion_core::{Result, StateDict};
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

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_same(a: &StateDict, b: &StateDict) {
    assert!(a.names().eq(b.names()), "the same names");
    for ((name, a), (_, b)) in a.iter().zip(b.iter()) {
        assert_eq!(a.dims(), b.dims(), "{name}");
        assert_eq!(values(a), values(b), "{name}");
    }
}

fn official() -> StateDict {
    load(golden("dit.safetensors"), &Device::Cpu)
        .unwrap()
        .tensors
}

#[test]
fn a_plain_dictionary_of_pytorch() {
    let path = golden("plain.pt");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.format(), Format::Torch);
    assert_eq!(checkpoint.roots(), [Root::Plain]);
    assert!(checkpoint.others().is_empty());
    let loaded = read(&path, None).unwrap();
    assert_same(&loaded.tensors, &official());
    assert_eq!(
        loaded.sha256,
        sha256_file(&path).unwrap(),
        "of the whole file"
    );
    let listed = checkpoint.tensors(Root::Plain);
    assert_eq!(listed.len(), official().len());
    assert!(listed.iter().all(|t| t.dtype == "Float"));
}

#[test]
fn a_training_checkpoint_has_roots_and_one_is_chosen() {
    let path = golden("training.pt");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.roots(), [Root::Ema, Root::Model]);
    let mut others = checkpoint.others();
    others.sort();
    assert_eq!(others, ["args", "opt"]);
    let error = read(&path, None).unwrap_err().to_string();
    for says in ["training.pt#ema", "`ema`", "`model`"] {
        assert!(error.contains(says), "{error}");
    }
    let error = read(&path, Some(Root::ModelEma)).unwrap_err().to_string();
    assert!(
        error.contains("no root `model_ema`") && error.contains("`ema`, `model`"),
        "{error}"
    );
    let ema = read(&path, Some(Root::Ema)).unwrap();
    assert_same(&ema.tensors, &official());
    assert_eq!(ema.sha256, sha256_file(&path).unwrap());
    let raw = read(&path, Some(Root::Model)).unwrap();
    let name = "blocks.1.mlp.fc2.weight";
    let doubled: Vec<f32> = values(official().require(name).unwrap())
        .iter()
        .map(|v| 2.0 * v)
        .collect();
    assert_eq!(values(raw.tensors.require(name).unwrap()), doubled);
}

#[test]
fn mar_calls_its_average_model_ema() {
    let checkpoint = Checkpoint::open(golden("mar.pth")).unwrap();
    assert_eq!(checkpoint.roots(), [Root::Model, Root::ModelEma]);
    let of = |root| {
        checkpoint
            .load(root, DTypePolicy::Keep, &Device::Cpu)
            .unwrap()
    };
    let (raw, ema) = (of(Root::Model).tensors, of(Root::ModelEma).tensors);
    let name = "diffloss.net.cond_embed.weight";
    let doubled: Vec<f32> = values(ema.require(name).unwrap())
        .iter()
        .map(|v| 2.0 * v)
        .collect();
    assert_eq!(values(raw.require(name).unwrap()), doubled);
}

#[test]
fn strided_views_parameters_and_shared_storages() {
    assert_same(
        &read(&golden("views.pt"), None).unwrap().tensors,
        &official(),
    );
}

#[test]
fn a_pipeline_of_diffusers_and_its_transformer_alone() {
    let whole = Checkpoint::open(golden("pipeline")).unwrap();
    let alone = Checkpoint::open(golden("pipeline/transformer")).unwrap();
    for checkpoint in [&whole, &alone] {
        assert_eq!(checkpoint.format(), Format::Diffusers);
        assert_eq!(checkpoint.config().unwrap()["num_layers"], 2);
    }
    let load = |c: &Checkpoint| {
        c.load(Root::Plain, DTypePolicy::Keep, &Device::Cpu)
            .unwrap()
    };
    let (a, b) = (load(&whole), load(&alone));
    assert_same(&a.tensors, &b.tensors);
    assert_eq!(a.sha256, b.sha256);
    assert!(
        a.tensors
            .get("transformer_blocks.1.attn1.to_q.weight")
            .is_some()
    );
}

#[test]
fn diffusers_weights_as_bin_and_in_shards() {
    let folder = tempfile::tempdir().unwrap();
    let weights = read(&golden("pipeline"), None).unwrap().tensors;
    let config = fs::read(golden("pipeline/transformer/config.json")).unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("config.json"), &config).unwrap();
    save_torch(
        bin.join("diffusion_pytorch_model.bin"),
        &weights,
        &[],
        DTypePolicy::Keep,
    )
    .unwrap();
    assert_same(&read(&bin, None).unwrap().tensors, &weights);

    let shards = folder.path().join("shards");
    fs::create_dir(&shards).unwrap();
    fs::write(shards.join("config.json"), &config).unwrap();
    write_shards(&shards, "diffusion_pytorch_model", &weights);
    let loaded = read(&shards, None).unwrap();
    assert_same(&loaded.tensors, &weights);
    let joined = ["1-of-2", "2-of-2"]
        .map(|n| fs::read(shards.join(format!("diffusion_pytorch_model-{n}.safetensors"))).unwrap())
        .concat();
    let both = folder.path().join("both");
    fs::write(&both, joined).unwrap();
    assert_eq!(loaded.sha256, sha256_file(&both).unwrap(), "of all shards");
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
}

/// Every second tensor in one of two files, and their index.
fn write_shards(folder: &Path, stem: &str, weights: &StateDict) -> PathBuf {
    let mut parts = [StateDict::new(), StateDict::new()];
    let mut places = serde_json::Map::new();
    for (i, (name, tensor)) in weights.iter().enumerate() {
        parts[i % 2].insert(name, tensor.clone());
        places.insert(
            name.into(),
            format!("{stem}-{}-of-2.safetensors", i % 2 + 1).into(),
        );
    }
    for (i, part) in parts.iter().enumerate() {
        let path = folder.join(format!("{stem}-{}-of-2.safetensors", i + 1));
        tinyfusion_checkpoint::save(path, part, &Default::default(), DTypePolicy::Keep).unwrap();
    }
    let index = folder.join(format!("{stem}.safetensors.index.json"));
    let text = serde_json::json!({"metadata": {}, "weight_map": places}).to_string();
    fs::write(&index, text).unwrap();
    index
}

#[test]
fn an_index_is_held_to_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let index = write_shards(folder.path(), "model", &official());
    assert_same(&read(&index, None).unwrap().tensors, &official());
    let by_folder = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(by_folder.format(), Format::Shards);
    let text = fs::read_to_string(&index).unwrap();
    for (from, to, says) in [
        (
            "\"pos_embed\":\"model-1-of-2",
            "\"pos_embed\":\"model-2-of-2",
            "`pos_embed`",
        ),
        (
            "\"pos_embed\":\"model-2-of-2",
            "\"pos_embed\":\"model-1-of-2",
            "`pos_embed`",
        ),
        ("model-1-of-2", "../model-1-of-2", "beside it"),
        ("model-1-of-2", "model-3-of-2", "could not be opened"),
        ("weight_map", "map", "weight_map"),
        ("\"pos_embed\"", "\"poses\"", "does not name"),
        ("{", "", "JSON"),
    ] {
        let changed = text.replace(from, to);
        if changed == text {
            continue; // which of the two shards it is in does not matter
        }
        fs::write(&index, changed).unwrap();
        let error = Checkpoint::open(&index).unwrap_err().to_string();
        assert!(error.contains(says), "{from} → {to}: {error}");
    }
}

#[test]
fn what_is_written_for_pytorch_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    let mut weights = official();
    weights.insert(
        "empty",
        Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap(),
    );
    weights.insert("one", Tensor::new(1.5f32, &Device::Cpu).unwrap());
    save_torch(&path, &weights, &[], DTypePolicy::Keep).unwrap();
    assert_same(&read(&path, None).unwrap().tensors, &weights);
    save_torch(
        &path,
        &weights,
        &[Root::Model, Root::ModelEma],
        DTypePolicy::F16,
    )
    .unwrap();
    for root in [Root::Model, Root::ModelEma] {
        let loaded = read(&path, Some(root)).unwrap().tensors;
        assert_eq!(
            loaded.require("pos_embed").unwrap().dtype(),
            DType::F16,
            "{root}"
        );
    }
    let nan = [(
        "w".to_string(),
        Tensor::new(&[f32::NAN], &Device::Cpu).unwrap(),
    )];
    let error = save_torch(&path, &nan.into_iter().collect(), &[], DTypePolicy::Keep);
    assert!(error.unwrap_err().to_string().contains("`w` holds NaN"));
    assert!(
        read(&path, Some(Root::Model)).is_ok(),
        "the old file stands"
    );
}

// Files that do harm.

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
        error.contains("`state_dict`") && error.contains("`model_ema`"),
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
