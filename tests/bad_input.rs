//! What users get wrong: one clear error, the right exit code (2 usage, 1 run), nothing half-written.
#![allow(clippy::unwrap_used)] // a test may panic

use tinyfusion_tests::{Place, partials};

#[test]
fn patterns_and_selections_that_do_not_fit() {
    let place = Place::with_teacher();
    for (pattern, says) in [
        ("1:3", "4 blocks"),
        ("3:2", "3:2"),
        ("0:2", "0:2"),
        ("2:4x2", "8 blocks"),
        ("nonsense", "nonsense"),
        ("999999999999:9999999999999", "999999999999"),
    ] {
        let error = place.fails(
            2,
            &format!("learn teacher/model out --pattern {pattern} --steps 1"),
        );
        assert!(error.contains(says), "{pattern}: {error}");
        assert!(
            !place.path("out").exists(),
            "a mistake leaves no folder that refuses the right command"
        );
    }
    for keep in ["0,9", "2,1", "1,1"] {
        place.fails(2, &format!("cut teacher/model out --keep {keep}"));
        assert!(!place.path("out").exists(), "nothing is left behind");
    }
    std::fs::write(
        place.path("s.json"),
        r#"{"depth": 8, "kept": [0], "groups": [{"n": 1, "m": 8}], "criterion": "x"}"#,
    )
    .unwrap();
    let error = place.fails(2, "cut teacher/model out --selection s.json");
    assert!(error.contains("8 blocks") && error.contains('4'), "{error}");
    std::fs::write(
        place.path("s.json"),
        r#"{"depth": 4, "kept": [0,1], "groups": [{"n": 1, "m": 4}], "criterion": "x"}"#,
    )
    .unwrap();
    place.fails(2, "cut teacher/model out --selection s.json");
    std::fs::write(place.path("s.json"), "{").unwrap();
    place.fails(2, "cut teacher/model out --selection s.json");
}

#[test]
fn settings_that_make_no_sense() {
    let place = Place::with_teacher();
    std::fs::write(place.path("c.toml"), "step = 3\n").unwrap();
    let error = place.fails(2, "learn teacher/model out --config c.toml");
    assert!(
        error.contains("`step`") && error.contains("steps"),
        "names the key and the known ones: {error}"
    );
    std::fs::write(place.path("c.toml"), "steps = \"many\"\n").unwrap();
    place.fails(2, "learn teacher/model out --config c.toml");
    std::fs::write(place.path("c.toml"), "steps = [").unwrap();
    place.fails(2, "learn teacher/model out --config c.toml");
    for flags in [
        "--steps 0",
        "--batch-size 0",
        "--delta full --lora-rank 4",
        "--lora-rank 1000000000000000000",
        "--batch-size 1000000000",
        "--lr -1",
        "--tau-to 0",
        "--ema 1.5",
    ] {
        place.fails(2, &format!("learn teacher/model out {flags}"));
    }
    for flags in [
        "--lr nan",
        "--lr inf",
        "--mask-lr nan",
        "--last-lr 1e-5",
        "--warmup 3",
    ] {
        place.fails(2, &format!("learn teacher/model out {flags}"));
    }
    std::fs::write(place.path("c.toml"), "lr = nan\n").unwrap();
    place.fails(2, "learn teacher/model out --config c.toml");
    place.fails(2, "distill teacher/model out --steps 1 --features masked");
    place.fails(2, "distill teacher/model out --steps 1 --selection s.json");
    place.fails(
        2,
        "sample teacher/model out --sampler ddpm --steps 18446744073709551615",
    );
    place.fails(2, "sample teacher/model out --count 18446744073709551615");
    place.fails(2, "pretrain out --what classifier --patch-size 0");
    place.fails(2, "pretrain out --depth 1000000000000000000");
    place.fails(
        2,
        "distill teacher/model out --steps 1 --teacher teacher/model --features masked",
    );
    place.fails(2, "sample teacher/model out --count 0");
    place.fails(
        2,
        "sample teacher/model out --count 1 --sampler ddim --steps 999999",
    );
    place.fails(2, "no-such-command");
    // What would do nothing is not passed over in silence.
    for line in [
        "sample teacher/model out --sampler ddpm --eta 0.5",
        "sample teacher/model out --sampler dpm --eta 0",
        "score teacher/model out --criterion oracle --pattern 1:2",
        "score teacher/model out --criterion oracle --seed 1",
        "distill teacher/model out --teacher teacher/model --features none --beta 1",
        "distill teacher/model out --teacher teacher/model --features none --sigma 1",
        "distill teacher/model out --teacher teacher/model --features none --beta-epoch 1",
        "distill teacher/model out --steps 1 --samples 64",
        "distill teacher/model out --steps 1 --ema 0.9 --ema-half-life 64",
        "distill teacher/model out --steps 1 --lr 1e-3 --lr-scaling sqrt",
        "distill teacher/model out --steps 1 --lr 1e-3 --lr-batch 16",
        "distill teacher/model out --steps 1 --recipe other",
        "cut teacher/model out --selection s.json --pattern 1:2",
    ] {
        place.fails(2, line);
    }
    // A negative number is a mistake in the number, not an unknown flag.
    for (flag, says) in [("cfg", "cfg is -3"), ("eta", "eta is -3")] {
        let error = place.fails(2, &format!("sample teacher/model out --{flag} -3"));
        assert!(error.contains(says), "{error}");
    }
    let error = place.fails(2, "distill teacher/model out --lr -1");
    assert!(error.contains("lr.peak is -1"), "{error}");
    let error = place.fails(2, "cut teacher/model out --keep 0,1 --pattern 1:2");
    assert!(error.contains("1:2"), "{error}");
    assert!(!place.path("out").exists());
}

