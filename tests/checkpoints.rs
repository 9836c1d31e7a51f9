//! Real checkpoints as commands meet them: every format is recognised, cut, and written for other programs.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use tinyfusion::checkpoint::{Checkpoint, DTypePolicy, Metadata, Root, load_model_dir, save};
use tinyfusion::core::StateDict;
use tinyfusion::models::VaeConfig;
use tinyfusion::models::vae::{DownBlock, UpBlock};
use tinyfusion_tests::{Place, partials};

fn golden(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/golden/checkpoints");
    folder.join(name).display().to_string()
}

fn tensors(path: &Path, root: Root) -> StateDict {
    let checkpoint = Checkpoint::open(path).unwrap();
    let loaded = checkpoint.load(root, DTypePolicy::F32, &Device::Cpu);
    loaded.unwrap().tensors
}

fn assert_same(a: &StateDict, b: &StateDict) {
    assert!(a.names().eq(b.names()), "the same names");
    for ((name, a), (_, b)) in a.iter().zip(b.iter()) {
        let bits = |t: &candle_core::Tensor| -> Vec<u32> {
            let values: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        assert_eq!(bits(a), bits(b), "{name}");
    }
}

#[test]
fn inspect_says_what_each_is_and_what_it_took_for_granted() {
    let place = Place::new();
    let plain = golden("plain.pt");
    let text = place.ok(&format!("inspect {plain}"));
    for says in [
        "PyTorch file",
        "depth       2 (`blocks`)",
        "to be said",
        "#family=dit",
    ] {
        assert!(text.contains(says), "{says}: {text}");
    }
    let text = place.ok(&format!("inspect {plain}#family=sit,heads=2"));
    for says in ["model       SiT", "inferred", "assumed", "null class"] {
        assert!(text.contains(says), "{says}: {text}");
    }
    let text = place.ok(&format!("inspect {}", golden("training.pt")));
    for says in ["ema, model; none is chosen", "args, opt", "training.pt#ema"] {
        assert!(text.contains(says), "{says}: {text}");
    }
    let text = place.ok(&format!(
        "inspect {}#ema,family=dit,heads=2 --json",
        golden("training.pt")
    ));
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["format"], "torch");
    assert_eq!(found["recognised"]["architecture"], "DiT");
    assert_eq!(found["recognised"]["model"]["depth"], 2);
    assert_eq!(found["asks"].as_array().unwrap().len(), 0);
    let text = place.ok(&format!("inspect {}#model_ema,heads=2", golden("mar.pth")));
    for says in ["model       MAR", "model, model_ema; model_ema is chosen"] {
        assert!(text.contains(says), "{says}: {text}");
    }
    let text = place.ok(&format!("inspect {}", golden("pipeline")));
    for says in [
        "diffusers folder",
        "model       DiT",
        "\"num_heads\":2",
        "exponents",
        "types       F32",
        "same embedders",
    ] {
        assert!(text.contains(says), "{says}: {text}");
    }
    // Tensors that are no network are shown as they are.
    let text = place.ok(&format!(
        "inspect {} --tensors",
        golden("pipeline/answers.safetensors")
    ));
    assert!(text.contains("unknown") && text.contains("in.x"), "{text}");
}

#[test]
fn what_is_not_said_is_asked_for_and_not_guessed() {
    let place = Place::new();
    let (plain, training) = (golden("plain.pt"), golden("training.pt"));
    for (code, model, says) in [
        (2, plain.clone(), "#family=dit"),
        (2, format!("{plain}#family=dit"), "#heads=N"),
        (2, training.clone(), "training.pt#ema"),
        (2, format!("{training}#model_ema"), "no root"),
        (2, format!("{training}#emma"), "model_ema"),
        (2, format!("{plain}#family=mar"), "family"),
        (2, format!("{plain}#family=dit,heads=3"), "heads"),
        (1, "none.pt".into(), "does not exist"),
    ] {
        let error = place.fails(code, &format!("cut {model} out --keep 0"));
        assert!(error.contains(says), "{model}: {error}");
        assert!(!place.path("out").exists());
    }
    let teacher = Place::with_teacher();
    let error = teacher.fails(2, "cut teacher/model#ema out --keep 0");
    assert!(error.contains("says itself"), "{error}");
}

