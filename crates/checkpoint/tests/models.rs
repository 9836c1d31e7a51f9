//! Model directories, and cutting blocks for good.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};
use tinyfusion_checkpoint::{
    DTypePolicy, Provenance, inspect, keep_blocks, load_model_dir, remove_partials, save_model_dir,
};
use tinyfusion_core::{Error, StateDict};

const CPU: Device = Device::Cpu;

fn filled(names: impl IntoIterator<Item = String>, len: usize) -> StateDict {
    names
        .into_iter()
        .enumerate()
        .map(|(i, name)| (name, Tensor::full(i as f32, len, &CPU).expect("full")))
        .collect()
}

fn stack(depth: usize) -> StateDict {
    filled(
        (0..depth)
            .map(|i| format!("blocks.{i}.w"))
            .chain(["head.w".into()]),
        4,
    )
}

fn config() -> Value {
    json!({"architecture": "DiT", "model": {"depth": 2, "hidden": 64}, "latent_scale": 0.18215})
}

fn provenance() -> Provenance {
    Provenance {
        parent_sha256: Some("ab".repeat(32)),
        kept: Some(vec![0, 3]),
        criterion: Some("learned".into()),
        pattern: Some("1:2".into()),
        steps: Some(1200),
        notes: [("seed".to_string(), "7".to_string())]
            .into_iter()
            .collect(),
        ..Provenance::of_command("tinyfusion cut teacher --selection s.json")
    }
}

#[test]
fn every_ancestor_stays_readable() {
    let teacher = Provenance::of_command("tinyfusion pretrain t");
    let cut = Provenance {
        kept: Some(vec![0, 3]),
        criterion: Some("learned".into()),
        pattern: Some("1:2".into()),
        ..Provenance::of_command("tinyfusion cut t c").with_parent("t1", &teacher)
    };
    let trained = Provenance::of_command("tinyfusion distill c d")
        .with_parent("c1", &cut)
        .with_cut_of(&cut);
    assert_eq!(trained.kept, cut.kept);
    assert_eq!(trained.pattern.as_deref(), Some("1:2"));
    let again = Provenance {
        kept: Some(vec![1]),
        ..Provenance::of_command("tinyfusion cut d e").with_parent("d1", &trained)
    };
    assert_eq!(again.parent_sha256.as_deref(), Some("d1"));
    let kept: Vec<_> = again.ancestors.iter().map(|a| a.kept.clone()).collect();
    assert_eq!(kept, [Some(vec![0, 3]), Some(vec![0, 3]), None]);
    assert!(again.ancestors.iter().all(|a| a.ancestors.is_empty()));
    let text = serde_json::to_string(&again).unwrap();
    assert_eq!(serde_json::from_str::<Provenance>(&text).unwrap(), again);
    // A model without a record has none to hand on.
    let by_hand = Provenance::of_command("x").with_parent("h1", &Provenance::default());
    assert!(by_hand.ancestors.is_empty() && by_hand.parent_sha256.is_some());
}

fn message(result: Result<impl Sized, Error>) -> String {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(e) => e.to_string(),
    }
}

fn entries(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder)
        .expect("folder")
        .map(|e| e.expect("entry").file_name().into_string().expect("utf-8"))
        .collect()
}

#[test]
fn a_model_directory_comes_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("deep/er/student");
    let sha256 =
        save_model_dir(&dir, &stack(2), &config(), &provenance(), DTypePolicy::Bf16).unwrap();
    let model = load_model_dir(&dir, DTypePolicy::F32, &CPU).unwrap();
    assert_eq!(model.config, config());
    assert_eq!(model.provenance, provenance());
    assert_eq!(
        model.provenance.tool_version.as_deref(),
        Some(env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(model.weights.sha256, sha256);
    assert!(model.weights.tensors.names().eq(stack(2).names()));

    let seen = inspect(&dir).unwrap();
    assert_eq!(
        (seen.config, seen.provenance),
        (Some(config()), Some(provenance()))
    );
    assert_eq!(seen.recorded_sha256, Some(sha256));
    assert_eq!(seen.blocks["blocks"], 2);

    // Replacing it leaves exactly the two files.
    save_model_dir(
        &dir,
        &stack(3),
        &config(),
        &Provenance::default(),
        DTypePolicy::Keep,
    )
    .unwrap();
    assert_eq!(
        load_model_dir(&dir, DTypePolicy::Keep, &CPU)
            .unwrap()
            .weights
            .tensors
            .len(),
        4
    );
    assert!(
        entries(&dir)
            .iter()
            .eq(["config.json", "model.safetensors"])
    );
    assert_eq!(entries(dir.parent().unwrap()).len(), 1);
}

#[test]
fn configs_that_do_not_fit_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("m");
    for (config, part) in [
        (json!([1]), "must be an object"),
        (json!({"model": {}}), "needs `architecture`"),
        (json!({"architecture": "DiT"}), "needs `model`"),
        (json!({"architecture": "DiT", "model": 3}), "needs `model`"),
        (
            json!({"architecture": "DiT", "model": {}, "weights": 1}),
            "`weights`",
        ),
    ] {
        let text = message(save_model_dir(
            &dir,
            &stack(1),
            &config,
            &provenance(),
            DTypePolicy::Keep,
        ));
        assert!(text.contains(part), "{text}");
        assert!(entries(folder.path()).is_empty());
    }
    let nan: StateDict = [("w".to_string(), Tensor::new(&[f32::NAN], &CPU).unwrap())]
        .into_iter()
        .collect();
    let text = message(save_model_dir(
        &dir,
        &nan,
        &config(),
        &provenance(),
        DTypePolicy::Keep,
    ));
    assert!(text.contains("`w` holds NaN"), "{text}");
    assert!(entries(folder.path()).is_empty());
}

