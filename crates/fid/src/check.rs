//! What can be refused before the network runs: 50,000 images take it hours.

use crate::evaluate::{NO_ROWS, check_rows};
use crate::{Error, ImageFeatures, Options, Provenance, Result, StoredStatistics};

/// Fewer samples than this are refused: the bias of an FID over 2048 features is then many times what it measures.
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

/// What is known of a reference before the features of its images are.
#[derive(Debug, Clone, Copy)]
pub struct KnownReference<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its statistics, where there are any.
    pub statistics: Option<&'a StoredStatistics>,
    /// Its images, where there are any that the metrics need.
    pub images: Option<Known<'a>>,
}

/// Refuses what [`compare`](crate::compare) would refuse for the origin, the number or the size of images and
/// statistics, and returns what it would warn of for them. `samples` are the shards of one set.
///
/// # Errors
/// When there are fewer than [`FEWEST`] images and nothing forces, shards or sides come from different networks,
/// preprocessing or (shards) sizes, statistics are not of Inception's features, or a metric needs more images.
pub fn check(
    reference: &KnownReference<'_>,
    samples: &[Known<'_>],
    options: &Options,
) -> Result<Vec<String>> {
    let Some((first, others)) = samples.split_first() else {
        return Err(Error::Refused(
            "no samples were given; give at least one set".into(),
        ));
    };
    let count = samples.iter().map(|s| s.count).sum();
    check_count("samples", count, options.force)?;
    check_shards(first, others)?;
    let mut warnings = Vec::new();
    let sides = [
        reference.statistics.and_then(|s| s.provenance.as_ref()),
        reference.images.map(|images| images.provenance),
    ];
    for provenance in sides.into_iter().flatten() {
        same_network((reference.name, provenance), (first.name, first.provenance))?;
        warnings.extend(size_warning(provenance, first.provenance));
    }
    warnings.dedup();
    match (reference.statistics, reference.images) {
        (Some(statistics), _) => {
            check_dimensions(reference.name, statistics)?;
            if statistics.provenance.is_none() {
                warnings.push("the reference statistics do not say which network and resize made them; only those of ADM, pytorch-fid's TensorFlow-compatible port or `tinyfusion stats` compare (clean-fid's and jax-fid's do not)".into());
            }
            if options.sfid && statistics.spatial.is_none() {
                warnings.push("the reference statistics have no mu_s and sigma_s: no sFID".into());
            }
        }
        (None, Some(images)) => check_count("reference images", images.count, options.force)?,
        (None, None) => {
            return Err(Error::Refused(format!(
                "{}: the reference has neither statistics nor images",
                reference.name
            )));
        }
    }
    let of_reference = reference.images.map(|images| images.count);
    let (config, needs_rows) = (&options.config, options.config.needs_reference_rows());
    check_rows(
        config,
        of_reference,
        count,
        config.inception_score.is_some(),
    )?;
    if of_reference.is_none() && needs_rows {
        warnings.push(NO_ROWS.into());
    }
    if count != PROTOCOL {
        warnings.push(format!(
            "{count} samples; published FIDs are of {PROTOCOL}, and fewer give larger values"
        ));
    }
    Ok(warnings)
}

/// At least [`FEWEST`] of `what`, or `force`.
///
/// # Errors
/// Otherwise, with the counts that are needed.
pub fn check_count(what: &str, n: usize, force: bool) -> Result<()> {
    if n >= FEWEST || force {
        return Ok(());
    }
    Err(Error::Refused(format!(
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
    let pairs = [
        ("weights", &a.weights_sha256, &b.weights_sha256),
        ("preprocessing", &a.preprocessing, &b.preprocessing),
    ];
    match pairs.into_iter().find(|(_, a, b)| a != b) {
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
