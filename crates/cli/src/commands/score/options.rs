use std::path::Path;

use anyhow::Result;
use tinyfusion::core::{BlockLayout, BlockStack, Error};
use tinyfusion::diffusion::Objective;
use tinyfusion::mask::Pattern;
use tinyfusion::recover::criteria::{
    BlockInfluence, Choice, Criterion, FluxLite, Greedy, Magnitude, Oracle, Random, RandomSearch,
    Sensitivity,
};

use crate::commands::learn;
use crate::compute::ComputeOptions;
use crate::settings::finite;
use crate::training_data::{DataOptions, MOST_IMAGES};

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// ShortGPT: 1 − cosine of a block's input and output
    BlockInfluence,
    /// Flux.1-lite: mean squared difference of a block's input and output
    FluxLite,
    /// Rise of the loss when one block alone is skipped
    Sensitivity,
    /// The same, one block after another
    SensitivityGreedy,
    /// First of each pair in the first half, last of each pair in the second half (BK-SDM)
    Oracle,
    /// Uniform over the masks of the pattern, or over all masks that keep N blocks
    Random,
    /// By calibration loss among many random masks: the lowest, or another quantile
    RandomSearch,
    /// Mean absolute weight of a block
    Magnitude,
    /// Learned together with a weight update: `learn` with its defaults
    Learned,
}

impl Kind {
    /// Whether it looks at calibration samples.
    fn looks_at_data(self) -> bool {
        !matches!(
            self,
            Self::Oracle | Self::Random | Self::Magnitude | Self::Learned
        )
    }

    /// Its name on the command line.
    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map(|v| v.get_name().to_string())
            .unwrap_or_default()
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// How to choose
    #[arg(long)]
    criterion: Kind,
    /// Choose within groups, as 1:2 (random and learned without --keep: 1:2)
    #[arg(long, conflicts_with = "keep")]
    pattern: Option<Pattern>,
    /// Choose so many blocks of the whole network [default: half of them]
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
    #[command(flatten)]
    pub(super) data: DataOptions,
    /// Calibration samples, from the training part of the data [default: 256]
    #[arg(long)]
    samples: Option<u64>,
    /// Seed of the samples, timesteps and noise, and of random masks [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Score inputs without noise and keep the last block, as the public code does (block-influence only)
    #[arg(long)]
    reference: bool,
    /// Masks that are drawn (random-search only) [default: 1000]
    #[arg(long)]
    masks: Option<u64>,
    /// Which of them by calibration loss: 0 the lowest, 0.5 the median, 1 the highest (random-search only) [default: 0]
    #[arg(long, value_parser = finite)]
    quantile: Option<f64>,
    #[command(flatten)]
    pub(super) compute: ComputeOptions,
}

impl Options {
    /// Refuses options that would do nothing, and values out of range.
    pub(super) fn check(&self) -> Result<()> {
        let kind = self.criterion;
        let fail =
            |what: &str| Err(Error::usage(format!("--criterion {}: {what}", kind.name())).into());
        if kind == Kind::Oracle
            && (self.pattern.is_some() || self.keep.is_some() || self.seed.is_some())
        {
            return fail(
                "it knows one mask, so that pattern, keep and seed need another criterion",
            );
        }
        if kind == Kind::Learned && self.keep.is_some() {
            return fail("a mask is learned within the groups of a --pattern");
        }
        if kind == Kind::Magnitude && self.seed.is_some() {
            return fail("nothing is drawn, so that --seed does nothing");
        }
        if !kind.looks_at_data() && self.samples.is_some() {
            return fail("--samples does nothing, since no calibration samples are used");
        }
        if !kind.looks_at_data() && kind != Kind::Learned && self.data.is_given() {
            return fail("--data does nothing, since no samples are used");
        }
        if kind != Kind::BlockInfluence && self.reference {
            return fail("--reference needs --criterion block-influence");
        }
        if kind != Kind::RandomSearch && (self.masks.is_some() || self.quantile.is_some()) {
            return fail("--masks and --quantile need --criterion random-search");
        }
        if let Some(n) = self.samples.filter(|n| !(2..=MOST_IMAGES).contains(n)) {
            return fail(&format!(
                "--samples must be from 2 to {MOST_IMAGES}, found {n}"
            ));
        }
        if let Some(n) = self.masks.filter(|n| !(1..=1_000_000).contains(n)) {
            return fail(&format!("--masks must be from 1 to 1000000, found {n}"));
        }
        if let Some(q) = self.quantile.filter(|q| !(0.0..=1.0).contains(q)) {
            return fail(&format!("--quantile must be from 0 to 1, found {q}"));
        }
        Ok(())
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    /// Calibration samples, of criteria that look at them.
    pub(super) fn samples_used(&self) -> Option<u64> {
        self.criterion
            .looks_at_data()
            .then(|| self.samples.unwrap_or(256))
    }

    /// What those samples, or the steps of the search, are from.
    pub(super) fn data_used(&self) -> Option<&str> {
        let used = self.criterion.looks_at_data() || self.criterion == Kind::Learned;
        used.then(|| self.data.name())
    }

    /// The masks to choose from.
    pub(super) fn choice(&self, layout: &BlockLayout) -> Result<Choice> {
        let depth = layout.depth();
        let within_groups = self.criterion == Kind::Random && self.keep.is_none();
        Ok(match (&self.pattern, self.keep) {
            (Some(pattern), _) => Choice::Groups(pattern.groups(layout)?),
            (None, None) if within_groups => Choice::Groups(Pattern::default().groups(layout)?),
            (None, Some(n)) if !(1..=depth).contains(&n) => {
                return Err(Error::usage(format!(
                    "--keep must be from 1 to the network's {depth} blocks, found {n}"
                ))
                .into());
            }
            (None, Some(n)) => Choice::Any(n),
            (None, None) => Choice::Any((depth / 2).max(1)),
        })
    }

    /// The search of `learn` with its defaults.
    pub(super) fn learn(&self, model: &Path, out: &Path) -> learn::Args {
        learn::Args::with_defaults(
            model,
            out,
            self.pattern.clone(),
            self.data.clone(),
            self.seed,
            self.compute.clone(),
        )
    }
}

/// The criterion that the options name; none for `learned`, which is the command `learn`.
pub(super) fn criterion<S, O>(options: &Options) -> Option<Box<dyn Criterion<S, O>>>
where
    S: BlockStack + Sync,
    O: Objective<S> + Sync,
{
    let search = RandomSearch::default();
    let criterion: Box<dyn Criterion<S, O>> = match options.criterion {
        Kind::Learned => return None,
        Kind::BlockInfluence => Box::new(BlockInfluence {
            reference: options.reference,
        }),
        Kind::FluxLite => Box::new(FluxLite),
        Kind::Sensitivity => Box::new(Sensitivity),
        Kind::SensitivityGreedy => Box::new(Greedy),
        Kind::Oracle => Box::new(Oracle),
        Kind::Random => Box::new(Random),
        Kind::RandomSearch => Box::new(RandomSearch {
            masks: options.masks.unwrap_or(search.masks),
            quantile: options.quantile.unwrap_or(search.quantile),
        }),
        Kind::Magnitude => Box::new(Magnitude),
    };
    Some(criterion)
}