#[test]
fn cut_never_replaces_a_folder() {
    let place = Place::with_teacher();
    let before = place.bytes("teacher/model/model.safetensors");
    place.fails(2, "cut teacher/model teacher/model --keep 0,1");
    assert_eq!(before, place.bytes("teacher/model/model.safetensors"));
}

#[test]
fn a_config_written_by_hand_needs_only_architecture_and_model() {
    let place = Place::with_teacher();
    let full = place.json("teacher/model/config.json");
    std::fs::create_dir(place.path("hand")).unwrap();
    std::fs::copy(
        place.path("teacher/model/model.safetensors"),
        place.path("hand/model.safetensors"),
    )
    .unwrap();
    let mut config = serde_json::json!({ "architecture": "DiT", "model": full["model"], "diffusion": full["diffusion"] });
    std::fs::write(place.path("hand/config.json"), config.to_string()).unwrap();
    place.ok("cut hand out --keep 0,1");
    config["model"]["depth"] = 1_000_000_000_000_000_000u64.into();
    std::fs::write(place.path("hand/config.json"), config.to_string()).unwrap();
    let error = place.fails(1, "cut hand out2 --keep 0,1");
    assert!(error.contains("depth"), "{error}");
}

#[test]
fn a_folder_with_another_run_is_not_touched() {
    let place = Place::with_teacher();
    place.ok("learn teacher/model out --pattern 1:2 --steps 2 --batch-size 8");
    let before = place.text("out/selection.json");
    let error = place.fails(
        2,
        "learn teacher/model out --pattern 1:2 --steps 2 --batch-size 8 --seed 5",
    );
    assert!(
        error.contains("seed"),
        "says which setting differs: {error}"
    );
    assert_eq!(before, place.text("out/selection.json"));
}

