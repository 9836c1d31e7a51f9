//! Steps measured on this machine: the preset's own commands on a network of its width with few blocks and random weights.
//!
//! Time and memory of a step are taken to be linear in the blocks and in the batch, so that four corners give them for
//! any depth and any batch.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::rates::{Draws, Each, FEW, Forward, Plane, Rates, Steps};
use crate::files;
use crate::reproduce::preset::{Counted, Preset};
use crate::reproduce::spec::flags;
use crate::reproduce::stage::{Driver, peak_rss};

/// Blocks of the two networks, in each of their stages: a group to learn from, and twice that.
const BLOCKS: [u64; 2] = [2, 4];
/// Samples of a step, for each core: fewer would leave some of them idle.
const BATCHES: [u64; 2] = [1, 2];
/// Images of a draw that tells what more of them take.
const MORE: u64 = 4;
/// Images of the two folders that `bench stand-in --inception` writes.
const FEW_JUDGED: u64 = 16;
const MANY_JUDGED: u64 = 48;
/// Counted steps of a draw.
const DRAWN: [u64; 2] = [2, 4];

#[derive(Deserialize)]
struct Resources {
    seconds: f64,
    #[serde(default)]
    peak_rss_bytes: Option<f64>,
}

/// What a command left.
struct Ran {
    printed: Vec<u8>,
    seconds: f64,
    /// Its peak memory, as often as that was looked at.
    bytes: f64,
}

/// What a draw took for each image, and its peak memory.
struct Drawn {
    seconds: f64,
    bytes: f64,
    disk: f64,
}

/// Runs commands in a folder of its own.
struct Lab<'a> {
    driver: &'a Driver,
    preset: &'a Preset,
    folder: &'a Path,
    /// Blocks of the two networks.
    depths: [u64; 2],
}

impl Rates {
    /// Runs some twenty small commands in `folder`.
    pub(super) fn measure(
        driver: &Driver,
        preset: &Preset,
        model: &str,
        folder: &Path,
    ) -> Result<Self> {
        let mut lab = Lab {
            driver,
            preset,
            folder,
            depths: BLOCKS,
        };
        let (depth, stages) = lab.depth_of(model)?;
        lab.depths = BLOCKS.map(|blocks| stages * blocks);
        for blocks in lab.depths {
            lab.stand_in(model, blocks)?;
        }
        Ok(Self {
            depth,
            learn: lab.corners("learn")?,
            fine_tune: lab.corners("distill")?,
            forward: lab.forward()?,
            sample: lab.draws()?,
            encode: lab.encode()?,
            evaluate: lab.evaluate()?,
            model: lab.models()?,
        })
    }
}