#[test]
fn a_training_checkpoint_is_cut_and_written_for_everybody() {
    let place = Place::new();
    let model = format!("{}#ema,family=dit,heads=2", golden("training.pt"));
    place.ok(&format!("cut {model} cut --keep 1"));
    let cut = load_model_dir(place.path("cut"), DTypePolicy::F32, &Device::Cpu).unwrap();
    assert_eq!(cut.config["model"]["depth"], 1);
    let source = &cut.provenance.ancestors[0];
    assert_eq!(source.notes["root"], "ema");
    assert!(source.notes["assumed"].contains("null class"));
    let weights = cut.weights.tensors;

    place.ok(
        "export cut diffusers --format diffusers --license cc-by-nc-4.0 --base-model owner/name",
    );
    let config = place.json("diffusers/transformer/config.json");
    assert_eq!(config["num_layers"], 1);
    assert_eq!(
        place.json("diffusers/model_index.json")["_class_name"],
        "DiTPipeline"
    );
    let card = place.text("diffusers/README.md");
    for says in [
        "license: cc-by-nc-4.0",
        "library_name: diffusers",
        "base_model: owner/name",
        "- pruning",
        "| kept blocks | [1] |",
        "downscale_freq_shift",
        "tinyfusion cut",
        &cut.provenance.parent_sha256.clone().unwrap(),
    ] {
        assert!(card.contains(says), "{says}: {card}");
    }
    place.ok("export cut original --format original");
    assert_same(
        &tensors(&place.path("original/model.pt"), Root::Plain),
        &weights,
    );
    let card = place.text("original/README.md");
    assert!(
        card.contains("depth=1") && card.contains("learn_sigma=True"),
        "{card}"
    );
    place.ok("export cut safetensors --format safetensors");
    assert_same(
        &tensors(&place.path("safetensors/model.safetensors"), Root::Plain),
        &weights,
    );
    // Each is a model again, and bit for bit the same one.
    for (from, to) in [
        ("diffusers", "a"),
        ("original/model.pt#family=dit,heads=2", "b"),
        ("safetensors/model.safetensors", "c"),
    ] {
        place.ok(&format!("export {from} {to} --format safetensors"));
        assert_same(
            &tensors(&place.path(&format!("{to}/model.safetensors")), Root::Plain),
            &weights,
        );
    }
    // What it was cut from is still known.
    let text = place.ok("inspect c/model.safetensors");
    assert!(text.contains("kept        [1]"), "{text}");
    assert!(partials(&place.path("")).is_empty());
}

#[test]
fn a_model_directory_comes_back_from_diffusers_bit_for_bit() {
    let place = Place::with_teacher();
    let weights = tensors(&place.path("teacher/model/model.safetensors"), Root::Plain);
    place.ok("export teacher/model out --format diffusers");
    place.ok("export out back --format safetensors");
    assert_same(
        &tensors(&place.path("back/model.safetensors"), Root::Plain),
        &weights,
    );
    place.ok("export out half --format original --dtype bf16");
    let half = Checkpoint::open(place.path("half/model.pt")).unwrap();
    assert!(
        half.tensors(Root::Plain)
            .iter()
            .all(|t| t.dtype == "BFloat16")
    );
    // It draws like any other.
    place.ok("sample out images --count 2 --steps 2 --batch-size 2");
}

#[test]
fn mar_goes_where_its_own_code_looks() {
    let place = Place::new();
    let model = format!("{}#model_ema,heads=2", golden("mar.pth"));
    place.ok(&format!("export {model} out --format original"));
    let path = place.path("out/checkpoint-last.pth");
    let weights = tensors(Path::new(&golden("mar.pth")), Root::ModelEma);
    for root in [Root::Model, Root::ModelEma] {
        assert_same(&tensors(&path, root), &weights);
    }
    let error = place.fails(2, &format!("export {model} no --format diffusers"));
    assert!(error.contains("original and safetensors"), "{error}");
    assert!(!place.path("no").exists());
}

#[test]
fn a_narrowed_model_is_written_where_it_can_be() {
    let place = Place::with_teacher();
    place.ok("narrow teacher/model narrow --ratio 0.5 --importance magnitude");
    for format in ["diffusers", "original"] {
        let error = place.fails(2, &format!("export narrow out --format {format}"));
        assert!(
            error.contains("cut in width") && error.contains("safetensors"),
            "{error}"
        );
        assert!(!place.path("out").exists());
    }
    place.ok("export narrow out --format safetensors");
    let text = place.ok("inspect out/model.safetensors");
    assert!(
        text.contains("\"widths\"") && text.contains("narrowed"),
        "{text}"
    );
    place.ok("export out/model.safetensors again --format safetensors");
    assert_eq!(
        place.json_header("again/model.safetensors")["model"],
        place.json_header("out/model.safetensors")["model"]
    );
}