#[test]
fn what_stands_somewhere_is_not_overwritten() {
    let place = Place::with_teacher();
    let weights = place.bytes("teacher/model/model.safetensors");
    let training = "--steps 2 --batch-size 4";
    // A run in a model's folder, an export over another model, a selection over another and into a model.
    for line in [
        format!("distill teacher/model teacher/model {training}"),
        format!("distill teacher/model out {training} --export teacher/model"),
        "score teacher/model teacher/model --criterion oracle".into(),
    ] {
        place.fails(2, &line);
        assert!(!place.path("out").exists());
        assert_eq!(weights, place.bytes("teacher/model/model.safetensors"));
        assert!(!place.path("teacher/model/selection.json").exists());
    }
    let random = "score teacher/model chosen --criterion random --seed";
    place.ok(&format!("{random} 1"));
    place.ok(&format!("{random} 1"));
    let selection = place.text("chosen/selection.json");
    let error = place.fails(
        2,
        "score teacher/model chosen --criterion random --pattern 2:4",
    );
    assert!(error.contains("chosen/selection.json"), "{error}");
    assert_eq!(selection, place.text("chosen/selection.json"));

    // Its own export may be repeated, another's only when asked.
    let export = format!("distill teacher/model out {training} --export half");
    place.ok(&export);
    place.ok(&export);
    let other = format!("distill teacher/model out2 {training} --seed 5 --export half");
    place.fails(2, &other);
    place.ok(&format!("{other} --overwrite"));
}

#[test]
fn a_run_that_learned_nothing_fails() {
    let place = Place::with_teacher();
    for line in [
        "distill teacher/model out --steps 8 --batch-size 4 --lr 1e30",
        "learn teacher/model out2 --steps 8 --batch-size 4 --lr 1e30 --delta full",
    ] {
        let error = place.fails(1, line);
        assert!(error.contains("steps were skipped"), "{error}");
    }
    assert!(!place.path("out/model").exists() && !place.path("out2/selection.json").exists());
}

#[test]
fn inspect_compares_the_weights_with_their_description() {
    let place = Place::with_teacher();
    let (config, weights) = (
        "teacher/model/config.json",
        "teacher/model/model.safetensors",
    );
    let right = place.json(config);
    for (key, value) in [
        ("depth", 3.into()),
        ("hidden_size", 32.into()),
        ("dept", 4.into()),
    ] {
        let mut wrong: serde_json::Value = right.clone();
        wrong["model"][key] = value;
        std::fs::write(place.path(config), wrong.to_string()).unwrap();
        place.fails(1, "inspect teacher/model");
        place.fails(1, "inspect teacher/model --json");
    }
    std::fs::write(place.path(config), right.to_string()).unwrap();
    place.ok("inspect teacher/model");
    let mut bytes = place.bytes(weights);
    let last = bytes.len() - 3;
    bytes[last] ^= 0x40;
    std::fs::write(place.path(weights), bytes).unwrap();
    let error = place.fails(1, "inspect teacher/model");
    assert!(error.contains("SHA-256"), "{error}");
}

#[test]
fn the_folder_of_a_run_is_not_the_model_in_it() {
    let place = Place::with_teacher();
    let error = place.fails(1, "sample teacher out --count 1 --steps 1");
    assert!(error.contains("did you mean teacher/model?"), "{error}");
}

#[test]
fn damaged_checkpoints() {
    let place = Place::with_teacher();
    let weights = place.bytes("teacher/model/model.safetensors");
    let config = place.text("teacher/model/config.json");
    let write = |bytes: &[u8]| {
        let _ = std::fs::remove_dir_all(place.path("bad"));
        std::fs::create_dir(place.path("bad")).unwrap();
        std::fs::write(place.path("bad/config.json"), &config).unwrap();
        std::fs::write(place.path("bad/model.safetensors"), bytes).unwrap();
    };
    for cut in [0, 4, 8, 100, weights.len() / 2, weights.len() - 1] {
        write(&weights[..cut]);
        let error = place.fails(1, "sample bad out --count 1 --steps 1");
        assert!(error.contains("bad"), "names the file: {error}");
        assert!(!place.path("out").exists());
    }
    let mut flipped = weights.clone();
    let last = flipped.len() - 3;
    flipped[last] ^= 0x40;
    write(&flipped);
    place.fails(1, "sample bad out --count 1 --steps 1");
    // The header claims more than any machine has.
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    write(&huge);
    place.fails(1, "inspect bad");
    place.fails(1, "sample nowhere out --count 1");
    assert_eq!(partials(place.path("").as_path()).len(), 0);
}