impl Lab<'_> {
    /// Runs the binary with these words.
    fn run(&self, words: &[String]) -> Result<Ran> {
        println!("$ {} {}", self.driver.binary.display(), words.join(" "));
        let started = Instant::now();
        let mut child = Command::new(self.driver.absolute_binary())
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("the binary cannot be started")?;
        // What is printed is short, so that no pipe is full before the end.
        let mut bytes = 0.0f64;
        while child.try_wait()?.is_none() {
            bytes = bytes.max(peak_rss(child.id()).unwrap_or(0) as f64);
            std::thread::sleep(Duration::from_millis(5));
        }
        let seconds = started.elapsed().as_secs_f64();
        let out = child.wait_with_output()?;
        if !out.status.success() {
            bail!(
                "`{}` failed: {}",
                words.join(" "),
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok(Ran {
            printed: out.stdout,
            seconds,
            bytes,
        })
    }

    fn words(&self, text: &str) -> Vec<String> {
        let folder = self.folder.display().to_string();
        text.split(' ')
            .map(|word| word.replace('@', &folder))
            .collect()
    }

    /// Blocks of a preset of the binary, and in how many stages they are.
    fn depth_of(&self, model: &str) -> Result<(f64, u64)> {
        let printed = self.run(&self.words("models --json"))?.printed;
        let all: Vec<Value> = serde_json::from_slice(&printed)?;
        let found = all
            .iter()
            .find(|m| m.get("name").and_then(Value::as_str) == Some(model));
        let config = found.and_then(|m| m.get("config"));
        let config = config.with_context(|| format!("`tinyfusion models` lists no {model}"))?;
        let number = |key: &str| config.get(key).and_then(Value::as_f64);
        let stages = number("encoder_depth").zip(number("decoder_depth"));
        let found = number("depth").map(|depth| (depth, 1));
        let found = found.or(stages.map(|(encoder, decoder)| (encoder + decoder, 2)));
        found.with_context(|| format!("{model} has no depth"))
    }

    fn stand_in(&self, model: &str, blocks: u64) -> Result<()> {
        let mut words = self.words(&format!(
            "bench stand-in @/{blocks} --model {model} --depth {blocks}"
        ));
        let size = self.preset.latents.as_ref().map(|l| {
            let size = l.flags.get("size").and_then(toml::Value::as_integer);
            size.unwrap_or(256)
        });
        if blocks == self.depths[0] {
            if let Some(size) = size {
                words.extend(["--vae".to_string(), size.to_string()]);
            }
            if self.preset.evaluate.weights.is_some() {
                words.push("--inception".into());
            }
        }
        self.run(&words)?;
        Ok(())
    }

    /// Steps of `learn`, or of `distill` without a teacher, with the preset's flags.
    fn corners(&self, verb: &str) -> Result<Steps> {
        let (own, pattern) = match verb {
            "learn" => (&self.preset.learn, " --pattern 1:2"),
            _ => (&self.preset.recover, ""),
        };
        // What the sizes and the length of a run are, and what it writes, is this measurement's to say.
        const OURS: &[&str] = &[
            "steps",
            "batch-size",
            "samples",
            "log-every",
            "checkpoint-every",
            "warmup",
        ];
        let mut table = own.clone();
        table.retain(|key, _| !OURS.contains(&key));
        let own = flags(verb, &table)?;
        let (mut seconds, mut bytes, mut disk) = (Vec::new(), Vec::new(), Vec::new());
        let batches = BATCHES.map(|each| each * self.driver.machine.cores as u64);
        for batch in batches {
            for blocks in self.depths {
                let out = format!("@/{verb}-{blocks}-{batch}");
                let mut words = self.words(&format!(
                    "{verb} @/{blocks}/model {out} --data @/{blocks}/latents.safetensors --steps 3 --log-every 1 \
                     --batch-size {batch}{pattern}"
                ));
                words.extend(own.clone());
                self.run(&words)?;
                let out = self.folder.join(format!("{verb}-{blocks}-{batch}"));
                seconds.push(step_seconds(&out.join("metrics.jsonl"))?);
                let resources: Resources = files::read_json(&out.join("resources.json"))?;
                bytes.push(resources.peak_rss_bytes.unwrap_or(0.0));
                disk.push(files::size(&out)? as f64);
                files::remove(&out)?;
            }
        }
        Ok(Steps {
            disk: plane(self.depths, batches, &disk)?,
            seconds: plane(self.depths, batches, &seconds)?,
            bytes: plane(self.depths, batches, &bytes)?,
        })
    }

    /// Seconds of a sample in `loss`: what more samples cost more.
    fn forward(&self) -> Result<Forward> {
        const IMAGES: [u64; 2] = [2, 16];
        let (mut seconds, mut bytes) = (Vec::new(), Vec::new());
        for images in IMAGES {
            for blocks in self.depths {
                let ran = self.run(&self.words(&format!(
                    "loss @/{blocks}/model --data @/{blocks}/latents.safetensors --images {images} --seed 0"
                )))?;
                seconds.push(ran.seconds);
                bytes.push(ran.bytes);
            }
        }
        let each =
            |i: usize| (seconds[i + 2] - seconds[i]).max(0.0) / (IMAGES[1] - IMAGES[0]) as f64;
        let seconds = [each(0), each(1), each(0), each(1)];
        Ok(Forward {
            seconds: Plane::through(self.depths, [0, 1], seconds),
            bytes: plane(self.depths, IMAGES, &bytes)?,
        })
    }

    fn draws(&self) -> Result<Draws> {
        let sample = &self.preset.sample;
        let counted = sample.counted.flag();
        let mut table = sample.flags.clone();
        const OURS: &[&str] = &["count", "seed", "vae", "steps", "grid-columns", "classes"];
        table.retain(|key, _| !OURS.contains(&key));
        let own = flags("sample", &table)?;
        // Of a MAR, whose iterations are counted, the steps of each token are apart.
        let apart = sample.counted == Counted::Iterations;
        const TOKEN_STEPS: [u64; 2] = [4, 12];
        let draw =
            |blocks: u64, images: u64, counts: u64, tokens: u64, vae: bool| -> Result<Drawn> {
                let name = format!("draw-{blocks}-{images}-{counts}-{tokens}-{vae}");
                let mut text =
                    format!("sample @/{blocks}/model @/{name} --count {images} {counted} {counts}");
                if apart {
                    text += &format!(" --steps {tokens}");
                }
                if vae {
                    text += &format!(" --vae @/{}/vae", self.depths[0]);
                }
                let mut words = self.words(&text);
                words.extend(own.clone());
                self.run(&words)?;
                let out = self.folder.join(&name);
                let seconds: Resources = files::read_json(&out.join("sample.json"))?;
                let resources: Resources = files::read_json(&out.join("resources.json"))?;
                let disk = files::size(&out.join("samples.npz"))? as f64;
                files::remove(&out)?;
                Ok(Drawn {
                    seconds: seconds.seconds / images as f64,
                    bytes: resources.peak_rss_bytes.unwrap_or(0.0),
                    disk: disk / images as f64,
                })
            };
        let at = |counts: u64| -> Result<Vec<Drawn>> {
            let drawn = |blocks: &u64| draw(*blocks, FEW, counts, TOKEN_STEPS[0], false);
            self.depths.iter().map(drawn).collect()
        };
        let mut corners = at(DRAWN[0])?;
        corners.extend(match apart {
            true => at(DRAWN[1])?,
            // Steps that are all alike: twice as many take twice as long.
            false => corners
                .iter()
                .map(|drawn| Drawn {
                    seconds: 2.0 * drawn.seconds,
                    ..*drawn
                })
                .collect(),
        });
        let seconds: Vec<f64> = corners.iter().map(|drawn| drawn.seconds).collect();
        let bytes: Vec<f64> = corners.iter().map(|drawn| drawn.bytes).collect();
        let (blocks, counts) = (self.depths[0], DRAWN[0]);
        let token_step = match apart {
            true => {
                let more = draw(blocks, FEW, counts, TOKEN_STEPS[1], false)?.seconds - seconds[0];
                more.max(0.0) / (TOKEN_STEPS[1] - TOKEN_STEPS[0]) as f64
            }
            false => 0.0,
        };
        // An autoencoder decodes one image at a time in every lane.
        let (decode, decode_bytes, image_disk) = match self.preset.latents {
            Some(_) => {
                let with = draw(blocks, FEW, counts, TOKEN_STEPS[0], true)?;
                let seconds = (with.seconds - seconds[0]).max(0.0);
                (seconds, (with.bytes - bytes[0]).max(0.0), with.disk)
            }
            None => (0.0, 0.0, corners[0].disk),
        };
        let more = draw(blocks, MORE, counts, TOKEN_STEPS[0], false)?.bytes - bytes[0];
        let batch = table.get("batch-size").and_then(toml::Value::as_integer);
        // The default of `sample`.
        let batch = batch.unwrap_or(50) as f64;
        Ok(Draws {
            image_disk,
            image_bytes: more.max(0.0) / (MORE - FEW) as f64,
            at_a_time: batch * self.driver.machine.cores as f64,
            seconds: plane(self.depths, DRAWN, &seconds)?,
            token_step,
            token_steps: TOKEN_STEPS[0] as f64,
            decode,
            decode_bytes,
            bytes: plane(self.depths, DRAWN, &bytes)?,
        })
    }

    fn encode(&self) -> Result<Each> {
        let Some(latents) = &self.preset.latents else {
            return Ok(Each::default());
        };
        let vae = self.depths[0];
        let flags = flags("encode", &latents.flags)?;
        let encode = |images: &str| -> Result<(Resources, f64)> {
            let mut words = self.words(&format!(
                "encode @/{vae}/{images} @/latents --vae @/{vae}/vae"
            ));
            words.extend(flags.clone());
            self.run(&words)?;
            let out = self.folder.join("latents");
            let resources = files::read_json(&out.join("resources.json"))?;
            let disk = files::size(&out)? as f64;
            files::remove(&out)?;
            Ok((resources, disk))
        };
        // One image and two: what reading the network takes is in both.
        let ((one, one_disk), (two, two_disk)) = (encode("image")?, encode("images")?);
        Ok(Each {
            seconds: (two.seconds - one.seconds).max(0.0),
            bytes: two.peak_rss_bytes.unwrap_or(0.0),
            disk: (two_disk - one_disk).max(0.0),
        })
    }

    /// Seconds of an image in the evaluator's network, whose weights are random: what more of them cost more.
    fn evaluate(&self) -> Result<Each> {
        if self.preset.evaluate.weights.is_none() {
            return Ok(Each::default());
        }
        let folder = self.depths[0];
        let judge = |images: &str| {
            self.run(&self.words(&format!(
                "stats @/{folder}/{images} --weights @/{folder}/inception.safetensors -o @/stats.npz"
            )))
        };
        // Of few images the network takes the first batch for each core; of many, several.
        let (few, many) = (judge("few")?, judge("many")?);
        let more = (MANY_JUDGED - FEW_JUDGED) as f64;
        Ok(Each {
            seconds: (many.seconds - few.seconds).max(0.0) / more,
            bytes: many.bytes,
            disk: 0.0,
        })
    }

    fn models(&self) -> Result<Plane> {
        let size = |blocks: u64| files::size(&self.folder.join(blocks.to_string()).join("model"));
        let [a, b] = [size(self.depths[0])? as f64, size(self.depths[1])? as f64];
        Ok(Plane::through(self.depths, [0, 1], [a, b, a, b]))
    }
}

fn plane(xs: [u64; 2], ys: [u64; 2], values: &[f64]) -> Result<Plane> {
    let values: [f64; 4] = values.try_into().context("four corners are measured")?;
    Ok(Plane::through(xs, ys, values))
}

/// Seconds of a step after the first, which also warms up.
fn step_seconds(metrics: &Path) -> Result<f64> {
    #[derive(Deserialize)]
    struct Line {
        step: u64,
        seconds: f64,
    }
    let text = std::fs::read_to_string(metrics)?;
    let lines: Vec<Line> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    let (Some(first), Some(last)) = (lines.first(), lines.last()) else {
        bail!("{} is empty", metrics.display());
    };
    if last.step <= first.step {
        bail!("{} has one step", metrics.display());
    }
    Ok((last.seconds - first.seconds) / (last.step - first.step) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_of_a_step_leave_the_first_out() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("metrics.jsonl");
        let lines = "{\"step\":1,\"seconds\":9.0,\"loss\":1}\n{\"step\":2,\"seconds\":10.0}\n{\"step\":3,\"seconds\":11.5}\n";
        std::fs::write(&file, lines).unwrap();
        assert_eq!(step_seconds(&file).unwrap(), 1.25);
        std::fs::write(&file, "").unwrap();
        assert!(step_seconds(&file).is_err());
    }
}
