//! From a trained network to evaluated images of a half-depth one, command by command.
#![allow(clippy::unwrap_used)] // a test may panic

use tinyfusion_tests::{Place, TINY, partials};

#[test]
fn a_teacher_becomes_a_recovered_student() {
    let place = Place::with_teacher();
    place.ok("learn teacher/model learned --pattern 1:2 --steps 6 --batch-size 8");
    let selection = place.json("learned/selection.json");
    assert_eq!(selection["kept"].as_array().unwrap().len(), 2);
    assert_eq!(selection["criterion"], "learned");
    // Every decision on the way is on record.
    let history = place.text("learned/history.jsonl");
    assert_eq!(history.lines().count(), 6);
    let first: serde_json::Value = serde_json::from_str(history.lines().next().unwrap()).unwrap();
    assert_eq!(first["keep_probability"].as_array().unwrap().len(), 4);

    place.ok("cut teacher/model cut --selection learned/selection.json");
    let config = place.json("cut/config.json");
    assert_eq!(config["model"]["depth"], 2);
    assert_eq!(config["provenance"]["kept"], selection["kept"]);
    assert_eq!(
        config["provenance"]["parent_sha256"],
        selection["source_sha256"]
    );

    place
        .ok("loss teacher/model --selection learned/selection.json --images 32 --json before.json");
    place.ok("loss cut --images 32 --json cut.json");
    // Skipping blocks is cutting them.
    let (skipped, cut) = (
        place.json("before.json")["loss"].as_f64().unwrap(),
        place.json("cut.json")["loss"].as_f64().unwrap(),
    );
    assert!((skipped - cut).abs() < 1e-6 * cut.abs(), "{skipped} {cut}");

    place.ok("distill cut student --steps 30 --batch-size 8 --lr 3e-3");
    place.ok("loss student/model --images 32 --json after.json");
    let after = place.json("after.json")["loss"].as_f64().unwrap();
    assert!(
        after < cut,
        "fine-tuning lowers the held-out loss: {cut} to {after}"
    );
    for features in ["none", "all", "masked", "joint"] {
        place.ok(&format!(
            "distill cut kd-{features} --steps 3 --batch-size 8 --teacher teacher/model --features {features} \
             --selection learned/selection.json"
        ));
        let metrics = place.text(&format!("kd-{features}/metrics.jsonl"));
        assert!(metrics.contains("\"kd\":"), "{metrics}");
        assert_eq!(metrics.contains("\"rep\":"), features != "none");
    }

    place.ok("pretrain judge --what classifier --steps 8 --depth 1 --hidden-size 16 --num-heads 2 --patch-size 8 --batch-size 8");
    for sampler in ["ddpm", "ddim", "dpm"] {
        place.ok(&format!("sample student/model images-{sampler} --count 12 --steps 4 --sampler {sampler} --batch-size 5"));
    }
    let printed = place
        .ok("evaluate shapes:40 images-ddim/samples.npz --classifier judge/model --json fid.json");
    let report = place.json("fid.json");
    assert!(printed.contains("not Inception"));
    assert!(report["fid"].as_f64().unwrap() > 0.0);
    assert_eq!(report["sample_count"], 12);
    for name in ["resources.json", "images-ddim/resources.json"] {
        let name = if name.contains('/') {
            name.to_string()
        } else {
            format!("student/{name}")
        };
        assert!(place.json(&name)["seconds"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(
        partials(place.path("").as_path()),
        Vec::<std::path::PathBuf>::new()
    );
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let place = Place::with_teacher();
    for out in ["a", "b"] {
        place.ok(&format!(
            "sample teacher/model {out} --count 6 --steps 3 --batch-size 4"
        ));
        place.ok(&format!(
            "learn teacher/model learn-{out} --pattern 2:4 --delta full --steps 4 --batch-size 8"
        ));
    }
    assert_eq!(place.bytes("a/grid.png"), place.bytes("b/grid.png"));
    assert_eq!(
        place.text("learn-a/selection.json"),
        place.text("learn-b/selection.json")
    );
    assert_eq!(
        place.text("learn-a/history.jsonl"),
        place.text("learn-b/history.jsonl")
    );
    // An image depends on its number, not on the batch it is drawn in.
    place.ok("sample teacher/model c --count 6 --steps 3 --batch-size 6");
    assert_eq!(place.bytes("a/grid.png"), place.bytes("c/grid.png"));
}

#[test]
fn a_file_gives_settings_and_flags_win() {
    let place = Place::new();
    std::fs::write(
        place.path("p.toml"),
        "steps = 3\nbatch-size = 8\nlr = 0.002\ndepth = 2\nhidden-size = 16\npatch-size = 8\n",
    )
    .unwrap();
    place.ok("pretrain run --config p.toml --steps 2");
    let resolved = place.text("run/config.toml");
    assert!(resolved.contains("steps = 2"), "{resolved}");
    assert!(resolved.contains("peak = 0.002"), "{resolved}");
    assert!(resolved.contains("depth = 2"), "{resolved}");
    // Finished: run again, it returns at once and changes nothing.
    let before = place.bytes("run/model/model.safetensors");
    place.ok("pretrain run --config p.toml --steps 2");
    assert_eq!(before, place.bytes("run/model/model.safetensors"));
}

#[test]
fn every_setting_of_a_search_can_be_written_down() {
    let place = Place::with_teacher();
    std::fs::write(
        place.path("learn.toml"),
        "pattern = [\"1:2\", \"1:2\"]\nsteps = 4\nbatch-size = 4\nclip = 0\nblend = \"plain\"\nhistory-every = 2\n\
         lora-layers = [\"attn.qkv\", \"mlp.fc1\"]\nscale-from = 10\nscale-to = 100.0\n",
    )
    .unwrap();
    place.ok("learn teacher/model learned --config learn.toml");
    assert_eq!(place.text("learned/history.jsonl").lines().count(), 2);
    let settings = &place.json("learned/selection.json")["settings"];
    assert_eq!(settings["blend"], "plain");
    assert_eq!(settings["scale"]["from"], 10.0);
    assert_eq!(settings["fit"]["clip"], serde_json::Value::Null);
    assert_eq!(settings["delta"]["lora"]["layers"]["named"][1], "mlp.fc1");

    std::fs::write(
        place.path("kd.toml"),
        "beta-epoch = 2\nsteps = 4\nbatch-size = 4\nlr = 1e-3\n",
    )
    .unwrap();
    place.ok("cut teacher/model cut --selection learned/selection.json");
    place.ok("distill cut student --config kd.toml --teacher teacher/model --selection learned/selection.json");
    assert!(
        place
            .text("student/config.toml")
            .contains("steps-per-epoch = 2")
    );

    std::fs::write(
        place.path("sample.toml"),
        "count = 4\nsteps = 3\nclip = false\n",
    )
    .unwrap();
    place.ok("sample --config sample.toml student/model images --steps 2");
    let told = place.json("images/sample.json");
    assert_eq!(
        (&told["count"], &told["steps"], &told["clip"]),
        (&4.into(), &2.into(), &false.into())
    );
}

#[test]
fn every_command_explains_itself() {
    let place = Place::new();
    let all = place.ok("--help");
    for command in [
        "models", "inspect", "pretrain", "learn", "score", "cut", "distill", "loss", "sample",
        "evaluate",
    ] {
        assert!(all.contains(command), "{all}");
        let help = place.ok(&format!("{command} --help"));
        assert!(
            help.contains("Example"),
            "{command} --help shows an example:\n{help}"
        );
    }
    assert!(place.ok("models").contains("DiT-XL/2"));
    place.ok(&format!("pretrain t --steps 2 {TINY}"));
    let seen = place.ok("inspect t/model");
    assert!(
        seen.contains("DiT") && seen.contains("depth       4"),
        "{seen}"
    );
}
