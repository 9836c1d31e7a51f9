//! Images into latents, training on them, and back into images.
#![allow(clippy::unwrap_used)] // a test may panic

use std::fs;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use tinyfusion::checkpoint::{DTypePolicy, Metadata, load, save, save_torch};
use tinyfusion::core::{StepRng, stream};
use tinyfusion::data::{LatentContent, ShardedLatents, Source};
use tinyfusion::models::VaeConfig;
use tinyfusion::models::vae::DownBlock;
use tinyfusion_tests::{Place, partials};

/// A place with a small autoencoder of factor 2 in `vae`, a DiT of its latents in `case/model`, and 14 images in two
/// classes in `images`.
fn place() -> Place {
    let place = Place::with_teacher();
    let config = VaeConfig {
        down_block_types: vec![DownBlock::Plain; 2],
        up_block_types: vec![tinyfusion::models::vae::UpBlock::Plain; 2],
        block_out_channels: vec![8, 8],
        norm_num_groups: 4,
        sample_size: 8, // of its tiles
        ..VaeConfig::default()
    };
    fs::create_dir(place.path("vae")).unwrap();
    fs::write(
        place.path("vae/config.json"),
        config.to_diffusers().unwrap(),
    )
    .unwrap();
    let weights = config.init(3, &Device::Cpu).unwrap();
    let file = place.path("vae/diffusion_pytorch_model.safetensors");
    save(file, &weights, &Metadata::new(), DTypePolicy::F32).unwrap();
    place
        .ok("bench prepare case --kind forward --model DiT-S/8 --depth 1 --input-size 8 --batch 1");
    place.ok("sample teacher/model drawn --count 14 --steps 2 --pngs");
    for (i, class) in [(0..6, "ants"), (6..14, "bees")]
        .into_iter()
        .flat_map(|(r, c)| r.map(move |i| (i, c)))
    {
        let folder = place.path("images").join(class);
        fs::create_dir_all(&folder).unwrap();
        let from = place.path(&format!("drawn/images/{i:08}.png"));
        fs::copy(from, folder.join(format!("{i}.png"))).unwrap();
    }
    place
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn images_become_latents_that_models_train_on_and_latents_become_images() {
    let place = place();
    let said =
        place.ok("encode images latents --vae vae --size 16 --batch-size 4 --shard-images 5");
    assert!(
        said.contains("14 images of 2 classes as latents [4, 8, 8]"),
        "{said}"
    );
    assert_eq!(place.json("latents/labels.json")["1"], "bees");
    let latents = ShardedLatents::open(place.path("latents")).unwrap();
    assert_eq!(latents.index().content, LatentContent::Moments);
    assert_eq!(latents.index().shards.len(), 3);
    let batch = latents.batch(&[0, 13]).unwrap();
    assert_eq!(batch.y.to_vec1::<u32>().unwrap(), [0, 1]);
    let mut rng = StepRng::new(0, 0, stream::AUGMENT);
    let drawn = latents.augmented(&[0, 13], &mut rng).unwrap();
    assert_ne!(values(&batch.x), values(&drawn.x));

    // What the batch size was does not show.
    place.ok("encode images again --vae vae --size 16 --batch-size 3 --shard-images 5");
    for shard in [
        "latents.json",
        "shard-00000.safetensors",
        "shard-00002.safetensors",
    ] {
        assert!(
            place.bytes(&format!("latents/{shard}")) == place.bytes(&format!("again/{shard}")),
            "{shard}"
        );
    }
    // In tiles every part is normalised by itself: other latents, on purpose and only then.
    place.ok("encode images tiled --vae vae --size 16 --vae-tiles");
    let tiled = ShardedLatents::open(place.path("tiled")).unwrap();
    let whole = ShardedLatents::open(place.path("latents")).unwrap();
    let first = |source: &ShardedLatents| values(&source.batch(&[0]).unwrap().x);
    assert_ne!(first(&tiled), first(&whole));
    assert_eq!(tiled.shape(), whole.shape());

    // One stored sample for each image, mirrored or not, as the public code has it.
    place.ok("encode images samples --vae vae --size 16 --content samples --flips applied --dtype f32 --seed 4");
    let samples = ShardedLatents::open(place.path("samples")).unwrap();
    assert!(!samples.index().flips && samples.index().content == LatentContent::Samples);

    place.ok("distill case/model run --data latents --steps 2 --batch-size 4");
    place.ok("loss run/model --data samples --images 8");
    let said =
        place.ok("sample run/model out --vae vae --vae-tiles --count 3 --steps 2 --cfg 1 --pngs");
    assert!(said.contains("3 images"), "{said}");
    assert!(
        place.path("out/grid.png").is_file() && place.path("out/images/00000002.png").is_file()
    );
    let arrays = Tensor::read_npz(place.path("out/samples.npz")).unwrap();
    assert_eq!(
        arrays.iter().find(|(n, _)| n == "arr_0").unwrap().1.dims(),
        [3, 16, 16, 3]
    );
    assert!(partials(place.path("").as_path()).is_empty());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_encoded() {
    let place = place();
    for (code, line, says) in [
        (1, "encode images o --vae nowhere", "nowhere"),
        (2, "encode images o --vae vae --size 17", "multiples of 2"),
        (1, "encode nowhere o --vae vae --size 16", "nowhere"),
        (1, "encode vae o --vae vae --size 16", "found no class"),
        (
            2,
            "encode images o --vae vae --size 16 --seed 1",
            "--seed does nothing",
        ),
        (
            1,
            "encode images o --vae case/model --size 16",
            "_class_name",
        ),
        (
            1,
            "encode images o --vae case/model/model.safetensors --size 16",
            "neither Stable Diffusion's nor MAR's",
        ),
        (
            2,
            "sample teacher/model o --vae vae --count 1 --steps 1",
            "leave out --vae",
        ),
        (
            2,
            "sample case/model o --pngs --count 1 --steps 1 --cfg 1",
            "--pngs needs --vae",
        ),
        (
            2,
            "sample teacher/model o --classes 10 --count 1 --steps 1",
            "classes 0 to 9",
        ),
        (
            2,
            "sample teacher/model o --classes unicorn --count 1 --steps 1",
            "no such name",
        ),
        (2, "sample teacher/model o --share 3/3", "0/8"),
        (
            2,
            "distill case/model o --data images --steps 1",
            "[3, 8, 8]",
        ),
    ] {
        let error = place.fails(code, line);
        assert!(error.contains(says), "{line}: {error}");
        assert!(!place.path("o").exists(), "{line} left a folder");
    }
    place.ok("encode images latents --vae vae --size 16");
    let error = place.fails(2, "encode images latents --vae vae --size 8");
    assert!(
        error.contains("other settings") && error.contains("[4, 4, 4]"),
        "{error}"
    );
    fs::write(place.path("images/ants/0.png"), b"no picture").unwrap();
    let error = place.fails(1, "encode images o --vae vae --size 16");
    assert!(error.contains("ants/0.png"), "{error}");
}

#[test]
fn latents_go_on_only_with_the_images_that_they_were_begun_with() {
    let place = place();
    let line = "encode images latents --vae vae --size 16 --shard-images 5";
    place.ok(line);
    let first = place.bytes("latents/latents.json");
    // Another name of the folder, and better names of the classes, do not matter.
    fs::rename(place.path("images"), place.path("moved")).unwrap();
    fs::write(
        place.path("latents/labels.json"),
        r#"{"0": "ant, formica"}"#,
    )
    .unwrap();
    let moved = place.path("moved");
    place.ok(&line.replace(" images ", &format!(" {} ", moved.display())));
    assert!(place.bytes("latents/latents.json") == first);
    assert_eq!(place.json("latents/labels.json")["0"], "ant, formica");
    fs::remove_file(place.path("latents/labels.json")).unwrap();
    // Another order of the classes does.
    fs::rename(moved.join("ants"), moved.join("wasps")).unwrap();
    let error = place.fails(2, &line.replace(" images ", " moved "));
    assert!(
        error.contains("latents.json") && error.contains("renamed"),
        "{error}"
    );
    assert!(place.bytes("latents/latents.json") == first);
    assert!(!place.path("latents/labels.json").exists());
}

/// As diffusers' repositories have it: shards with an index, half precision alone, a pickle.
#[test]
fn an_autoencoder_of_any_form_is_read_and_exported_as_one_plain_file() {
    let place = place();
    const WEIGHTS: &str = "diffusion_pytorch_model";
    let tensors = load(
        place.path(&format!("vae/{WEIGHTS}.safetensors")),
        &Device::Cpu,
    );
    let tensors = tensors.unwrap().tensors;
    let folder = |name: &str| {
        fs::create_dir(place.path(name)).unwrap();
        fs::copy(
            place.path("vae/config.json"),
            place.path(&format!("{name}/config.json")),
        )
        .unwrap();
        place.path(name)
    };
    let mut index = serde_json::Map::new();
    let sharded = folder("sharded");
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let file = format!("{WEIGHTS}-{i:05}-of-{:05}.safetensors", tensors.len());
        let one = [(name.to_string(), tensor.clone())].into_iter().collect();
        save(
            sharded.join(&file),
            &one,
            &Metadata::new(),
            DTypePolicy::Keep,
        )
        .unwrap();
        index.insert(name.into(), file.into());
    }
    let text = serde_json::json!({ "weight_map": index }).to_string();
    fs::write(
        sharded.join(format!("{WEIGHTS}.safetensors.index.json")),
        text,
    )
    .unwrap();
    let half = folder("half").join(format!("{WEIGHTS}.fp16.safetensors"));
    save(half, &tensors, &Metadata::new(), DTypePolicy::F16).unwrap();
    let pickle = folder("pickle").join(format!("{WEIGHTS}.bin"));
    save_torch(pickle, &tensors, &[], DTypePolicy::Keep).unwrap();

    place.ok("encode images whole --vae vae --size 16 --dtype f32");
    let shard = "shard-00000.safetensors";
    for (form, types) in [("sharded", "F32"), ("half", "F16"), ("pickle", "Float")] {
        let said = place.ok(&format!("inspect {form}"));
        assert!(said.contains("AutoencoderKL"), "{said}");
        assert!(said.contains(&format!("types       {types}\n")), "{said}");
        place.ok(&format!(
            "encode images by-{form} --vae {form} --size 16 --dtype f32"
        ));
        let same =
            place.bytes(&format!("by-{form}/{shard}")) == place.bytes(&format!("whole/{shard}"));
        assert_eq!(same, form != "half", "{form}");
        place.ok(&format!(
            "export teacher/model out-{form} --format diffusers --vae {form}"
        ));
        let exported = place.path(&format!("out-{form}/vae"));
        assert_eq!(fs::read_dir(&exported).unwrap().count(), 2, "{form}");
        let plain = load(
            exported.join(format!("{WEIGHTS}.safetensors")),
            &Device::Cpu,
        )
        .unwrap();
        for (name, tensor) in plain.tensors.iter() {
            assert_eq!(tensor.dtype(), DType::F32, "{form} {name}");
            if form != "half" {
                assert_eq!(
                    values(tensor),
                    values(tensors.require(name).unwrap()),
                    "{name}"
                );
            }
        }
        assert_eq!(plain.tensors.len(), tensors.len());
    }
    // Weights that are not those of the config.
    let mut other = place.json("vae/config.json");
    other["block_out_channels"] = serde_json::json!([8, 16]);
    fs::write(place.path("half/config.json"), other.to_string()).unwrap();
    place.fails(
        1,
        "export teacher/model wrong --format diffusers --vae half",
    );
    assert!(!place.path("wrong").exists());
}

#[test]
fn a_damaged_shard_is_encoded_again() {
    let place = place();
    let line = "encode images latents --vae vae --size 16 --shard-images 5";
    place.ok(line);
    let shard = place.path("latents/shard-00001.safetensors");
    let whole = fs::read(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() / 2]).unwrap();
    let said = place.run(line).stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(
        said.contains("shard-00001") && said.contains("again"),
        "{said}"
    );
    assert!(fs::read(&shard).unwrap() == whole);
}

