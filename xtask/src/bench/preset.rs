//! The preset of a benchmark: a TOML under `assets/presets`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What is measured, how often, and what is hoped for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Preset {
    /// Timed rounds, in each of which every contender does one step.
    pub(crate) rounds: usize,
    /// Seconds of rest before every step.
    pub(crate) pause: f64,
    /// Largest difference between the outputs, relative to the largest value.
    pub(crate) tolerance: f64,
    /// None: all cores.
    pub(crate) threads: Option<usize>,
    pub(crate) probes: Probes,
    pub(crate) cases: Vec<Case>,
    pub(crate) scaling: Scaling,
}

/// The machine's own limits.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Probes {
    /// Expected on two cores, for the progress bar.
    pub(crate) seconds: f64,
}

/// One comparison.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) model: String,
    pub(crate) batch: usize,
    pub(crate) contenders: Vec<Contender>,
    #[serde(default)]
    pub(crate) goals: Goals,
    /// Pieces into which our training step cuts its batch: fewer are faster, more take less memory. Default: two per
    /// thread.
    pub(crate) micro_batches: Option<usize>,
    /// Expected on two cores at the preset's rounds, for the progress bar.
    pub(crate) seconds: f64,
}

/// What one step does; the names are those of `tinyfusion bench prepare --kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// The model's output, without gradients.
    Forward,
    /// A guided DDPM step.
    Sampling,
    /// A training step of all weights.
    FineTune,
    /// A student of half the depth learns from its teacher's output and hidden states.
    MaskedKd,
    /// Learnable pruning, 1:2, with an update of all weights.
    LearnFull,
    /// Learnable pruning, 1:2, with LoRA.
    LearnLora,
    /// A product of the sizes in `flops.rs`.
    Matmul,
    /// A copy of 256 MiB.
    Copy,
}

impl Kind {
    /// Its name in files and commands.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Sampling => "sampling",
            Self::FineTune => "fine-tune",
            Self::MaskedKd => "masked-kd",
            Self::LearnFull => "learn-full",
            Self::LearnLora => "learn-lora",
            Self::Matmul => "matmul",
            Self::Copy => "copy",
        }
    }

    /// Whether both sides compute the same tensor, so that it can be compared.
    pub(crate) fn has_output(self) -> bool {
        matches!(self, Self::Forward | Self::Sampling)
    }
}

/// Who does the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// The binary.
    Ours,
    /// The binary on a model of half the depth.
    Half,
    /// PyTorch as it is.
    Eager,
    /// PyTorch with `torch.compile`.
    Compile,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "tinyfusion",
            Self::Half => "tinyfusion, half the depth",
            Self::Eager => "PyTorch",
            Self::Compile => "PyTorch, compiled",
        }
    }

    pub(crate) fn is_python(self) -> bool {
        matches!(self, Self::Eager | Self::Compile)
    }
}

/// What is hoped for; none is not judged.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Goals {
    /// Time of eager PyTorch over ours, at least.
    pub(crate) eager: Option<f64>,
    /// Time of compiled PyTorch over ours, at least.
    pub(crate) compile: Option<f64>,
    /// Our time over that of half the depth, at least.
    pub(crate) half: Option<f64>,
    /// Our peak memory over that of eager PyTorch, at most.
    pub(crate) memory: Option<f64>,
}

/// `--scaling`: ours alone, one size at a time.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scaling {
    pub(crate) kinds: Vec<Kind>,
    pub(crate) model: String,
    pub(crate) rounds: usize,
    pub(crate) depth: usize,
    pub(crate) batch: usize,
    pub(crate) input_size: usize,
    /// Expected for one kind over one size, for the progress bar.
    pub(crate) seconds: f64,
    pub(crate) over: Over,
}

/// The values that each size takes while the others stay.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Over {
    pub(crate) depth: Vec<usize>,
    pub(crate) batch: Vec<usize>,
    pub(crate) input_size: Vec<usize>,
    pub(crate) threads: Vec<usize>,
}

