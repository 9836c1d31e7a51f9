//! What is compared: tasks, who takes part, and what is hoped for.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::reproduce::{say, strings};

/// Images of a training batch.
pub(crate) const BATCH: usize = 256;
/// Batches of a repetition: what a loader prepared during the pauses is a small part of so many.
const BATCHES: usize = 64;
/// Images of the public code's folder: two files each.
const NPY_IMAGES: usize = 8192;
/// Values of a latent of an image of 256 pixels.
const LATENT: f64 = 4.0 * 32.0 * 32.0;
/// Bytes that a drawn latent cannot do without: mean and log-variance in f16 are read, the latent in f32 is written.
const BYTES_OF_LATENT: f64 = LATENT * (2.0 * 2.0 + 4.0);

/// What can be made smaller.
#[derive(Debug, Clone)]
pub(crate) struct Sizes {
    /// The network of the checkpoint.
    pub(crate) model: String,
    /// Sides of the autoencoder's images.
    pub(crate) sides: Vec<usize>,
    /// Images of the latents' set.
    pub(crate) images: usize,
    /// The training step that the loader has to keep ahead of.
    pub(crate) train_model: String,
    pub(crate) train_batch: usize,
}

impl Sizes {
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(side) = self.sides.iter().find(|s| **s == 0 || **s % 8 != 0) {
            bail!("--sizes {side}: the autoencoder takes multiples of 8 pixels");
        }
        if self.images < BATCH || self.train_batch == 0 {
            bail!(
                "--images {}, --train-batch {}: at least {BATCH} and 1 are needed",
                self.images,
                self.train_batch
            );
        }
        parameters(&self.model).map(|_| ())
    }

    fn npy_images(&self) -> usize {
        self.images.min(NPY_IMAGES)
    }
}

/// Values of an official network with patches of 2: 18·D² in a block (qkv 3, projection 1, MLP 8, adaLN 6), biases and ends left out.
fn parameters(model: &str) -> Result<f64> {
    let (depth, width) = match model {
        "DiT-S/2" => (12.0, 384.0),
        "DiT-B/2" => (12.0, 768.0),
        "DiT-L/2" => (24.0, 1024.0),
        "DiT-XL/2" => (28.0, 1152.0),
        other => bail!("--model {other}: DiT-S/2, DiT-B/2, DiT-L/2 or DiT-XL/2 is expected"),
    };
    Ok(depth * 18.0 * width * width)
}

/// Tasks that share files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Checkpoint,
    Autoencoder,
    Latents,
}

impl Group {
    pub(crate) const ALL: [Self; 3] = [Self::Checkpoint, Self::Autoencoder, Self::Latents];

    /// Name of its folder.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Autoencoder => "autoencoder",
            Self::Latents => "latents",
        }
    }

    /// Bytes that its files take at the most.
    pub(crate) fn bytes(self, sizes: &Sizes) -> Result<u64> {
        const BLOCK: usize = 4096;
        Ok(match self {
            // Two files; ends and biases are below a tenth of all but the smallest.
            Self::Checkpoint => (2.0 * 4.0 * 1.25 * parameters(&sizes.model)?) as u64,
            Self::Autoencoder => 512 << 20,
            Self::Latents => {
                let moments = sizes.images * 4 * LATENT as usize * 2;
                // A latent and its header, a label, and what the file system keeps of both.
                let files = sizes.npy_images() * (LATENT as usize * 4 + 5 * BLOCK);
                // The training step's network.
                (moments + files + (1 << 30)) as u64
            }
        })
    }

    /// The words of the commands that make its files.
    pub(crate) fn prepare(self, folder: &Path, sizes: &Sizes) -> Vec<(Who, Vec<String>)> {
        let python = |path: &Path, task: &str, flag: &str, values: &[String]| {
            let mut words = vec![say(path), task.into(), flag.into()];
            words.extend_from_slice(values);
            (Who::Python, words)
        };
        let sides: Vec<String> = sizes.sides.iter().map(usize::to_string).collect();
        match self {
            Self::Checkpoint => {
                vec![python(
                    folder,
                    "write-checkpoint",
                    "--model",
                    std::slice::from_ref(&sizes.model),
                )]
            }
            Self::Autoencoder => vec![python(folder, "write-vae", "--sizes", &sides)],
            Self::Latents => {
                let images = sizes.images.to_string();
                let ours = [
                    "bench",
                    "files",
                    &say(&folder.join("shards")),
                    "write-latents",
                    "--images",
                    &images,
                ];
                let npy = sizes.npy_images().to_string();
                vec![
                    (Who::Ours, strings(&ours)),
                    // Last: it waits until all is on the disk.
                    python(&folder.join("npy"), "write-npy", "--images", &[npy]),
                ]
            }
        }
    }
}

/// Whose program it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Who {
    Ours,
    Python,
}

/// What a repetition handles.
#[derive(Debug, Clone)]
pub(crate) enum Amount {
    /// As many bytes as this file has.
    File(PathBuf),
    Images(usize),
}

