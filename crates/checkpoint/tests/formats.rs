//! Checkpoints that PyTorch and diffusers wrote (`assets/golden/checkpoints`, by `tests/python/make_checkpoints.py`).
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use tinyfusion_checkpoint::{
    Checkpoint, DTypePolicy, Format, Loaded, Root, load, save_torch, sha256_file,
};
use tinyfusion_core::{Result, StateDict};

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
    // Images are drawn with the average, which is what is proposed.
    let error = checkpoint.choose(None).unwrap_err().to_string();
    assert!(error.ends_with("mar.pth#model_ema"), "{error}");
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
fn what_lightning_puts_around_the_weights_is_named() {
    let path = golden("lightning.ckpt");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.roots(), [Root::ModelEma, Root::Plain]);
    assert!(checkpoint.others().contains(&"optimizer_states".into()));
    let loaded = read(&path, Some(Root::Plain)).unwrap();
    let names: Vec<&str> = loaded.tensors.names().collect();
    assert_eq!(
        names,
        ["decoder.conv_in.weight", "loss.logvar", "model_ema.decay"]
    );
    // Nothing is left out without a word.
    let error = read(&path, None).unwrap_err().to_string();
    assert!(error.contains("`model_ema`, `plain`"), "{error}");
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
fn weights_that_lie_alone_in_a_folder_are_meant_by_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("README.md"), "# DiT").unwrap();
    std::fs::copy(golden("plain.pt"), folder.path().join("DiT.pt")).unwrap();
    let found = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(found.format(), Format::Torch);
    std::fs::copy(golden("views.pt"), folder.path().join("other.pt")).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("several checkpoints (DiT.pt, other.pt)") && error.contains("/DiT.pt"),
        "{error}"
    );
}

#[test]
fn weights_in_half_precision_alone_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let from = golden("pipeline/transformer");
    let to = |name: &str| folder.path().join(name);
    std::fs::copy(from.join("config.json"), to("config.json")).unwrap();
    let weights = from.join("diffusion_pytorch_model.safetensors");
    std::fs::copy(weights, to("diffusion_pytorch_model.fp16.safetensors")).unwrap();
    let found = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(found.format(), Format::Diffusers);
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

#[test]
fn whole_precision_comes_before_half_and_every_spelling_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let weights = read(&golden("pipeline"), None).unwrap().tensors;
    let to = |name: &str| folder.path().join(name);
    fs::copy(
        golden("pipeline/transformer/config.json"),
        to("config.json"),
    )
    .unwrap();
    let dtype = || {
        let loaded = read(folder.path(), None).unwrap().tensors;
        loaded.require("pos_embed.proj.bias").unwrap().dtype()
    };
    let half = "diffusion_pytorch_model.bf16.bin";
    save_torch(to(half), &weights, &[], DTypePolicy::Bf16).unwrap();
    assert_eq!(dtype(), DType::BF16);
    // In shards, whose index carries the variant.
    let index = write_shards(folder.path(), "part", &weights);
    let text = fs::read_to_string(&index).unwrap();
    fs::remove_file(index).unwrap();
    for i in 1..3 {
        let name = format!("diffusion_pytorch_model-{i}-of-2.fp16.safetensors");
        fs::rename(to(&format!("part-{i}-of-2.safetensors")), to(&name)).unwrap();
    }
    let text = text
        .replace("part", "diffusion_pytorch_model")
        .replace("2.safetensors", "2.fp16.safetensors");
    let index = to("diffusion_pytorch_model.safetensors.index.fp16.json");
    fs::write(&index, text).unwrap();
    assert_eq!(dtype(), DType::F32, "what the shards really hold");
    assert_eq!(Checkpoint::open(folder.path()).unwrap().files().count(), 2);
    assert_same(&read(&index, None).unwrap().tensors, &weights);
    // Whole ones as a pickle come before both, and other weights before nothing.
    let whole = "diffusion_pytorch_model.bin";
    save_torch(to(whole), &weights, &[], DTypePolicy::Keep).unwrap();
    let files = |c: &Checkpoint| c.files().map(Path::to_path_buf).collect::<Vec<_>>();
    assert_eq!(
        files(&Checkpoint::open(folder.path()).unwrap()),
        [to(whole)]
    );
    fs::rename(to(whole), to("diffusion_pytorch_model.non_ema.bin")).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().files().count(), 2);
}

#[test]
fn shards_of_pickles_have_an_index_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut places = serde_json::Map::new();
    for (i, (name, tensor)) in official().iter().enumerate() {
        let file = format!("pytorch_model-{:05}-of-{:05}.bin", i + 1, official().len());
        let one = [(name.to_string(), tensor.clone())].into_iter().collect();
        save_torch(folder.path().join(&file), &one, &[], DTypePolicy::Keep).unwrap();
        places.insert(name.into(), file.into());
    }
    let text = serde_json::json!({ "weight_map": places }).to_string();
    fs::write(folder.path().join("pytorch_model.bin.index.json"), text).unwrap();
    assert_same(&read(folder.path(), None).unwrap().tensors, &official());
}

#[test]
fn names_of_parallel_and_compiled_networks_lose_their_wrapper() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    let wrapped = |prefix: &str| -> StateDict {
        let weights = official();
        let named = weights
            .iter()
            .map(|(n, t)| (format!("{prefix}{n}"), t.clone()));
        named.collect()
    };
    for prefix in ["module.", "_orig_mod.", "module._orig_mod."] {
        save_torch(&path, &wrapped(prefix), &[], DTypePolicy::Keep).unwrap();
        assert_same(&read(&path, None).unwrap().tensors, &official());
        let inner = [Root::Model];
        save_torch(&path, &wrapped(prefix), &inner, DTypePolicy::Keep).unwrap();
        assert_same(
            &read(&path, Some(Root::Model)).unwrap().tensors,
            &official(),
        );
    }
    // A part that happens to be called so is none.
    let mut mixed = wrapped("module.");
    mixed.insert("other", Tensor::new(1f32, &Device::Cpu).unwrap());
    save_torch(&path, &mixed, &[], DTypePolicy::Keep).unwrap();
    assert_same(&read(&path, None).unwrap().tensors, &mixed);
}
