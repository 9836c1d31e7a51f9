//! Steps measured on this machine: the preset's own commands on a network of its width with few blocks and random weights.
//!
//! Time and memory of a step are taken to be linear in the blocks and in the batch, so that four corners give them for
//! any depth and any batch.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::cost::Cost;
use crate::files;
use crate::reproduce::preset::{Counted, Preset};
use crate::reproduce::spec::flags;
use crate::reproduce::stage::Driver;

/// Blocks of the two networks, in each of their stages: a group to learn from, and twice that.
const BLOCKS: [u64; 2] = [2, 4];
const BATCHES: [u64; 2] = [2, 4];
/// Images of a draw, and of one that tells what more of them take.
const FEW: u64 = 2;
const MORE: u64 = 4;
/// Counted steps of a draw.
const DRAWN: [u64; 2] = [2, 4];

/// What the units of every command cost here.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    /// Blocks of the whole network.
    pub(super) depth: f64,
    pub(super) learn: Steps,
    pub(super) fine_tune: Steps,
    pub(super) forward: Forward,
    pub(super) sample: Draws,
    pub(super) encode: Each,
}

/// a + b·x + c·y + d·x·y, none of them below 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plane([f64; 4]);

impl Plane {
    /// Through values at the corners of `xs` × `ys`, in the order (0, 0), (1, 0), (0, 1), (1, 1). Noise must not make a
    /// larger step a cheaper one: what would fall is level.
    fn through(xs: [u64; 2], ys: [u64; 2], values: [f64; 4]) -> Self {
        let [x0, x1] = xs.map(|x| x as f64);
        let [y0, y1] = ys.map(|y| y as f64);
        let [v00, v10, v01, v11] = values;
        let d = ((v11 - v01 - v10 + v00) / ((x1 - x0) * (y1 - y0))).max(0.0);
        let b = ((v10 - v00) / (x1 - x0) - d * y0).max(0.0);
        let c = ((v01 - v00) / (y1 - y0) - d * x0).max(0.0);
        let a = (v00 - b * x0 - c * y0 - d * x0 * y0).max(0.0);
        Self([a, b, c, d])
    }

    fn at(self, x: f64, y: f64) -> f64 {
        let [a, b, c, d] = self.0;
        a + b * x + c * y + d * x * y
    }
}

/// Training steps, over blocks and batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Steps {
    seconds: Plane,
    bytes: Plane,
}

impl Steps {
    pub(super) fn steps(&self, depth: f64, batch: f64, steps: f64) -> Cost {
        Cost {
            seconds: steps * self.seconds.at(depth, batch),
            bytes: Some(self.bytes.at(depth, batch)),
            unknown: 0,
        }
    }
}

/// Samples that pass the network once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Forward {
    /// Of one sample: over blocks, and nothing else.
    seconds: Plane,
    bytes: Plane,
}

impl Forward {
    pub(super) fn samples(&self, depth: f64, samples: f64) -> Cost {
        Cost {
            seconds: samples * self.seconds.at(depth, 0.0),
            bytes: Some(self.bytes.at(depth, 0.0)),
            unknown: 0,
        }
    }
}

/// Images drawn, and decoded where the preset says by what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Draws {
    /// Of one image: over blocks and counted steps.
    seconds: Plane,
    /// Of one image and one step of a MAR's tokens, beyond the measured ones.
    token_step: f64,
    /// Steps of the tokens that are in `seconds`.
    token_steps: f64,
    decode: f64,
    bytes: Plane,
    /// Of every image at a time beyond the measured ones.
    image_bytes: f64,
    /// Images that are drawn at a time.
    at_a_time: f64,
}

impl Draws {
    pub(super) fn images(&self, depth: f64, counted: f64, steps: f64, count: f64) -> Cost {
        let tokens = self.token_step * (steps - self.token_steps).max(0.0);
        let more = (count.min(self.at_a_time) - FEW as f64).max(0.0);
        Cost {
            seconds: count * (self.seconds.at(depth, counted) + tokens + self.decode),
            bytes: Some(self.bytes.at(depth, counted) + more * self.image_bytes),
            unknown: 0,
        }
    }
}

