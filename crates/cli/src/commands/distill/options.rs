use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use tinyfusion::core::Error;
use tinyfusion::distill::{BetaSchedule, DistillConfig, FeatureLoss, KnowledgeConfig, Recipe};
use tinyfusion::mask::Pattern;
use tinyfusion::train::{FitConfig, LrScaling, LrSchedule, ema_decay};

use crate::family::{Dit, Family};
use crate::settings::{FitOptions, defaults_text, finite};
use crate::training_data::DataOptions;

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Features {
    /// Outputs only
    None,
    /// Hidden states, unmasked
    All,
    /// Massive activations masked, teacher and student each by its own mask (the reference)
    Masked,
    /// Only where both are inliers
    Joint,
}

/// How blocks of student and teacher are paired.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) enum Align {
    #[default]
    GroupEnds,
    EveryBlock,
    Pattern(Pattern),
}

impl FromStr for Align {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "group-ends" => Ok(Self::GroupEnds),
            "every-block" => Ok(Self::EveryBlock),
            pattern if pattern.contains(':') => pattern
                .parse()
                .map(Self::Pattern)
                .map_err(|e: Error| e.to_string()),
            _ => Err("expected group-ends, every-block or a pattern such as 1:2".into()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum RecipeFlag {
    /// Stated in images, not steps: averages with a half-life of 5 % of the run so far (--ema-rampup 0.05, at most
    /// 1.8 million images), --features joint, beta falling in a line over the run, learning rate 5e-4 to 5e-5 at every
    /// batch size; 600 steps of 64
    Robust,
    /// As TinyFusion's public code has it: learning rate 2e-4 to 1e-4 at every batch size, averages of decay 0.9999 per
    /// step, --features masked, beta falling in up to 20 stairs (of 20 epochs, the last has none); 100,000 steps of 256
    Reference,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum ScalingFlag {
    /// The same rate
    Constant,
    /// By the root of the batch size
    Sqrt,
    /// By the batch size
    Linear,
}

#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Options {
    /// The teacher, a model as `inspect` takes it; without it this is plain fine-tuning
    #[arg(long)]
    pub(super) teacher: Option<PathBuf>,
    /// selection.json that cut the student from the teacher (aligns their hidden states); without it, the one
    /// that `cut` laid into the student's folder
    #[arg(long, value_name = "FILE")]
    pub(super) selection: Option<PathBuf>,
    /// Which hidden states are compared: `group-ends`, behind the groups of the selection, as in the paper; `every-block`,
    /// behind every block of the student, with what the teacher hands to the next one that was kept; or a pattern of the
    /// student's blocks to the teacher's, such as 1:2, which needs no selection [default: group-ends]
    #[arg(long, value_name = "RULE")]
    align: Option<Align>,
    /// The settings that the flags below change [default: robust]
    #[arg(long)]
    recipe: Option<RecipeFlag>,
    /// Hidden states to match
    #[arg(long)]
    features: Option<Features>,
    /// Share of the teacher's output in the loss
    #[arg(long, value_parser = finite)]
    alpha_kd: Option<f64>,
    /// Weight of the hidden states at the first step; it falls to 0 [default: 1e-2, 2e-4 of a SiT]
    #[arg(long, value_parser = finite)]
    beta: Option<f64>,
    /// Let that weight fall once in so many steps, by epochs as the reference does (0: at every step)
    #[arg(long, value_name = "STEPS")]
    beta_epoch: Option<u64>,
    /// Standard deviations within which an activation is an inlier
    #[arg(long, value_parser = finite)]
    sigma: Option<f64>,
    /// Train on so many images, in as many steps as that takes
    #[arg(long, value_name = "IMAGES", conflicts_with = "steps", value_parser = clap::value_parser!(u64).range(1..))]
    samples: Option<u64>,
    /// The batch size that --lr and --last-lr are meant for; --lr-scaling carries them to the one of this run
    #[arg(long, value_name = "IMAGES", value_parser = clap::value_parser!(u32).range(1..))]
    lr_batch: Option<u32>,
    /// How a learning rate is carried from one batch size to another [default: constant]
    #[arg(long, value_name = "RULE")]
    lr_scaling: Option<ScalingFlag>,
    /// Images after which the averaged parameters have forgotten half, whatever the batch size
    #[arg(long, value_name = "IMAGES", conflicts_with = "ema", value_parser = finite)]
    ema_half_life: Option<f64>,
    /// Largest share of the run so far that this half-life may be, so that the averages forget the cut model (0: no limit)
    #[arg(long, value_name = "SHARE", value_parser = finite)]
    ema_rampup: Option<f64>,
    #[command(flatten)]
    pub(super) data: DataOptions,
    #[command(flatten)]
    pub(super) fit: FitOptions,
}

impl Options {
    /// The flags over the recipe, for a family whose hidden states weigh `beta`.
    pub(super) fn distill_config(&self, beta: f64) -> Result<DistillConfig> {
        self.check()?;
        // Budgets: of the paper, and for a small model on a CPU.
        let (recipe, steps, batch) = match self.recipe.unwrap_or(RecipeFlag::Robust) {
            RecipeFlag::Robust => (Recipe::robust(), 600, 64),
            RecipeFlag::Reference => (Recipe::reference(), 100_000, 256),
        };
        let batch = self.fit.batch_size.unwrap_or(batch);
        let steps = match self.samples {
            Some(samples) => samples.div_ceil(batch.max(1) as u64),
            None => self.fit.steps.unwrap_or(steps),
        };
        let defaults = recipe.config(steps, batch, beta);
        Ok(DistillConfig {
            seed: self.fit.seed(),
            lr: self.lr(&recipe, batch),
            fit: self.fit_config(&defaults.fit)?,
            knowledge: defaults
                .knowledge
                .filter(|_| self.teacher.is_some())
                .as_ref()
                .map(|d| self.knowledge(d)),
        })
    }

    /// Refuses flags that would do nothing.
    fn check(&self) -> Result<()> {
        let about_features = self.beta.is_some()
            || self.beta_epoch.is_some()
            || self.sigma.is_some()
            || self.align.is_some();
        let about_teacher = self.features.is_some() || self.alpha_kd.is_some() || about_features;
        let fail = |what: &str| Err(Error::usage(what).into());
        if self.teacher.is_none() && about_teacher {
            return fail("features, alpha-kd, beta, beta-epoch, sigma and align need --teacher");
        }
        if self.teacher.is_none() && self.selection.is_some() {
            return fail("selection aligns the student with a teacher: it needs --teacher");
        }
        if self.features == Some(Features::None) && about_features {
            return fail(
                "beta, beta-epoch, sigma and align are about hidden states: they do nothing with --features none",
            );
        }
        if self.features == Some(Features::All) && self.sigma.is_some() {
            return fail("sigma tells outliers by, which --features all keeps: leave it out");
        }
        let scaled = (self.lr_scaling).is_some_and(|rule| rule != ScalingFlag::Constant);
        if self.lr_batch.is_some() && !scaled {
            return fail(
                "lr-batch does nothing where the learning rate is the same at every batch size: pass --lr-scaling sqrt \
                 or linear",
            );
        }
        if self.fit.lr.is_some() && scaled && self.lr_batch.is_none() {
            return fail(
                "lr-scaling does nothing with a learning rate that is taken as it is: name the batch size that --lr is \
                 meant for by --lr-batch",
            );
        }
        Ok(())
    }

    /// How blocks of student and teacher are paired.
    pub(super) fn align(&self) -> Align {
        self.align.clone().unwrap_or_default()
    }

    /// A rate of the flags without a batch size is this run's own.
    fn lr(&self, recipe: &Recipe, batch: usize) -> LrSchedule {
        let rule = match self.lr_scaling {
            None => recipe.lr_scaling,
            Some(ScalingFlag::Constant) => LrScaling::Constant,
            Some(ScalingFlag::Sqrt) => LrScaling::Sqrt,
            Some(ScalingFlag::Linear) => LrScaling::Linear,
        };
        let meant_for = self.lr_batch.map(|b| b as usize);
        let given = meant_for.map_or(1.0, |b| rule.factor(batch, b));
        let own = rule.factor(batch, meant_for.unwrap_or(recipe.lr_batch));
        let (peak, last) = match self.fit.lr {
            None => (recipe.lr * own, recipe.last_lr * own),
            // A peak alone keeps the recipe's ratio of last to peak.
            Some(lr) => (lr * given, lr * given * recipe.last_lr / recipe.lr),
        };
        let last = self.fit.last_lr.map_or(last, |lr| lr * given);
        LrSchedule {
            peak,
            last,
            warmup: self.fit.warmup.unwrap_or(0),
        }
    }

    fn fit_config(&self, defaults: &FitConfig) -> Result<FitConfig> {
        let mut fit = FitConfig {
            steps: defaults.steps, // of --samples too
            ..self.fit.fit(defaults)
        };
        if let Some(half_life) = self.ema_half_life {
            if half_life <= 0.0 {
                return Err(Error::usage(format!(
                    "ema-half-life is {half_life}, expected a number above 0"
                ))
                .into());
            }
            fit.ema = ema_decay(half_life, fit.batch_size);
        }
        fit.ema_rampup = match self.ema_rampup {
            Some(0.0) => None,
            None if self.fit.ema.is_some() => None, // a decay per step is taken as it is
            given => given.or(defaults.ema_rampup),
        };
        Ok(fit)
    }

    fn knowledge(&self, d: &KnowledgeConfig) -> KnowledgeConfig {
        KnowledgeConfig {
            alpha_kd: self.alpha_kd.unwrap_or(d.alpha_kd),
            features: match self.features {
                None => d.features,
                Some(Features::None) => FeatureLoss::None,
                Some(Features::All) => FeatureLoss::All,
                Some(Features::Masked) => FeatureLoss::Masked,
                Some(Features::Joint) => FeatureLoss::Joint,
            },
            sigma: self.sigma.unwrap_or(d.sigma),
            beta: self.beta.unwrap_or(d.beta),
            beta_schedule: match self.beta_epoch {
                None => d.beta_schedule,
                Some(0) => BetaSchedule::PerStep,
                Some(steps_per_epoch) => BetaSchedule::PerEpoch { steps_per_epoch },
            },
        }
    }
}

/// For the help: the settings with a teacher, which are those without one and more.
pub(super) fn defaults() -> String {
    let options = Options {
        teacher: Some(PathBuf::new()),
        ..Options::default()
    };
    options
        .distill_config(Dit::BETA)
        .map_or_else(|_| String::new(), |s| defaults_text(&s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn config(flags: &str) -> DistillConfig {
        parsed(flags).unwrap().distill_config(1e-2).unwrap()
    }

    fn parsed(flags: &str) -> std::result::Result<Options, clap::Error> {
        let words = std::iter::once("distill").chain(flags.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
    }

    fn refused(flags: &str) -> String {
        let options = parsed(flags).unwrap();
        options.distill_config(1e-2).unwrap_err().to_string()
    }

    #[test]
    fn the_flags_of_the_preset_tiny_mean_what_they_always_meant() {
        let found = config(
            "--steps 900 --batch-size 16 --lr 2e-3 --last-lr 1e-5 --ema 0.98 --log-every 10 --teacher t \
             --alpha-kd 0.9 --features masked --beta 1e-2",
        );
        let wanted = DistillConfig {
            seed: 0,
            lr: LrSchedule {
                peak: 2e-3,
                last: 1e-5,
                warmup: 0,
            },
            fit: FitConfig {
                steps: 900,
                batch_size: 16,
                ema: 0.98,
                ema_rampup: None,
                log_every: 10,
                ..FitConfig::default()
            },
            knowledge: Some(KnowledgeConfig {
                features: FeatureLoss::Masked,
                ..KnowledgeConfig::default()
            }),
        };
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_recipe_is_what_no_flag_says() {
        let robust = config("--teacher t");
        assert_eq!(robust, config("--teacher t --recipe robust"));
        assert_eq!(robust, Recipe::robust().config(600, 64, 1e-2));
        let reference = config("--teacher t --recipe reference");
        assert_eq!(reference, Recipe::reference().config(100_000, 256, 1e-2));
        let plain = config("--recipe reference");
        assert_eq!(plain.knowledge, None);
        assert_eq!((plain.lr, plain.fit), (reference.lr, reference.fit));
        // Flags win.
        let mixed = config(
            "--teacher t --recipe reference --features joint --beta-epoch 0 --ema-rampup 0.05 --lr 1e-3",
        );
        let knowledge = mixed.knowledge.unwrap();
        assert_eq!(
            (knowledge.features, knowledge.beta_schedule),
            (FeatureLoss::Joint, BetaSchedule::PerStep)
        );
        assert_eq!((mixed.fit.ema, mixed.fit.ema_rampup), (0.9999, Some(0.05)));
        assert_eq!((mixed.lr.peak, mixed.lr.last), (1e-3, 5e-4));
    }

    #[test]
    fn blocks_are_aligned_by_a_rule_or_a_pattern() {
        let align = |flags: &str| parsed(flags).map(|options| options.align());
        assert_eq!(align("").unwrap(), Align::GroupEnds);
        assert_eq!(align("--align every-block").unwrap(), Align::EveryBlock);
        let pattern = Align::Pattern("1:2".parse().unwrap());
        assert_eq!(align("--align 1:2").unwrap(), pattern);
        for (flags, said) in [
            ("--align ends", "every-block"),
            ("--align 3:2", "keeps 3 of only 2"),
        ] {
            let error = align(flags).unwrap_err().to_string();
            assert!(error.contains(said), "{flags}: {error}");
        }
        assert!(refused("--align 1:2").contains("need --teacher"));
        assert!(refused("--teacher t --features none --align 1:2").contains("--features none"));
    }

    #[test]
    fn a_budget_in_samples_is_the_same_at_every_batch_size() {
        for (batch, steps) in [(16, 960), (64, 240), (256, 60), (1000, 16)] {
            let found = config(&format!("--samples 15360 --batch-size {batch}"));
            assert_eq!(found.fit.steps, steps, "batch {batch}");
        }
        assert!(parsed("--samples 10 --steps 2").is_err());
        assert!(parsed("--samples 0").is_err());
    }

    #[test]
    fn the_averages_can_be_stated_in_samples() {
        for batch in [16usize, 256] {
            let fit = config(&format!("--ema-half-life 1024 --batch-size {batch}")).fit;
            let left = fit.ema.powf(1024.0 / batch as f64);
            assert!((left - 0.5).abs() < 1e-12, "batch {batch}: {left}");
            assert_eq!(fit.ema_rampup, Some(0.05), "the recipe's");
        }
        assert_eq!(config("--ema-rampup 0").fit.ema_rampup, None);
        assert_eq!(config("--ema 0.98").fit.ema_rampup, None);
        assert_eq!(
            config("--ema 0.98 --ema-rampup 0.1").fit.ema_rampup,
            Some(0.1)
        );
        assert!(parsed("--ema-half-life 10 --ema 0.9").is_err());
        assert!(refused("--ema-half-life 0").contains("ema-half-life is 0"));
    }

    #[test]
    fn a_learning_rate_is_scaled_from_the_batch_size_it_is_meant_for() {
        let lr = |flags: &str| config(flags).lr;
        let near = |found: LrSchedule, peak: f64, last: f64| {
            assert!((found.peak / peak - 1.0).abs() < 1e-12, "{found:?}");
            assert!((found.last / last - 1.0).abs() < 1e-12, "{found:?}");
        };
        let flags = "--batch-size 256 --lr 2e-3 --last-lr 1e-3";
        near(lr(flags), 2e-3, 1e-3);
        near(
            lr(&format!("{flags} --lr-batch 16 --lr-scaling sqrt")),
            8e-3,
            4e-3,
        );
        near(
            lr(&format!("{flags} --lr-batch 16 --lr-scaling linear")),
            32e-3,
            16e-3,
        );
        // The recipe's own rate is meant for its own batch, 64.
        near(lr("--batch-size 256 --lr-scaling sqrt"), 1e-3, 1e-4);
        near(
            lr("--batch-size 256 --lr-scaling sqrt --lr-batch 1024"),
            2.5e-4,
            2.5e-5,
        );
        assert!(refused("--lr 1e-3 --lr-scaling sqrt").contains("--lr-batch"));
        assert!(refused("--lr 1e-3 --lr-batch 16").contains("--lr-scaling"));
    }
}