#[test]
fn broken_directories_get_clear_errors() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("m");
    let load = || message(load_model_dir(&dir, DTypePolicy::Keep, &CPU));
    assert!(load().contains("does not exist"));
    fs::create_dir(&dir).unwrap();
    assert!(load().contains("config.json"));
    save_model_dir(&dir, &stack(1), &config(), &provenance(), DTypePolicy::Keep).unwrap();
    let (weights, json) = (dir.join("model.safetensors"), dir.join("config.json"));

    let good = fs::read_to_string(&json).unwrap();
    fs::write(&json, &good[..good.len() / 2]).unwrap();
    assert!(load().contains("is not a model's config"));
    fs::write(&json, good.replace("architecture", "arch")).unwrap();
    assert!(
        load().contains("missing field `architecture`"),
        "{}",
        load()
    );
    fs::write(&json, &good).unwrap();

    // One weight changed in place: still a fine safetensors file, but not this model's.
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&5.0f32.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    assert!(load().contains("does not belong to the config.json"));
    fs::remove_file(&weights).unwrap();
    assert!(load().contains("model.safetensors"));
}

/// Set in the process that is killed: the folder it saves into, over and over.
const CHILD: &str = "TINYFUSION_TEST_SAVE_INTO";

#[test]
fn killed_at_any_moment_every_directory_is_whole_or_absent() {
    let big = |seed: usize| filled((0..24).map(|i| format!("blocks.{i}.w")), 40_000 + seed % 3);
    if let Ok(folder) = std::env::var(CHILD) {
        // Bounded, so that an orphan does not fill the disk.
        for step in 0..100 {
            let dir = Path::new(&folder).join(format!("step-{step}"));
            save_model_dir(&dir, &big(step), &config(), &provenance(), DTypePolicy::F32).unwrap();
        }
        return;
    }
    let name = "killed_at_any_moment_every_directory_is_whole_or_absent";
    let mut whole = 0;
    for delay in [0, 7, 20, 45, 80, 130] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From its first sign of life on, so that slow machines test the same thing.
        while entries(folder.path()).is_empty() {
            assert!(child.try_wait().unwrap().is_none(), "the child ended early");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        remove_partials(folder.path()).unwrap();
        for entry in entries(folder.path()) {
            assert!(entry.starts_with("step-"), "{entry}");
            let model = load_model_dir(folder.path().join(entry), DTypePolicy::Keep, &CPU).unwrap();
            assert_eq!(model.weights.tensors.len(), 24);
            whole += 1;
        }
    }
    assert!(
        whole > 0,
        "the longest delay should let at least one save finish"
    );
}

#[test]
fn cutting_says_what_is_wrong() {
    let tensors = stack(4);
    for (prefix, kept, part) in [
        ("blocks", &[][..], "at least one"),
        ("blocks", &[2, 1], "ascend, found 2 before 1"),
        ("blocks", &[1, 1], "ascend"),
        (
            "blocks",
            &[1, 4, 9],
            "[4, 9] of `blocks`; there are 4 blocks, 0 to 3",
        ),
        ("layers", &[0], "there are none"),
    ] {
        let text = message(keep_blocks(&tensors, prefix, kept));
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn cutting_leaves_similar_names_alone() {
    let others = [
        "blocks_extra.1.w",
        "blocks.norm.w",
        "blocks.01.w",
        "encoder.blocks.1.w",
        "pos_embed",
    ];
    let tensors = filled(
        others
            .iter()
            .map(|s| (*s).to_string())
            .chain(["blocks.1.w".into()]),
        1,
    );
    let cut = keep_blocks(&tensors, "blocks", &[1]).unwrap();
    let expected: BTreeSet<&str> = others.into_iter().chain(["blocks.0.w"]).collect();
    assert_eq!(cut.names().collect::<BTreeSet<_>>(), expected);
    let cut = keep_blocks(&tensors, "encoder.blocks", &[1]).unwrap();
    assert!(cut.get("encoder.blocks.0.w").is_some() && cut.get("blocks.1.w").is_some());
}

proptest! {
    /// Whatever is kept: block j of the cut stack is block kept[j], nothing else of the stack is left, and
    /// everything outside the stack is untouched.
    #[test]
    fn keeping_blocks_renumbers_exactly(flags in prop::collection::vec(any::<bool>(), 1..40), inner in 1usize..4) {
        let depth = flags.len();
        let kept: Vec<usize> = (0..depth).filter(|&i| flags[i]).collect();
        prop_assume!(!kept.is_empty());
        let outside = ["head.w", "x_embedder.proj.1.bias", "blocks.final"];
        let names = (0..depth)
            .flat_map(|i| (0..inner).map(move |k| format!("blocks.{i}.p.{k}.w")))
            .chain(outside.map(String::from));
        let tensors = filled(names, 1);
        let cut = keep_blocks(&tensors, "blocks", &kept).unwrap();
        prop_assert_eq!(cut.len(), kept.len() * inner + outside.len());
        for (new, old) in kept.iter().enumerate() {
            for k in 0..inner {
                let (a, b) = (format!("blocks.{new}.p.{k}.w"), format!("blocks.{old}.p.{k}.w"));
                prop_assert_eq!(cut.require(&a).unwrap().id(), tensors.require(&b).unwrap().id());
            }
        }
        for name in outside {
            prop_assert_eq!(cut.require(name).unwrap().id(), tensors.require(name).unwrap().id());
        }
    }
}
