//! From a trained network to evaluated images of a half-depth one, command by command.
#![allow(clippy::unwrap_used)] // a test may panic

use tinyfusion_tests::{Place, partials};

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
fn a_cut_lays_its_selection_beside_the_model() {
    let place = Place::with_teacher();
    place.ok("cut teacher/model cut --keep 0,3 --pattern 1:2");
    let selection = place.json("cut/selection.json");
    assert_eq!(selection["kept"], serde_json::json!([0, 3]));
    assert_eq!(selection["groups"].as_array().unwrap().len(), 2);
    // Distillation finds it there, and so aligns two pairs of blocks.
    let flags = "--steps 2 --batch-size 4 --teacher teacher/model";
    place.ok(&format!("distill cut student {flags}"));
    let settings = place.text("student/config.toml");
    assert!(settings.contains("layers = ["), "{settings}");
    place.ok(&format!(
        "distill cut named {flags} --selection cut/selection.json"
    ));
    assert_eq!(settings, place.text("named/config.toml"));

    // The record says how it was cut after training, and after a second cut.
    let record = |model: &str| place.json(&format!("{model}/config.json"))["provenance"].clone();
    let trained = record("student/model");
    for key in ["kept", "criterion", "pattern"] {
        assert_eq!(trained[key], record("cut")[key], "{key}");
    }
    // It lies beside the recovered model too, for a second recovery; another mask's does not fit.
    assert_eq!(
        place.text("student/model/selection.json"),
        place.text("cut/selection.json")
    );
    place.ok(&format!("distill student/model second {flags}"));
    std::fs::write(
        place.path("other.json"),
        place.text("cut/selection.json").replace("3\n  ]", "2\n  ]"),
    )
    .unwrap();
    let error = place.fails(
        2,
        &format!("distill cut wrong {flags} --selection other.json"),
    );
    assert!(
        error.contains("[0, 3]") && error.contains("[0, 2]"),
        "{error}"
    );
    // Finished: run again, it only exports.
    place.ok(&format!("distill cut student {flags} --export half"));
    assert!(place.ok("inspect half --tensors").contains("F16"));
    place.ok("cut student/model again --keep 1");
    let again = record("again");
    assert_eq!(again["kept"], serde_json::json!([1]));
    assert_eq!(again["ancestors"][0]["kept"], serde_json::json!([0, 3]));
    assert_eq!(again["ancestors"].as_array().unwrap().len(), 3);
    let shown = place.ok("inspect again");
    assert!(
        shown.contains("kept        [1], found by indices, pattern 1:2")
            && shown.contains("kept        [0, 3], found by indices, pattern 1:2,1:2"),
        "{shown}"
    );
}

#[test]
fn results_say_what_they_were_made_from() {
    let place = Place::with_teacher();
    place.ok("score teacher/model pick --criterion oracle");
    place
        .ok("loss teacher/model --selection pick/selection.json --images 8 --seed 3 --json l.json");
    let loss = place.json("l.json");
    let sha = place.json("teacher/model/config.json")["weights"]["sha256"].clone();
    assert_eq!(
        (&loss["model_sha256"], &loss["seed"], &loss["data"]),
        (&sha, &3.into(), &"shapes".into())
    );
    assert_eq!(loss["selection"], "pick/selection.json");
    assert_eq!(loss["kept"], place.json("pick/selection.json")["kept"]);

    place.ok("sample teacher/model s --count 6 --steps 2 --batch-size 4 --grid-columns 3");
    let sample = place.json("s/sample.json");
    assert_eq!(sample["model_sha256"], sha);
    assert_eq!(
        (
            &sample["batch_size"],
            &sample["grid_columns"],
            &sample["respacing"]
        ),
        (&4.into(), &3.into(), &"ddim2".into())
    );

    place.ok("pretrain judge --what classifier --steps 1 --depth 1 --hidden-size 16 --num-heads 2 --patch-size 8 --batch-size 8");
    place.ok("evaluate shapes:10 s/samples.npz --classifier judge/model --json f.json");
    let scores = place.json("f.json");
    assert_eq!(
        (
            &scores["reference"],
            &scores["samples"],
            &scores["classifier"]
        ),
        (
            &"shapes:10".into(),
            &"s/samples.npz".into(),
            &"judge/model".into()
        )
    );
    assert_eq!(
        scores["classifier_sha256"],
        place.json("judge/model/config.json")["weights"]["sha256"]
    );
}

#[test]
fn sampling_visits_the_timesteps_that_are_asked_for() {
    let place = Place::with_teacher();
    for (respacing, steps) in [("3", 3), ("2,1,2", 5), ("ddim4", 4)] {
        for sampler in ["ddpm", "ddim", "dpm"] {
            let out = format!("{sampler}-{respacing}");
            place.ok(&format!(
                "sample teacher/model {out} --count 1 --sampler {sampler} --respacing {respacing}"
            ));
            assert_eq!(place.json(&format!("{out}/sample.json"))["steps"], steps);
        }
    }
    // The advice of the error can be followed.
    let error = place.fails(2, "sample teacher/model out --count 1 --steps 300");
    assert!(
        error.contains("--respacing 300") && error.contains("--steps 334"),
        "{error}"
    );
    place.ok("sample teacher/model out --count 1 --steps 334");
    place.fails(
        2,
        "sample teacher/model o --count 1 --steps 3 --respacing 3",
    );
    place.fails(2, "sample teacher/model o --count 1 --respacing 1,x");
}