/// What is hoped for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// Its time over ours, for the same amount: at least.
    Time(f64),
    /// Our peak memory over its: at most.
    Memory(f64),
    /// Its own peak memory over the file's size: at most.
    MemoryOfFile(f64),
    /// Files of the set that it holds over their number: at most.
    FilesHeld(f64),
}

/// A program that takes part.
#[derive(Debug, Clone)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) who: Who,
    /// Behind the binary, or behind the script.
    pub(crate) words: Vec<String>,
    pub(crate) amount: Amount,
    /// Whether what it computes has to be what ours does.
    pub(crate) compared: bool,
    /// Whether the floor is that of its work.
    pub(crate) same_work: bool,
    pub(crate) goals: Vec<Goal>,
}

/// Least work, at the machine's limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Floor {
    /// So many bytes for each of a file, or of each image, at the memory's bandwidth.
    Bytes(f64),
    /// The operations that the worker tells, at the rate of a large product.
    Flops,
}

/// One comparison.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) name: String,
    pub(crate) group: Group,
    /// Every repetition is the first of a new process, as it is in use.
    pub(crate) fresh: bool,
    pub(crate) floor: Floor,
    /// Expected seconds of a round on two cores, for the bar.
    pub(crate) seconds: f64,
    /// Largest difference of the outputs, relative to the largest value.
    pub(crate) tolerance: f64,
    /// The first is ours, the measure of the others.
    pub(crate) contenders: Vec<Contender>,
}

/// All tasks, on files in `files`; `train` is the folder of the training step's case.
pub(crate) fn tasks(sizes: &Sizes, files: &Path, train: &Path, threads: usize) -> Vec<Task> {
    let mut all = vec![
        load_pt(sizes, files, threads),
        load_safetensors(sizes, files, threads),
    ];
    for side in &sizes.sides {
        for direction in ["encode", "decode"] {
            all.push(autoencoder(direction, *side, files, threads));
        }
    }
    all.push(loader(sizes, files, train, threads));
    all
}

/// Words of a task of ours or of the script.
fn words(who: Who, folder: &Path, task: &str, more: &[&str], threads: usize) -> Vec<String> {
    let mut words = match who {
        Who::Ours => strings(&["bench", "files"]),
        Who::Python => Vec::new(),
    };
    words.extend([
        say(folder),
        task.into(),
        "--threads".into(),
        threads.to_string(),
    ]);
    words.extend(strings(more));
    words
}

fn load(
    sizes: &Sizes,
    files: &Path,
    file: &str,
    contenders: &[(Who, &str, &str, &[Goal])],
    threads: usize,
) -> Task {
    let folder = files.join(Group::Checkpoint.folder());
    let contender = |&(who, name, task, goals): &(Who, &str, &str, &[Goal])| Contender {
        name: name.into(),
        who,
        words: words(who, &folder, task, &[], threads),
        amount: Amount::File(folder.join(file)),
        compared: who == Who::Python,
        same_work: true,
        goals: goals.to_vec(),
    };
    Task {
        name: format!("load {}, {file}", sizes.model),
        group: Group::Checkpoint,
        fresh: true,
        floor: Floor::Bytes(1.0),
        seconds: 7.0 * contenders.len() as f64,
        // Sums in f64 of values that are read, not computed.
        tolerance: 1e-9,
        contenders: contenders.iter().map(contender).collect(),
    }
}

fn load_pt(sizes: &Sizes, files: &Path, threads: usize) -> Task {
    let contenders: &[(Who, &str, &str, &[Goal])] = &[
        (
            Who::Ours,
            "tinyfusion",
            "load-pt",
            &[Goal::MemoryOfFile(1.2)],
        ),
        (
            Who::Python,
            "torch.load, mmap",
            "load-mmap",
            &[Goal::Time(1.0)],
        ),
        (Who::Python, "torch.load", "load-copy", &[]),
        (
            Who::Python,
            "torch.load, mmap, hashed and checked",
            "load-checked",
            &[],
        ),
    ];
    load(sizes, files, "model.pt", contenders, threads)
}

fn load_safetensors(sizes: &Sizes, files: &Path, threads: usize) -> Task {
    let contenders: &[(Who, &str, &str, &[Goal])] = &[
        (
            Who::Ours,
            "tinyfusion",
            "load-safetensors",
            &[Goal::MemoryOfFile(1.2)],
        ),
        (
            Who::Python,
            "safetensors.torch.load_file",
            "load-safetensors",
            &[Goal::Time(1.0)],
        ),
    ];
    load(sizes, files, "model.safetensors", contenders, threads)
}

