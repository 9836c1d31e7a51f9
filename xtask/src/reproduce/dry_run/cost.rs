//! What a stage costs: its work, read off its command, times what a unit of it took here.

use std::collections::BTreeMap;
use std::fmt;

use super::rates::Rates;
use crate::reproduce::preset::Preset;
use crate::reproduce::vocabulary::Stage;

/// An estimate.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Cost {
    pub(super) seconds: f64,
    /// Largest memory, where that was measured.
    pub(super) bytes: Option<f64>,
    /// Bytes left on disk.
    pub(super) disk: f64,
    /// Stages of which nothing is known.
    pub(super) unknown: usize,
}

impl Cost {
    /// One after another.
    pub(super) fn sum(all: &[Self]) -> Self {
        let largest = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
        all.iter().fold(Self::default(), |sum, one| Self {
            seconds: sum.seconds + one.seconds,
            bytes: largest(sum.bytes, one.bytes),
            disk: sum.disk + one.disk,
            unknown: sum.unknown + one.unknown,
        })
    }

    /// What the preset says of a stage.
    pub(super) fn expected(stage: &Stage) -> Self {
        Self {
            seconds: stage.seconds,
            ..Self::default()
        }
    }

    fn unknown() -> Self {
        Self {
            unknown: 1,
            ..Self::default()
        }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.unknown > 0 && self.seconds == 0.0 {
            return f.write_str("no estimate");
        }
        f.write_str(&duration(self.seconds))?;
        if let Some(bytes) = self.bytes {
            write!(f, ", {:.1} GB of memory", bytes / 1e9)?;
        }
        if self.disk >= 5e7 {
            write!(f, ", {:.1} GB on disk", self.disk / 1e9)?;
        }
        match self.unknown {
            0 => Ok(()),
            n => write!(f, ", {n} stages without an estimate"),
        }
    }
}

/// Two digits of the unit in which one counts.
fn duration(seconds: f64) -> String {
    const UNITS: [(f64, &str); 5] = [
        (365.25 * 86_400.0, "years"),
        (86_400.0, "days"),
        (3_600.0, "h"),
        (60.0, "min"),
        (1.0, "s"),
    ];
    let found = UNITS.iter().find(|(unit, _)| seconds >= 2.0 * unit);
    match found {
        Some((unit, name)) => format!("about {:.0} {name}", seconds / unit),
        None => "seconds".into(),
    }
}

/// Reads commands in their order, since the depth of a cut model follows from the cut.
pub(super) struct Costs<'a> {
    preset: &'a Preset,
    rates: &'a Rates,
    /// Blocks of models, and how many a selection keeps, by path. A network of other widths counts as so many blocks of the
    /// dense one as have its parameters.
    depths: BTreeMap<String, f64>,
    /// Images in files that `sample` writes.
    counts: BTreeMap<String, f64>,
}

/// The flags of a command.
struct Flags<'a>(&'a [String]);

impl Flags<'_> {
    fn text(&self, flag: &str) -> Option<&str> {
        let at = self.0.iter().position(|arg| arg == flag)?;
        self.0.get(at + 1).map(String::as_str)
    }

    fn number(&self, flag: &str) -> Option<f64> {
        self.text(flag)?.parse().ok()
    }
}

impl<'a> Costs<'a> {
    pub(super) fn new(preset: &'a Preset, rates: &'a Rates) -> Self {
        let teacher = preset.teacher.display().to_string();
        let depth = preset.depth.map_or(rates.depth, f64::from);
        Self {
            preset,
            rates,
            depths: BTreeMap::from([(teacher, depth)]),
            counts: BTreeMap::new(),
        }
    }

    /// An estimate for each stage.
    pub(super) fn of_stages(mut self, stages: &[Stage]) -> Vec<Cost> {
        stages
            .iter()
            .map(|stage| self.of(&stage.args).unwrap_or_else(Cost::unknown))
            .collect()
    }

    /// Blocks of a model.
    fn depth(&self, model: &str) -> Option<f64> {
        self.depths.get(model).copied()
    }

    /// A model of so many blocks on disk.
    fn stored(&self, depth: f64) -> Cost {
        Cost {
            disk: self.rates.model.at(depth, 0.0),
            ..Cost::default()
        }
    }

