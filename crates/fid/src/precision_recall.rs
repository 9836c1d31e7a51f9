use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::distances::Points;
use crate::features::ranges;
use crate::{Error, FeatureMatrix, Result};

/// Candidates kept beyond the neighbour asked for, so that rounding cannot hide the right one.
const SPARE: usize = 12;

/// Settings of [`precision_recall`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionRecallConfig {
    /// Which nearest other row of its own set gives a row its radius (3 in ADM).
    pub neighbour: usize,
    /// Rows per block of distances. Memory per thread is about 4·block² bytes; the
    /// result does not depend on it.
    pub block: usize,
}

impl Default for PrecisionRecallConfig {
    fn default() -> Self {
        Self {
            neighbour: 3,
            block: 1024,
        }
    }
}

/// Improved precision and recall, with what they were counted from.
#[derive(Debug, Clone, PartialEq)]
pub struct PrecisionRecall {
    /// Fraction of samples within the radius of at least one reference row.
    pub precision: f64,
    /// Fraction of reference rows within the radius of at least one sample.
    pub recall: f64,
    /// Squared radius of each reference row.
    pub reference_radii_squared: Vec<f64>,
    /// Squared radius of each sample.
    pub sample_radii_squared: Vec<f64>,
    /// Whether each reference row is within a sample's radius.
    pub reference_covered: Vec<bool>,
    /// Whether each sample is within a reference row's radius.
    pub sample_covered: Vec<bool>,
}

/// Improved precision and recall (Kynkäänniemi et al. 2019) as ADM's evaluator defines them: the radius
/// of a row is the distance to its k-th nearest other row of the same set (duplicates count), and
/// "within" includes the border.
///
/// Distances are squared, block by block on all cores, with products in f32. A comparison or neighbour that lies
/// within the bound on the rounding of |u|² − 2u·v + |v|² is decided by the sum of squared differences, so ties and
/// duplicates come out as in exact arithmetic, whatever the block size and number of threads. (ADM
/// computes distances in float16 on a GPU; its published values differ by some 0.001 to 0.0025.)
///
/// # Errors
/// When a set has no k-th other row, the dimensions differ, or a setting is 0.
pub fn precision_recall(
    reference: FeatureMatrix<'_>,
    samples: FeatureMatrix<'_>,
    config: &PrecisionRecallConfig,
) -> Result<PrecisionRecall> {
    reference.same_columns(&samples)?;
    for set in [reference, samples] {
        check(config, set.rows())?;
    }
    let &PrecisionRecallConfig { neighbour, block } = config;
    let (reference, samples) = (Points::new(reference), Points::new(samples));
    let reference_radii_squared = radii(&reference, neighbour, block);
    let sample_radii_squared = radii(&samples, neighbour, block);
    let (reference_covered, sample_covered) = covered(
        &reference,
        &reference_radii_squared,
        &samples,
        &sample_radii_squared,
        block,
    );
    Ok(PrecisionRecall {
        precision: fraction(&sample_covered),
        recall: fraction(&reference_covered),
        reference_radii_squared,
        sample_radii_squared,
        reference_covered,
        sample_covered,
    })
}

/// The settings make sense for a set of so many rows.
pub(crate) fn check(config: &PrecisionRecallConfig, rows: usize) -> Result<()> {
    let &PrecisionRecallConfig { neighbour, block } = config;
    if neighbour == 0 || block == 0 {
        return Err(Error::Config(format!(
            "precision and recall need a neighbour and a block of at least 1, found {neighbour} and {block}; the usual ones are 3 and 1024"
        )));
    }
    if rows > neighbour {
        return Ok(());
    }
    Err(Error::TooFewRows {
        what: "precision and recall",
        expected: neighbour.saturating_add(1),
        found: rows,
        advice: "add images to that side or take a nearer neighbour",
    })
}

/// Squared distance of every point to its `neighbour`-th nearest other point.
fn radii(points: &Points<'_>, neighbour: usize, block: usize) -> Vec<f64> {
    let n = points.len();
    let blocks = tasks(n, block);
    let fresh = |rows: &Range<usize>| -> Vec<Nearest> {
        let nearest = |_| Nearest::new(neighbour + 1 + SPARE);
        rows.clone().map(nearest).collect()
    };
    let nearest: Vec<Mutex<Vec<Nearest>>> =
        blocks.iter().map(|rows| Mutex::new(fresh(rows))).collect();
    // Distances are symmetric: a pair of blocks serves the rows of both.
    let pairs: Vec<(usize, usize)> = (0..blocks.len())
        .flat_map(|a| (a..blocks.len()).map(move |b| (a, b)))
        .collect();
    pairs.into_par_iter().with_max_len(1).for_each(|(a, b)| {
        let (rows, others) = (&blocks[a], &blocks[b]);
        let distances = points.distances(rows.clone(), points, others.clone());
        let (mut of_rows, mut of_others) = (fresh(rows), fresh(others));
        let mut line = Vec::with_capacity(others.len());
        for (row, i) in rows.clone().enumerate() {
            distances.of(row, &mut line); // (others)
            of_rows[row].offer(others.start, &line);
            if a != b {
                for (other, &distance) in of_others.iter_mut().zip(&line) {
                    other.offer(i, &[distance]);
                }
            }
        }
        merge(&nearest[a], of_rows);
        if a != b {
            merge(&nearest[b], of_others);
        }
    });
    let nearest: Vec<Nearest> = nearest
        .into_iter()
        .flat_map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect();
    nearest
        .into_par_iter()
        .enumerate()
        .map(|(i, nearest)| {
            let candidates = nearest.candidates(n, neighbour, points.rounding_to_any(i, points));
            radius(points, i, neighbour, candidates)
        })
        .collect()
}