fn autoencoder(direction: &str, side: usize, files: &Path, threads: usize) -> Task {
    let folder = files.join(Group::Autoencoder.folder());
    let side_word = side.to_string();
    let contender = |who, name: &str, more: &[&str], goals: &[Goal]| Contender {
        name: name.into(),
        who,
        words: words(
            who,
            &folder,
            direction,
            &[&["--size", &side_word], more].concat(),
            threads,
        ),
        amount: Amount::Images(1),
        compared: who == Who::Python,
        same_work: true,
        goals: goals.to_vec(),
    };
    Task {
        name: format!("VAE {direction}, {side} pixels"),
        group: Group::Autoencoder,
        fresh: false,
        floor: Floor::Flops,
        seconds: 12.0 * (side as f64 / 256.0).powi(2),
        tolerance: 1e-4,
        contenders: vec![
            contender(Who::Ours, "tinyfusion", &[], &[]),
            contender(
                Who::Python,
                "diffusers",
                &[],
                &[Goal::Time(1.0), Goal::Memory(1.0)],
            ),
            contender(
                Who::Python,
                "diffusers, channels last",
                &["--channels-last"],
                &[],
            ),
        ],
    }
}

fn loader(sizes: &Sizes, files: &Path, train: &Path, threads: usize) -> Task {
    let folder = files.join(Group::Latents.folder());
    let (batch, batches) = (BATCH.to_string(), BATCHES.to_string());
    let batch = ["--batch", &batch, "--batches", &batches];
    let contender = |who, name: String, words, images, goals: &[Goal]| Contender {
        name,
        who,
        words,
        amount: Amount::Images(images),
        compared: false,
        same_work: true,
        goals: goals.to_vec(),
    };
    let (shards, npy, images) = (folder.join("shards"), folder.join("npy"), BATCH * BATCHES);
    let reading = |who, folder: &Path, task| words(who, folder, task, &batch, threads);
    let mut task = Task {
        name: format!("latents, batch {BATCH}"),
        group: Group::Latents,
        fresh: false,
        floor: Floor::Bytes(BYTES_OF_LATENT),
        seconds: 15.0,
        tolerance: 0.0,
        contenders: vec![
            contender(
                Who::Ours,
                "tinyfusion, moments in shards".into(),
                reading(Who::Ours, &shards, "latents"),
                images,
                &[Goal::FilesHeld(1.0)],
            ),
            contender(
                Who::Ours,
                format!(
                    "training step of {}, batch {}",
                    sizes.train_model, sizes.train_batch
                ),
                strings(&["bench", "worker", &say(train)]),
                sizes.train_batch,
                &[Goal::Time(10.0)],
            ),
            contender(
                Who::Ours,
                "tinyfusion, two .npy an image".into(),
                reading(Who::Ours, &npy, "npy"),
                images,
                &[],
            ),
            contender(
                Who::Python,
                format!("fast-DiT, two .npy an image, {threads} processes"),
                reading(Who::Python, &npy, "npy"),
                images,
                &[],
            ),
        ],
    };
    task.contenders[1].same_work = false;
    task
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sizes() -> Sizes {
        Sizes {
            model: "DiT-XL/2".into(),
            sides: vec![256, 512],
            images: 32_768,
            train_model: "DiT-S/2".into(),
            train_batch: 16,
        }
    }

    fn all() -> Vec<Task> {
        tasks(
            &sizes(),
            Path::new("runs/x/files"),
            Path::new("runs/x/cases/train"),
            2,
        )
    }

    #[test]
    fn every_task_begins_with_ours_and_has_a_goal() {
        let all = all();
        assert_eq!(all.len(), 7);
        for task in &all {
            let first = &task.contenders[0];
            assert!(first.who == Who::Ours && !first.compared, "{}", task.name);
            assert!(
                task.contenders.iter().any(|c| !c.goals.is_empty()),
                "{}",
                task.name
            );
            for c in &task.contenders {
                let is_worker = c.words.starts_with(&strings(&["bench"]));
                assert_eq!(is_worker, c.who == Who::Ours, "{:?}", c.words);
            }
        }
        assert_eq!(
            all[4].contenders[2].words.join(" "),
            "runs/x/files/autoencoder encode --threads 2 --size 512 --channels-last"
        );
    }

    #[test]
    fn the_files_of_a_group_are_estimated() {
        let gib = |group: Group| group.bytes(&sizes()).unwrap() as f64 / f64::from(1 << 30);
        // The official file has 2.7 GB; there are two.
        assert!((5.4 / 1.074..7.0).contains(&gib(Group::Checkpoint)));
        assert!((2.0..2.5).contains(&gib(Group::Latents)));
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let refused = |change: &dyn Fn(&mut Sizes)| {
            let mut sizes = sizes();
            change(&mut sizes);
            sizes.check().unwrap_err().to_string()
        };
        sizes().check().unwrap();
        assert!(refused(&|s| s.model = "DiT-7".into()).contains("DiT-XL/2 is expected"));
        assert!(refused(&|s| s.sides = vec![100]).contains("multiples of 8"));
        assert!(refused(&|s| s.images = 10).contains("at least 256"));
    }
}
