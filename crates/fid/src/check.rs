//! What can be refused before the network runs: 50,000 images take it hours.

use crate::evaluate::{check_rows, kid_fitted};
use crate::provenance::add_new;
use crate::{Config, Error, ImageFeatures, Options, Provenance, Result, StoredStatistics};

/// Fewer images than this are refused: the bias of an FID over 2048 features is then many times what it measures.
pub const FEWEST: usize = 1000;

/// Samples behind published numbers; at other counts FID has another bias.
pub const PROTOCOL: usize = 50_000;

/// What is known of images before their features are.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Their name in messages.
    pub name: &'a str,
    /// Where their features come from, or will.
    pub provenance: &'a Provenance,
    /// Number of images.
    pub count: usize,
}

/// What is known of a side before the features of its images are. With statistics, they decide FID and sFID, and the
/// images the other metrics.
#[derive(Debug, Clone)]
pub struct KnownSide<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its statistics, where there are any.
    pub statistics: Option<&'a StoredStatistics>,
    /// Its images, where there are any that the metrics need: the shards of one set.
    pub images: Vec<Known<'a>>,
}

impl KnownSide<'_> {
    /// Rows for the metrics that compare single images.
    fn rows(&self) -> Option<usize> {
        (!self.images.is_empty()).then(|| self.images.iter().map(|images| images.count).sum())
    }

    /// Images behind its FID, where known.
    fn count(&self) -> Option<usize> {
        match self.statistics {
            Some(statistics) => statistics.pool.n().map(|n| n as usize),
            None => self.rows(),
        }
    }

    /// Every origin that is known, with a name for messages.
    fn origins(&self) -> impl Iterator<Item = (&str, &Provenance)> {
        let stored = self.statistics.and_then(|s| s.provenance.as_ref());
        let stored = stored.map(|provenance| (self.name, provenance));
        let images = self
            .images
            .iter()
            .map(|known| (known.name, known.provenance));
        stored.into_iter().chain(images)
    }
}

/// What [`check`] has nothing against.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Checked {
    /// What was asked for without all that cannot be computed.
    pub options: Options,
    /// What to know before quoting a number.
    pub warnings: Vec<String>,
}

/// Refuses what [`compare`](crate::compare) would refuse for the origin, the number or the size of images and
/// statistics, and returns what it would compute and warn of.
///
/// # Errors
/// When there are fewer than [`FEWEST`] images on a side and nothing forces, shards or sides come from different
/// networks, preprocessing or (shards) sizes, statistics are not of Inception's features, a metric needs more images,
/// or one that was asked for by name cannot be computed.
pub fn check(
    reference: &KnownSide<'_>,
    samples: &KnownSide<'_>,
    options: &Options,
) -> Result<Checked> {
    for side in [samples, reference] {
        if side.statistics.is_none() && side.images.is_empty() {
            return Err(Error::Refused(format!(
                "{}: neither statistics nor images were given",
                side.name
            )));
        }
    }
    for (side, images, statistics) in [
        (samples, "samples", "images behind the samples' statistics"),
        (
            reference,
            "reference images",
            "images behind the reference statistics",
        ),
    ] {
        if let Some(count) = side.count() {
            let what = if side.statistics.is_some() {
                statistics
            } else {
                images
            };
            check_count(what, count, options.force)?;
        }
    }
    let mut warnings = Vec::new();
    for side in [reference, samples] {
        if let Some((first, others)) = side.images.split_first() {
            check_shards(first, others)?;
        }
        for (_, provenance) in side.origins() {
            add_new(&mut warnings, &provenance.warnings);
        }
    }
    let first = samples.origins().next();
    if let Some(first) = first {
        for other in reference.origins().chain(samples.origins().skip(1)) {
            same_network(other, first)?;
        }
        for (_, provenance) in reference.origins() {
            add_new(&mut warnings, &size_warning(provenance, first.1));
        }
    }
    for (side, name) in [(reference, "reference"), (samples, "samples'")] {
        let Some(statistics) = side.statistics else {
            continue;
        };
        check_dimensions(side.name, statistics)?;
        add_new(&mut warnings, &statistics.warnings);
        if statistics.provenance.is_none() {
            warnings.push(format!("the {name} statistics do not say which network and resize made them; only those of ADM, torch-fidelity or `tinyfusion stats` compare (pytorch-fid, clean-fid and jax-fid resize differently)"));
        }
    }
    if samples.statistics.is_some() {
        warnings.push("FID and sFID are of the samples' stored mu and sigma, as ADM's evaluator has it, not of images beside them".into());
    }
    let options = possible(reference, samples, options, &mut warnings)?;
    let config = &options.config;
    check_rows(
        config,
        reference.rows(),
        samples.rows(),
        config.inception_score.is_some(),
    )?;
    match samples.count() {
        Some(count) if count != PROTOCOL => warnings.push(format!(
            "{count} samples; published FIDs are of {PROTOCOL}, and fewer give larger values"
        )),
        _ => {}
    }
    match reference.count() {
        Some(count) if count < PROTOCOL => warnings.push(format!(
            "the reference's FID is over {count} images; published ones compare with the whole training set (for ImageNet the stored mu and sigma of 1,281,167 images, not the 10,000 images beside them)"
        )),
        _ => {}
    }
    Ok(Checked { options, warnings })
}