#[test]
fn export_refuses_before_it_writes() {
    let place = Place::with_teacher();
    fs::create_dir(place.path("there")).unwrap();
    let error = place.fails(2, "export teacher/model there --format original");
    assert!(error.contains("exists"), "{error}");
    fs::create_dir(place.path("vae")).unwrap();
    for (code, flags, says) in [
        (1, "--format diffusers --vae vae", "vae/config.json"),
        (2, "--format original --vae vae", "--format diffusers"),
        (1, "--format original --metrics none.json", "none.json"),
        (2, "--format original --license a:b", "--license"),
        (2, "", "--format"),
    ] {
        let error = place.fails(code, &format!("export teacher/model out {flags}"));
        assert!(error.contains(says), "{flags}: {error}");
        assert!(!place.path("out").exists());
    }
    let class = |class: &str| format!(r#"{{"_class_name": "{class}"}}"#);
    fs::write(place.path("vae/config.json"), class("VQModel")).unwrap();
    let error = place.fails(1, "export teacher/model out --format diffusers --vae vae");
    assert!(error.contains("VQModel"), "{error}");
    let config = VaeConfig {
        down_block_types: vec![DownBlock::Plain; 2],
        up_block_types: vec![UpBlock::Plain; 2],
        block_out_channels: vec![8, 8],
        norm_num_groups: 4,
        ..VaeConfig::default()
    };
    fs::write(
        place.path("vae/config.json"),
        config.to_diffusers().unwrap(),
    )
    .unwrap();
    place.fails(1, "export teacher/model out --format diffusers --vae vae");
    let weights = "vae/diffusion_pytorch_model.safetensors";
    fs::write(place.path(weights), "no weights").unwrap();
    let error = place.fails(1, "export teacher/model out --format diffusers --vae vae");
    assert!(error.contains(weights), "{error}");
    assert!(!place.path("out").exists());
    let tensors = config.init(3, &Device::Cpu).unwrap();
    save(
        place.path(weights),
        &tensors,
        &Metadata::new(),
        DTypePolicy::F32,
    )
    .unwrap();
    fs::write(
        place.path("fid.json"),
        r#"{"fid": 12.5, "kid": null, "reference": "a|b", "sample_count": 2000}"#,
    )
    .unwrap();
    place.ok("export teacher/model out --format diffusers --vae vae --metrics fid.json");
    assert!(place.bytes(&format!("out/{weights}")) == place.bytes(weights));
    assert_eq!(
        place.json("out/model_index.json")["vae"][1],
        "AutoencoderKL"
    );
    let card = place.text("out/README.md");
    for says in ["| FID | 12.5 |", "| samples | 2000 |", r"a\|b"] {
        assert!(card.contains(says), "{says}: {card}");
    }
    assert!(!card.contains("KID"), "{card}");
}

#[test]
fn hostile_files_end_in_one_error() {
    let place = Place::new();
    let whole = fs::read(golden("plain.pt")).unwrap();
    fs::write(place.path("cut.pt"), &whole[..whole.len() / 2]).unwrap();
    let error = place.fails(1, "cut cut.pt#family=dit,heads=2 out --keep 0");
    assert!(
        error.contains("cut.pt") && error.contains("cut off"),
        "{error}"
    );
    place.fails(1, "inspect cut.pt");
    fs::write(
        place.path("old.pt"),
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    )
    .unwrap();
    let error = place.fails(1, "inspect old.pt");
    assert!(error.contains("torch.save"), "{error}");
}

trait Header {
    fn json_header(&self, name: &str) -> serde_json::Value;
}

impl Header for Place {
    /// What `export` wrote into a safetensors file's header.
    fn json_header(&self, name: &str) -> serde_json::Value {
        let path: PathBuf = self.path(name);
        let metadata = Checkpoint::open(path).unwrap().metadata();
        serde_json::from_str(&metadata["tinyfusion"]).unwrap()
    }
}