#[test]
fn shares_batches_and_interruptions_draw_the_same_images() {
    let place = Place::with_teacher();
    let flags = "--steps 40 --sampler ddim --seed 5";
    place.ok(&format!(
        "sample teacher/model whole --count 30 {flags} --pngs"
    ));
    let image = |folder: &str, i: usize| place.bytes(&format!("{folder}/images/{i:08}.png"));
    for share in 0..3 {
        place.ok(&format!("sample teacher/model s{share} --count 30 {flags} --batch-size 4 --share {share}/3 --pngs"));
        for i in 10 * share..10 * (share + 1) {
            assert!(
                image("whole", i) == image(&format!("s{share}"), i),
                "image {i}"
            );
        }
    }
    // Killed until it is through: what was drawn stays, and the end is the same.
    let line = format!("sample teacher/model broken --count 30 {flags} --batch-size 1 --pngs");
    for parts in [1, 4, 9] {
        let mut child = place.start(&line);
        let start = Instant::now();
        let there = || fs::read_dir(place.path("broken/parts")).map_or(0, Iterator::count);
        while there() <= parts && !place.path("broken/sample.json").exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "no part {parts}");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let error = place.fails(2, &line.replace("--seed 5", "--seed 6"));
    assert!(error.contains("seed 5, asked for: 6"), "{error}");
    place.ok(&line.replace("--batch-size 1", "--batch-size 7"));
    assert!(place.bytes("whole/samples.npz") == place.bytes("broken/samples.npz"));
    assert!(!place.path("broken/parts").exists());
    // All is there: nothing is drawn again.
    let before = fs::metadata(place.path("broken/samples.npz"))
        .unwrap()
        .modified()
        .unwrap();
    let said = place.ok(&line);
    assert!(said.contains("all is there already"), "{said}");
    let after = fs::metadata(place.path("broken/samples.npz"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after);
}

#[test]
fn classes_are_drawn_by_number_or_name() {
    let place = Place::with_teacher();
    fs::write(
        place.path("teacher/model/labels.json"),
        r#"{"3": "star", "5": "ring, annulus"}"#,
    )
    .unwrap();
    place.ok("sample teacher/model out --num 5 --steps 2 --classes Star,annulus,9");
    let arrays = Tensor::read_npz(place.path("out/samples.npz")).unwrap();
    let labels = &arrays.iter().find(|(n, _)| n == "arr_1").unwrap().1;
    assert_eq!(labels.to_vec1::<i64>().unwrap(), [3, 5, 9, 3, 5]);
}

/// They are part of the model, whatever is made of it.
#[test]
fn class_names_travel_with_a_model() {
    let place = Place::with_teacher();
    place.ok("cut teacher/model cut --keep 0");
    place.ok("export cut original --format original");
    place.ok("export cut out --format safetensors");
    assert_eq!(place.json("cut/config.json")["classes"]["3"], "star");
    for model in ["teacher/model", "cut", "out/model.safetensors"] {
        place.ok(&format!(
            "sample {model} {model}-drawn --count 2 --steps 2 --classes ring"
        ));
        let settings = place.json(&format!("{model}-drawn/sample.json"));
        assert_eq!(settings["classes"], serde_json::json!([5]));
    }
    place.ok("export cut pipeline --format diffusers");
    assert_eq!(
        place.json("pipeline/model_index.json")["id2label"]["5"],
        "ring"
    );
    // The original format has no place for them.
    let error = place.fails(
        2,
        "sample original/model.pt#family=dit,heads=2 drawn --count 2 --steps 2 --classes ring",
    );
    assert!(error.contains("no names of classes"), "{error}");
    place.ok("distill cut tuned --steps 1 --batch-size 4");
    assert_eq!(
        place.json("tuned/model/config.json")["classes"]["5"],
        "ring"
    );
}