/// `options` without what the two sides do not allow, which is warned of or, where it was named, an error.
fn possible(
    reference: &KnownSide<'_>,
    samples: &KnownSide<'_>,
    options: &Options,
    warnings: &mut Vec<String>,
) -> Result<Options> {
    let mut left = options.clone();
    let mut missing = Vec::new();
    let spatial = |side: &KnownSide<'_>, name: &str| {
        let without = side.statistics.is_some_and(|s| s.spatial.is_none());
        without.then(|| format!("the {name} statistics have no mu_s and sigma_s"))
    };
    if let Some(why) = spatial(reference, "reference").or_else(|| spatial(samples, "samples'"))
        && std::mem::take(&mut left.sfid)
    {
        missing.push(format!("no sFID: {why}"));
    }
    let config = &mut left.config;
    let rows = match (reference.rows(), samples.rows()) {
        (_, None) => Err("the samples have statistics but no images"),
        (None, _) => Err("the reference has statistics but no images"),
        (Some(reference), Some(samples)) => Ok(reference.min(samples)),
    };
    if samples.rows().is_none() && config.inception_score.take().is_some() {
        missing.push("no Inception Score: the samples have statistics but no images".into());
    }
    match rows {
        Err(why) => {
            if config.precision_recall.take().is_some() {
                missing.push(format!("no precision and recall: {why}"));
            }
            if config.kid.take().is_some() {
                missing.push(format!("no KID: {why}"));
            }
        }
        Ok(rows) => match &config.kid {
            Some(kid) if options.named && kid.subset_size > rows => missing.push(format!(
                "no KID: its subsets have {} rows, and one side has only {rows}",
                kid.subset_size
            )),
            _ => missing.extend(kid_fitted(config, rows)),
        },
    }
    if options.named && !missing.is_empty() {
        return Err(Error::Impossible(missing.join("; ")));
    }
    warnings.append(&mut missing);
    Ok(left)
}

impl Config {
    /// The settings with KID's subsets no larger than the smaller side of `rows`, and the warning that goes with it: for
    /// callers to whom some KID is better than none. [`evaluate`](crate::evaluate) refuses larger subsets.
    pub fn fitted(mut self, rows: usize) -> (Self, Option<String>) {
        let warning = kid_fitted(&mut self, rows);
        (self, warning)
    }
}

/// At least [`FEWEST`] of `what`, or `force`.
///
/// # Errors
/// Otherwise, with the counts that are needed.
pub fn check_count(what: &str, n: usize, force: bool) -> Result<()> {
    if n >= FEWEST || force {
        return Ok(());
    }
    Err(Error::TooFewImages(format!(
        "{n} {what}, expected at least {FEWEST} (published: {PROTOCOL}): over so few an FID of {} features says nothing; draw more, or force it to see the machinery run",
        ImageFeatures::POOL
    )))
}
/// Shards are of one network, preprocessing and size of images.
///
/// # Errors
/// Otherwise, with the names of two that differ.
pub fn check_shards(first: &Known<'_>, others: &[Known<'_>]) -> Result<()> {
    for other in others {
        same_network(
            (first.name, first.provenance),
            (other.name, other.provenance),
        )?;
        same_size(
            (first.name, first.provenance),
            (other.name, other.provenance),
        )?;
    }
    Ok(())
}

/// Both are of one network and preprocessing, or an error that names both.
pub(crate) fn same_network(
    (first, a): (&str, &Provenance),
    (second, b): (&str, &Provenance),
) -> Result<()> {
    let different = if !a.same_weights(b) {
        Some(("weights", &a.weights_sha256, &b.weights_sha256))
    } else if a.preprocessing != b.preprocessing {
        Some(("preprocessing", &a.preprocessing, &b.preprocessing))
    } else {
        None
    };
    match different {
        None => Ok(()),
        Some((what, a, b)) => Err(Error::Refused(format!(
            "{first} and {second} are of different {what} (`{a}` and `{b}`), so their features do not compare; compute both again with the same weights"
        ))),
    }
}

/// Shards of one set hold images of one size.
fn same_size((first, a): (&str, &Provenance), (second, b): (&str, &Provenance)) -> Result<()> {
    if a.size == b.size {
        return Ok(());
    }
    let ([h, w], [height, width]) = (a.size, b.size);
    Err(Error::Refused(format!(
        "{first} holds images of {w} x {h} and {second} of {width} x {height}, but shards are parts of one set, which has one size; crop and resize both in the same way"
    )))
}

fn check_dimensions(name: &str, statistics: &StoredStatistics) -> Result<()> {
    let spatial = statistics
        .spatial
        .as_ref()
        .map(|s| ("mu_s", s.columns(), ImageFeatures::SPATIAL));
    let pool = ("mu", statistics.pool.columns(), ImageFeatures::POOL);
    match [Some(pool), spatial]
        .into_iter()
        .flatten()
        .find(|(_, found, expected)| found != expected)
    {
        None => Ok(()),
        Some((key, found, expected)) => Err(Error::Refused(format!(
            "{name}: `{key}` has {found} values, expected the {expected} of Inception's features; the statistics are of another network, compute them with `tinyfusion stats`"
        ))),
    }
}

fn size_warning(reference: &Provenance, samples: &Provenance) -> Option<String> {
    let ([h, w], [height, width]) = (reference.size, samples.size);
    ([h, w] != [height, width]).then(|| {
        format!("the reference images are {w} x {h}, the samples {width} x {height}: their difference in sharpness counts as distance")
    })
}