/// Adds what was found in another block.
fn merge(all: &Mutex<Vec<Nearest>>, found: Vec<Nearest>) {
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    for (all, found) in all.iter_mut().zip(found) {
        for (distance, j) in found.found {
            all.offer(j, &[distance]);
        }
    }
}

/// Exact squared distance of point `i` to its `neighbour`-th nearest other point among `candidates`
/// (which include `i` itself, at distance 0), or among all points where there are none.
fn radius(points: &Points<'_>, i: usize, neighbour: usize, candidates: Option<Vec<usize>>) -> f64 {
    let mut nearest = Nearest::new(neighbour + 1);
    let all = 0..if candidates.is_some() {
        0
    } else {
        points.len()
    };
    for j in candidates.into_iter().flatten().chain(all) {
        nearest.offer(j, &[points.exact(i, points, j)]);
        // Among many duplicates the radius is known to be 0 long before the last row.
        if nearest.farthest() == 0.0 {
            break;
        }
    }
    nearest.farthest()
}

/// Which reference rows lie within a sample's radius, and which samples within a reference row's.
fn covered(
    reference: &Points<'_>,
    reference_radii: &[f64],
    samples: &Points<'_>,
    sample_radii: &[f64],
    block: usize,
) -> (Vec<bool>, Vec<bool>) {
    let parts: Vec<(Vec<bool>, Vec<bool>)> = tasks(reference.len(), block)
        .into_par_iter()
        .map(|rows| {
            let mut reference_covered = vec![false; rows.len()];
            let mut sample_covered = vec![false; samples.len()];
            let mut line = Vec::new();
            for others in ranges(samples.len(), block) {
                let distances = reference.distances(rows.clone(), samples, others.clone());
                for (row, i) in rows.clone().enumerate() {
                    distances.of(row, &mut line); // (others)
                    // Almost all pairs are far apart: told by one comparison, with a bound that serves the whole row.
                    let rounding = reference.rounding_to_any(i, samples);
                    let radius = reference_radii[i];
                    for (&distance, j) in line.iter().zip(others.clone()) {
                        if distance > radius.max(sample_radii[j]) + rounding {
                            continue;
                        }
                        let within = |radius: f64| {
                            let gap = distance - radius;
                            if gap.abs() <= reference.rounding(i, samples, j) {
                                reference.exact(i, samples, j) <= radius
                            } else {
                                gap < 0.0
                            }
                        };
                        sample_covered[j] = sample_covered[j] || within(reference_radii[i]);
                        reference_covered[row] = reference_covered[row] || within(sample_radii[j]);
                    }
                }
            }
            (reference_covered, sample_covered)
        })
        .collect();
    let mut reference_covered = Vec::with_capacity(reference.len());
    let mut sample_covered = vec![false; samples.len()];
    for (rows, others) in parts {
        reference_covered.extend(rows);
        sample_covered
            .iter_mut()
            .zip(others)
            .for_each(|(all, part)| *all |= part);
    }
    (reference_covered, sample_covered)
}

/// The rows cut into parallel tasks: blocks, or smaller pieces where there would be fewer than threads.
fn tasks(rows: usize, block: usize) -> Vec<Range<usize>> {
    let share = rows.div_ceil(2 * rayon::current_num_threads()).max(16);
    ranges(rows, block.min(share)).collect()
}

fn fraction(covered: &[bool]) -> f64 {
    covered.iter().filter(|&&covered| covered).count() as f64 / covered.len() as f64
}

/// The nearest points of one row seen so far, sorted by distance.
struct Nearest {
    keep: usize,
    found: Vec<(f64, usize)>,
    /// [`farthest`](Self::farthest), at hand.
    limit: f64,
}

impl Nearest {
    fn new(keep: usize) -> Self {
        Self {
            keep,
            found: Vec::new(),
            limit: f64::INFINITY,
        }
    }

    /// Takes in the points `first..` at `distances`.
    fn offer(&mut self, first: usize, distances: &[f64]) {
        for (j, &distance) in (first..).zip(distances) {
            if distance >= self.limit {
                continue;
            }
            let place = self.found.partition_point(|&(other, _)| other <= distance);
            self.found.insert(place, (distance, j));
            self.found.truncate(self.keep);
            self.limit = self.farthest();
        }
    }

    /// Largest distance kept; infinite while there is room.
    fn farthest(&self) -> f64 {
        if self.found.len() < self.keep {
            f64::INFINITY
        } else {
            self.found
                .last()
                .map_or(f64::INFINITY, |&(distance, _)| distance)
        }
    }

    /// Points that surely include the `neighbour` + 1 nearest ones, though every distance may be off
    /// by `rounding`; none when more would be needed than were kept.
    fn candidates(&self, points: usize, neighbour: usize, rounding: f64) -> Option<Vec<usize>> {
        let complete = self.found.len() == points;
        let clear = self.farthest() - self.found.get(neighbour)?.0 > 2.0 * rounding;
        (complete || clear).then(|| self.found.iter().map(|&(_, j)| j).collect())
    }
}