/// The teacher's weights in `bad/`, changed by `change`, without the recorded hash.
fn rewrite(place: &Place, change: impl Fn(&mut tinyfusion::core::StateDict)) {
    use tinyfusion::checkpoint::{DTypePolicy, Metadata, load, save};
    let device = candle_core::Device::Cpu;
    let mut tensors = load(place.path("teacher/model/model.safetensors"), &device)
        .unwrap()
        .tensors;
    change(&mut tensors);
    let _ = std::fs::remove_dir_all(place.path("bad"));
    std::fs::create_dir(place.path("bad")).unwrap();
    let file = place.path("bad/model.safetensors");
    save(&file, &tensors, &Metadata::new(), DTypePolicy::Keep).unwrap();
    let mut config = place.json("teacher/model/config.json");
    config["weights"]["sha256"] = tinyfusion::checkpoint::sha256_file(&file).unwrap().into();
    std::fs::write(place.path("bad/config.json"), config.to_string()).unwrap();
}

#[test]
fn weights_that_do_not_fit_the_config() {
    let place = Place::with_teacher();
    let key = "blocks.1.attn.qkv.weight";
    rewrite(&place, |t| drop(t.remove(key)));
    let error = place.fails(1, "sample bad out --count 1 --steps 1");
    assert!(error.contains(key) && error.contains("missing"), "{error}");
    rewrite(&place, |t| {
        t.insert(
            key,
            t.require(key)
                .unwrap()
                .narrow(0, 0, 7)
                .unwrap()
                .contiguous()
                .unwrap(),
        );
    });
    let error = place.fails(1, "sample bad out --count 1 --steps 1");
    assert!(
        error.contains(key) && error.contains("[7, 16]") && error.contains("[48, 16]"),
        "{error}"
    );
    rewrite(&place, |t| {
        t.insert("blocks.9.extra", t.require(key).unwrap().clone());
    });
    let error = place.fails(1, "sample bad out --count 1 --steps 1");
    assert!(
        error.contains("blocks.9.extra") && error.contains("unexpected"),
        "{error}"
    );
}

#[test]
fn weights_that_are_not_numbers() {
    let place = Place::with_teacher();
    // The four bytes before the end are a value of the last tensor.
    let mut bytes = place.bytes("teacher/model/model.safetensors");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::create_dir(place.path("bad")).unwrap();
    std::fs::write(place.path("bad/model.safetensors"), &bytes).unwrap();
    let mut config = place.json("teacher/model/config.json");
    config["weights"]["sha256"] =
        tinyfusion::checkpoint::sha256_file(place.path("bad/model.safetensors"))
            .unwrap()
            .into();
    std::fs::write(place.path("bad/config.json"), config.to_string()).unwrap();
    let error = place.fails(1, "learn bad out --steps 1");
    assert!(
        error.to_lowercase().contains("nan") || error.contains("finite"),
        "{error}"
    );
}

#[test]
fn samples_and_judges_that_do_not_fit() {
    let place = Place::with_teacher();
    let error = place.fails(1, "evaluate shapes:10 none.npz --classifier teacher/model");
    assert!(
        error.contains("DiT") && error.contains("classifier"),
        "{error}"
    );
    place.ok("pretrain judge --what classifier --steps 1 --depth 1 --hidden-size 16 --num-heads 2 --patch-size 8 --batch-size 8");
    place.fails(1, "evaluate shapes:10 none.npz --classifier judge/model");
    std::fs::write(place.path("bad.npz"), b"PK not a zip").unwrap();
    let error = place.fails(1, "evaluate shapes:10 bad.npz --classifier judge/model");
    assert!(error.contains("bad.npz"), "{error}");
    place.ok("sample teacher/model s --count 4 --steps 1");
    place.fails(
        2,
        "evaluate shapes:ten s/samples.npz --classifier judge/model",
    );
}