#[test]
fn a_record_holds_the_settings_of_a_file() {
    let place = Place::new();
    std::fs::write(
        place.path("p.toml"),
        "steps = 2\nbatch-size = 8\ndepth = 2\nhidden-size = 16\npatch-size = 8\n",
    )
    .unwrap();
    place.ok("pretrain run --config p.toml --seed 4");
    let command = &place.json("run/model/config.json")["provenance"]["command"];
    assert_eq!(
        command,
        "tinyfusion pretrain --batch-size=8 --depth=2 --hidden-size=16 --patch-size=8 --steps=2 run --seed 4"
    );
    // A command inside a command takes a file too.
    std::fs::write(place.path("b.toml"), "batch = 2\nkind = \"forward\"\n").unwrap();
    place.ok("bench prepare case --config b.toml --model DiT-S/8 --depth 1 --input-size 8");
    assert_eq!(place.json("case/case.json")["batch"], 2);
}

#[test]
fn a_model_of_latents_gives_latents() {
    let place = Place::new();
    place
        .ok("bench prepare case --kind forward --model DiT-S/8 --depth 1 --input-size 8 --batch 1");
    let said = place.ok("sample case/model out --count 3 --steps 2 --cfg-channels first-three");
    assert!(said.contains("latents (pictures need --vae)"), "{said}");
    let arrays = candle_core::Tensor::read_npz(place.path("out/samples.npz")).unwrap();
    let of = |name: &str| &arrays.iter().find(|(n, _)| n == name).unwrap().1;
    assert_eq!(of("arr_0").dims(), [3, 4, 8, 8]);
    assert_eq!(of("arr_0").dtype(), candle_core::DType::F32);
    assert_eq!(of("arr_1").dims(), [3]);
    assert!(!place.path("out/grid.png").exists());
    assert_eq!(place.json("out/sample.json")["clip"], false);
}

#[test]
fn features_of_any_network_can_be_compared() {
    use candle_core::{Device, Tensor};
    let place = Place::new();
    let matrix = |rows: usize, columns: usize, shift: f32| {
        let value = |i: usize| ((i * 7919) % 101) as f32 / 101.0 + shift;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    };
    let (a, b, logits) = (matrix(40, 4, 0.0), matrix(30, 4, 0.5), matrix(30, 3, 0.0));
    Tensor::write_npz(&[("arr_0", &a)], place.path("a.npz")).unwrap();
    Tensor::write_npz(&[("arr_0", &b), ("arr_1", &logits)], place.path("b.npz")).unwrap();
    place.ok("evaluate a.npz b.npz --features --json f.json");
    let scores = place.json("f.json");
    // Nearly the same values, moved by 0.5 in each of four dimensions.
    assert!(
        (scores["fid"].as_f64().unwrap() - 1.0).abs() < 0.1,
        "{scores}"
    );
    for key in ["precision", "recall", "kid", "inception_score"] {
        assert!(scores[key].is_f64(), "{key}: {scores}");
    }
    assert_eq!(scores["features"], "as given");
    place.ok("evaluate b.npz a.npz --features --json f.json");
    assert!(place.json("f.json")["inception_score"].is_null());
    place.fails(2, "evaluate a.npz b.npz");
    place.fails(2, "evaluate a.npz b.npz --features --classifier c");
    let error = place.fails(1, "evaluate shapes:10 b.npz --features");
    assert!(error.contains("shapes:10"), "{error}");
}

#[test]
fn a_reader_that_leaves_early_breaks_nothing() {
    use std::process::Stdio;
    let place = Place::new();
    for line in ["models", "models --json", "--help"] {
        // The reading end is closed before the program starts.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = place
            .command(line)
            .stdout(Stdio::from(writer))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{line}: {said}");
        assert_eq!(said, "", "{line}");
    }
}

#[test]
fn a_recipe_is_recorded_by_its_values_and_a_long_memory_is_told() {
    let place = Place::with_teacher();
    place.ok("cut teacher/model cut --keep 0,3 --pattern 1:2");
    let told = |line: &str| {
        let output = place.run(line);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}\n{text}");
        text.contains("will still be the cut model")
    };
    let flags = "--samples 22 --batch-size 4 --teacher teacher/model";
    assert!(!told(&format!("distill cut robust {flags}")));
    let settings = place.text("robust/config.toml");
    for value in ["steps = 6", "ema-rampup = 0.05", "features = \"joint\""] {
        assert!(settings.contains(value), "{value}: {settings}");
    }
    // The name is not recorded: the same values are the same run, other ones another.
    let line = format!("distill cut robust {flags} --recipe robust --steps 6")
        .replace("--samples 22 ", "");
    place.ok(&line);
    let error = place.fails(2, &line.replace("recipe robust", "recipe reference"));
    assert!(error.contains("ema-rampup"), "{error}");

    assert!(told(&format!(
        "distill cut reference {flags} --recipe reference"
    )));
    let settings = place.text("reference/config.toml");
    for value in [
        "ema = 0.9999",
        "features = \"masked\"",
        "steps-per-epoch = 1",
    ] {
        assert!(settings.contains(value), "{value}: {settings}");
    }
}