    fn of(&mut self, args: &[String]) -> Option<Cost> {
        let rates = self.rates;
        let flags = Flags(args);
        let argument = |i: usize| args.get(i).map(String::as_str);
        let (model, out) = (argument(1)?, argument(2).unwrap_or_default());
        let small = Cost::default();
        Some(match argument(0)? {
            "encode" => rates.encode.of(self.preset.latents.as_ref()?.count as f64),
            "learn" => {
                let depth = self.depth(model)?;
                let selection = format!("{out}/selection.json");
                self.depths
                    .insert(selection, kept(flags.text("--pattern")?, depth)?);
                let batch = flags.number("--batch-size")?;
                rates.learn.steps(depth, batch, flags.number("--steps")?)
            }
            "score" => {
                let depth = self.depth(model)?;
                let criterion = flags.text("--criterion")?;
                let keep = match (flags.number("--keep"), flags.text("--pattern")) {
                    (Some(keep), _) => keep,
                    (None, Some(pattern)) => kept(pattern, depth)?,
                    // The oracle's half.
                    (None, None) => (depth / 2.0).ceil(),
                };
                self.depths.insert(format!("{out}/selection.json"), keep);
                // Passes of the network, in each of which so many samples go through all blocks.
                let passes = match criterion {
                    "random" | "oracle" | "magnitude" => return Some(small),
                    "block-influence" | "flux-lite" => 1.0,
                    "sensitivity" => depth + 1.0,
                    "sensitivity-greedy" => (depth - keep) * (depth + keep + 1.0) / 2.0,
                    "random-search" => flags.number("--masks")?,
                    _ => return None,
                };
                rates
                    .forward
                    .samples(depth, passes * flags.number("--samples")?)
            }
            "cut" => {
                let keep = match (flags.text("--keep"), flags.text("--selection")) {
                    (Some(blocks), _) => blocks.split(',').count() as f64,
                    (None, selection) => self.depth(selection?)?,
                };
                self.depths.insert(out.into(), keep);
                self.stored(keep)
            }
            "narrow" => {
                let depth = self.depth(model)?;
                let left = match (flags.text("--parameters-of"), flags.number("--ratio")) {
                    (Some(other), _) => self.depth(other)?,
                    (None, ratio) => depth * (1.0 - ratio?),
                };
                self.depths.insert(out.into(), left);
                let mut cost = self.stored(left);
                if flags.text("--importance").is_none_or(|by| by == "taylor") {
                    // A step of training for every timestep; most sweeps end before the last.
                    let samples = flags.number("--samples").unwrap_or(128.0);
                    let timesteps = 1000.0 / flags.number("--stride").unwrap_or(1.0);
                    let at_once = (samples / 2.0).clamp(1.0, 64.0);
                    let step = rates.fine_tune.steps(depth, at_once, 1.0);
                    cost.seconds = step.seconds * timesteps * samples / at_once;
                    cost.bytes = step.bytes;
                }
                cost
            }
            "distill" => {
                let depth = self.depth(model)?;
                self.depths.insert(format!("{out}/model"), depth);
                let (steps, batch) = (flags.number("--steps")?, flags.number("--batch-size")?);
                let student = rates.fine_tune.steps(depth, batch, steps);
                match flags.text("--teacher") {
                    None => student,
                    Some(teacher) => {
                        let teacher = rates.forward.samples(self.depth(teacher)?, steps * batch);
                        Cost {
                            disk: student.disk,
                            seconds: student.seconds + teacher.seconds,
                            // Both are in memory.
                            bytes: student.bytes.zip(teacher.bytes).map(|(a, b)| a + b),
                            unknown: 0,
                        }
                    }
                }
            }
            "loss" | "activations" => {
                let images = flags.number("--images")?;
                rates.forward.samples(self.depth(model)?, images)
            }
            "sample" => {
                let counted = flags.number(self.preset.sample.counted.flag())?;
                let steps = flags.number("--steps")?;
                let count = flags.number("--count")?;
                self.counts.insert(format!("{out}/samples.npz"), count);
                rates
                    .sample
                    .images(self.depth(model)?, counted, steps, count)
            }
            // The network's features; its first argument is the reference, whose statistics are known or, of `shapes`,
            // cheap. Precision and recall hold the features of all samples in memory, in f32.
            "evaluate" if flags.text("--weights").is_some() => {
                const FEATURES: f64 = 2048.0 * 4.0;
                let count = *self.counts.get(out)?;
                let mut cost = rates.evaluate.of(count);
                cost.bytes = cost.bytes.map(|bytes| bytes + count * FEATURES);
                cost
            }
            "inspect" => small,
            _ => return None,
        })
    }
}