/// One image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Each {
    pub(super) seconds: f64,
    pub(super) bytes: f64,
}

#[derive(Deserialize)]
struct Resources {
    seconds: f64,
    #[serde(default)]
    peak_rss_bytes: Option<f64>,
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
        })
    }
}

impl Lab<'_> {
    /// Runs the binary with these words; returns what it printed and the seconds.
    fn run(&self, words: &[String]) -> Result<(Vec<u8>, f64)> {
        println!("$ {} {}", self.driver.binary.display(), words.join(" "));
        let started = Instant::now();
        let out = Command::new(self.driver.absolute_binary())
            .args(words)
            .output()
            .context("the binary cannot be started")?;
        if !out.status.success() {
            bail!(
                "`{}` failed: {}",
                words.join(" "),
                String::from_utf8_lossy(&out.stderr)
            );
        }
        Ok((out.stdout, started.elapsed().as_secs_f64()))
    }

    fn words(&self, text: &str) -> Vec<String> {
        let folder = self.folder.display().to_string();
        text.split(' ')
            .map(|word| word.replace('@', &folder))
            .collect()
    }

    /// Blocks of a preset of the binary, and in how many stages they are.
    fn depth_of(&self, model: &str) -> Result<(f64, u64)> {
        let (printed, _) = self.run(&self.words("models --json"))?;
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
        if let Some(size) = size.filter(|_| blocks == self.depths[0]) {
            words.extend(["--vae".to_string(), size.to_string()]);
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
        let (mut seconds, mut bytes) = (Vec::new(), Vec::new());
        for batch in BATCHES {
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
                files::remove(&out)?;
            }
        }
        Ok(Steps {
            seconds: plane(self.depths, BATCHES, &seconds)?,
            bytes: plane(self.depths, BATCHES, &bytes)?,
        })
    }

    /// Seconds of a sample in `loss`: what more samples cost more.
    fn forward(&self) -> Result<Forward> {
        const IMAGES: [u64; 2] = [2, 16];
        let mut each = Vec::new();
        for blocks in self.depths {
            let mut seconds = Vec::new();
            for images in IMAGES {
                let words = self.words(&format!(
                    "loss @/{blocks}/model --data @/{blocks}/latents.safetensors --images {images} --seed 0"
                ));
                seconds.push(self.run(&words)?.1);
            }
            each.push((seconds[1] - seconds[0]).max(0.0) / (IMAGES[1] - IMAGES[0]) as f64);
        }
        // Weights alone: `loss` and the scores keep little else.
        let weights = |blocks: u64| -> Result<f64> {
            let file = self
                .folder
                .join(format!("{blocks}/model/model.safetensors"));
            Ok(std::fs::metadata(file)?.len() as f64)
        };
        let bytes = [weights(self.depths[0])?, weights(self.depths[1])?];
        let flat = |v: &[f64]| Plane::through(self.depths, [0, 1], [v[0], v[1], v[0], v[1]]);
        Ok(Forward {
            seconds: flat(&each),
            bytes: flat(&bytes),
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
            |blocks: u64, images: u64, counts: u64, tokens: u64, vae: bool| -> Result<(f64, f64)> {
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
                files::remove(&out)?;
                let peak = resources.peak_rss_bytes.unwrap_or(0.0);
                Ok((seconds.seconds / images as f64, peak))
            };
        let at = |counts: u64| -> Result<Vec<(f64, f64)>> {
            let drawn = |blocks: &u64| draw(*blocks, FEW, counts, TOKEN_STEPS[0], false);
            self.depths.iter().map(drawn).collect()
        };
        let mut corners = at(DRAWN[0])?;
        corners.extend(match apart {
            true => at(DRAWN[1])?,
            // Steps that are all alike: twice as many take twice as long.
            false => corners
                .iter()
                .map(|(seconds, bytes)| (2.0 * seconds, *bytes))
                .collect(),
        });
        let (seconds, bytes): (Vec<f64>, Vec<f64>) = corners.into_iter().unzip();
        let (blocks, counts) = (self.depths[0], DRAWN[0]);
        let token_step = match apart {
            true => {
                let more = draw(blocks, FEW, counts, TOKEN_STEPS[1], false)?.0 - seconds[0];
                more.max(0.0) / (TOKEN_STEPS[1] - TOKEN_STEPS[0]) as f64
            }
            false => 0.0,
        };
        let decode = match self.preset.latents {
            Some(_) => (draw(blocks, FEW, counts, TOKEN_STEPS[0], true)?.0 - seconds[0]).max(0.0),
            None => 0.0,
        };
        let more = draw(blocks, MORE, counts, TOKEN_STEPS[0], false)?.1 - bytes[0];
        let batch = table.get("batch-size").and_then(toml::Value::as_integer);
        // The default of `sample`.
        let batch = batch.unwrap_or(50) as f64;
        Ok(Draws {
            image_bytes: more.max(0.0) / (MORE - FEW) as f64,
            at_a_time: batch * self.driver.machine.cores as f64,
            seconds: plane(self.depths, DRAWN, &seconds)?,
            token_step,
            token_steps: TOKEN_STEPS[0] as f64,
            decode,
            bytes: plane(self.depths, DRAWN, &bytes)?,
        })
    }

    fn encode(&self) -> Result<Each> {
        let Some(latents) = &self.preset.latents else {
            return Ok(Each {
                seconds: 0.0,
                bytes: 0.0,
            });
        };
        /// As many as the stand-in has.
        const IMAGES: f64 = 2.0;
        let vae = self.depths[0];
        let mut words = self.words(&format!(
            "encode @/{vae}/images @/latents --vae @/{vae}/vae"
        ));
        words.extend(flags("encode", &latents.flags)?);
        self.run(&words)?;
        let resources: Resources = files::read_json(&self.folder.join("latents/resources.json"))?;
        Ok(Each {
            seconds: resources.seconds / IMAGES,
            bytes: resources.peak_rss_bytes.unwrap_or(0.0),
        })
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
pub(super) mod tests {
    use super::*;

    /// Made up: a block of a sample takes a second in `learn`, half a second in the others.
    pub(in super::super) fn rates() -> Rates {
        let steps = |block: f64| Steps {
            seconds: Plane([0.1, 0.0, 0.2, block]),
            bytes: Plane([1e6, 1e5, 0.0, 1e4]),
        };
        Rates {
            depth: 16.0,
            learn: steps(1.0),
            fine_tune: steps(0.5),
            forward: Forward {
                seconds: Plane([0.1, 0.5, 0.0, 0.0]),
                bytes: Plane([1e6, 1e5, 0.0, 0.0]),
            },
            sample: Draws {
                seconds: Plane([0.0, 0.0, 0.1, 0.5]),
                token_step: 0.0,
                token_steps: 4.0,
                decode: 1.0,
                bytes: Plane([1e6, 1e5, 0.0, 0.0]),
                image_bytes: 1e3,
                at_a_time: 100.0,
            },
            encode: Each {
                seconds: 2.0,
                bytes: 1e6,
            },
        }
    }

    #[test]
    fn four_corners_give_the_plane_and_noise_does_not_make_larger_cheaper() {
        let truth = Plane([1.0, 2.0, 3.0, 4.0]);
        let corner = |x: u64, y: u64| truth.at(x as f64, y as f64);
        let values = [corner(2, 2), corner(4, 2), corner(2, 4), corner(4, 4)];
        let found = Plane::through(BLOCKS, BATCHES, values);
        assert!((found.at(28.0, 128.0) - truth.at(28.0, 128.0)).abs() < 1e-9);
        let noisy = Plane::through(BLOCKS, BATCHES, [5.0, 4.0, 6.0, 5.5]);
        assert!(noisy.at(28.0, 2.0) >= noisy.at(4.0, 2.0));
        assert!(noisy.at(4.0, 128.0) >= noisy.at(4.0, 2.0));
    }

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