impl Preset {
    /// Reads and checks the preset.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the preset {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("preset {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let preset: Self = toml::from_str(text)?;
        if preset.rounds == 0 || preset.scaling.rounds == 0 {
            bail!("rounds is 0; expected at least 1, such as 7");
        }
        if !(0.0..=60.0).contains(&preset.pause) {
            bail!("pause is {}; expected seconds from 0 to 60", preset.pause);
        }
        if preset.threads == Some(0) {
            bail!("threads is 0; leave it out for all cores");
        }
        for (i, case) in preset.cases.iter().enumerate() {
            case.check()?;
            if preset.cases[..i].iter().any(|c| c.name == case.name) {
                bail!("two cases are called `{}`", case.name);
            }
        }
        for kind in &preset.scaling.kinds {
            if !matches!(kind, Kind::Forward | Kind::FineTune) {
                bail!(
                    "scaling.kinds has `{}`; a floor is known for `forward` and `fine-tune`",
                    kind.word()
                );
            }
        }
        Ok(preset)
    }
}

impl Case {
    fn check(&self) -> Result<()> {
        let Self {
            name,
            contenders,
            goals,
            ..
        } = self;
        if contenders.first() != Some(&Contender::Ours) {
            bail!("case `{name}`: the first of contenders has to be \"ours\"");
        }
        if let Some(twice) =
            (1..contenders.len()).find(|i| contenders[..*i].contains(&contenders[*i]))
        {
            bail!(
                "case `{name}`: contenders has {:?} twice",
                contenders[twice]
            );
        }
        if matches!(self.kind, Kind::Matmul | Kind::Copy) {
            bail!("case `{name}`: {} is a probe, not a case", self.kind.word());
        }
        for (key, goal, of) in [
            ("eager", goals.eager, Contender::Eager),
            ("compile", goals.compile, Contender::Compile),
            ("half", goals.half, Contender::Half),
            ("memory", goals.memory, Contender::Eager),
        ] {
            if goal.is_some() && !contenders.contains(&of) {
                bail!("case `{name}`: goals.{key} needs the contender {of:?}");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMBEDDED: &str = include_str!("../../../assets/presets/bench.toml");

    #[test]
    fn the_embedded_preset_compares_every_kind_and_judges_every_case() {
        let preset = Preset::parse(EMBEDDED).unwrap();
        for kind in [
            Kind::Forward,
            Kind::Sampling,
            Kind::FineTune,
            Kind::MaskedKd,
            Kind::LearnFull,
            Kind::LearnLora,
        ] {
            assert!(preset.cases.iter().any(|c| c.kind == kind), "{kind:?}");
        }
        for case in &preset.cases {
            let g = case.goals;
            assert!(g.eager.or(g.half).is_some(), "{}", case.name);
        }
    }

    #[test]
    fn kinds_are_called_the_same_everywhere() {
        for word in [
            "forward",
            "sampling",
            "fine-tune",
            "masked-kd",
            "learn-full",
            "learn-lora",
            "matmul",
            "copy",
        ] {
            let kind: Kind = serde_json::from_value(word.into()).unwrap();
            assert_eq!(kind.word(), word);
        }
    }

    #[test]
    fn mistakes_are_named() {
        let broken = |from: &str, to: &str| {
            assert!(EMBEDDED.contains(from), "{from}");
            format!(
                "{:#}",
                Preset::parse(&EMBEDDED.replacen(from, to, 1)).unwrap_err()
            )
        };
        assert!(broken("rounds = 7", "rounds = 0").contains("rounds is 0"));
        assert!(broken("pause = 0.2", "pause = -1.0").contains("pause is -1"));
        assert!(broken("\"ours\", \"eager\"", "\"eager\", \"ours\"").contains("first"));
        assert!(broken("\"half\"]", "\"ours\"]").contains("twice"));
        assert!(broken("goals = { eager", "goals = { half = 1.0, eager").contains("goals.half"));
        assert!(broken("forward DiT-B/2", "forward DiT-S/2").contains("two cases"));
        assert!(broken("kinds = [", "kinds = [\"sampling\", ").contains("scaling.kinds"));
        assert!(broken("seconds = 15", "second = 15").contains("second"));
    }
}