/// How many of `depth` blocks a pattern keeps: `2:4`, or one `N:M` for every group, also `2:4x3`.
fn kept(pattern: &str, depth: f64) -> Option<f64> {
    let group = |text: &str| -> Option<(f64, f64, Option<f64>)> {
        let (sizes, times) = match text.split_once('x') {
            Some((sizes, times)) => (sizes, Some(times.parse().ok()?)),
            None => (text, None),
        };
        let (n, m) = sizes.split_once(':')?;
        Some((n.parse().ok()?, m.parse().ok()?, times))
    };
    let groups: Vec<_> = pattern.split(',').map(group).collect::<Option<_>>()?;
    match groups[..] {
        [(n, m, None)] => Some(depth * n / m),
        _ => Some(
            groups
                .iter()
                .map(|(n, _, times)| n * times.unwrap_or(1.0))
                .sum(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::rates;
    use super::*;
    use crate::reproduce::preset::tests::embedded;

    #[test]
    fn patterns_say_how_many_blocks_stay() {
        assert_eq!(kept("2:4", 28.0), Some(14.0));
        assert_eq!(kept("3:4,3:4,2:4", 12.0), Some(8.0));
        assert_eq!(kept("2:4x7", 28.0), Some(14.0));
        assert_eq!(kept("many", 28.0), None);
    }

    #[test]
    fn times_are_said_in_the_unit_in_which_one_counts() {
        assert_eq!(duration(1.0), "seconds");
        assert_eq!(duration(150.0), "about 2 min");
        assert_eq!(duration(3.0 * 86_400.0), "about 3 days");
        let cost = Cost {
            seconds: 30.0,
            bytes: Some(2.5e9),
            disk: 1.25e9,
            unknown: 1,
        };
        assert_eq!(
            cost.to_string(),
            "about 30 s, 2.5 GB of memory, 1.2 GB on disk, 1 stages without an estimate"
        );
        assert_eq!(Cost::unknown().to_string(), "no estimate");
    }

    #[test]
    fn the_depth_of_a_cut_model_follows_its_commands() {
        let preset = embedded("table2-dit");
        let rates = rates();
        let mut costs = Costs::new(&preset, &rates);
        let mut of = |text: &str| {
            let words: Vec<String> = text.split(' ').map(String::from).collect();
            costs.of(&words)
        };
        let teacher = "assets/teacher";
        let learn = of(&format!(
            "learn {teacher} l --pattern 1:2 --batch-size 4 --steps 10"
        ))
        .unwrap();
        assert_eq!(learn, rates.learn.steps(16.0, 4.0, 10.0));
        of(&format!("cut {teacher} c --selection l/selection.json")).unwrap();
        let tuned = of("distill c d --steps 5 --batch-size 2").unwrap();
        assert_eq!(tuned, rates.fine_tune.steps(8.0, 2.0, 5.0));
        // A teacher passes the same samples forward.
        let taught = of(&format!(
            "distill c d --steps 5 --batch-size 2 --teacher {teacher}"
        ))
        .unwrap();
        let forward = rates.forward.samples(16.0, 10.0).seconds;
        assert!((taught.seconds - tuned.seconds - forward).abs() < 1e-12);
        let drawn = of("sample d/model s --steps 20 --count 3").unwrap();
        assert_eq!(drawn, rates.sample.images(8.0, 20.0, 20.0, 3.0));
        // Skipping one block after another: 16 passes, then 15, down to 9.
        let greedy = of(&format!(
            "score {teacher} g --criterion sensitivity-greedy --keep 8 --samples 1"
        ));
        let passes: f64 = (9..=16).map(f64::from).sum();
        assert_eq!(greedy.unwrap(), rates.forward.samples(16.0, passes));
        // Of the images that were drawn.
        let judged = of("evaluate ref.npz s/samples.npz --weights inception.pth").unwrap();
        assert_eq!(judged.seconds, 3.0 * rates.evaluate.seconds);
        assert_eq!(of("evaluate ref.npz b --weights inception.pth"), None);
        // Half of every width: trained like half the blocks.
        let swept = of(&format!(
            "narrow {teacher} n --ratio 0.5 --samples 8 --stride 100"
        ))
        .unwrap();
        assert_eq!(
            swept.seconds,
            20.0 * rates.fine_tune.steps(16.0, 4.0, 1.0).seconds
        );
        assert_eq!(swept.disk, 18.0);
        let tuned_narrow = of("distill n d2 --steps 5 --batch-size 2").unwrap();
        assert_eq!(tuned_narrow, tuned);
    }
}
