use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

use crate::schedule::check_steps;

/// Which timesteps of the trained chain a shorter chain visits.
///
/// Written as a string, as in the public code (`space_timesteps` of improved-diffusion):
///
/// | string | meaning |
/// |---|---|
/// | `""` | all timesteps |
/// | `"250"` | 250 timesteps, evenly spread, the first and the last among them |
/// | `"10,20,30"` | the chain cut in three equal sections with 10, 20 and 30 timesteps |
/// | `"ddim50"` | every k-th timestep from 0, with the smallest k that gives exactly 50 |
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Respacing {
    /// Every timestep.
    #[default]
    All,
    /// Timesteps per section of equal length.
    Sections(Vec<usize>),
    /// A constant integer stride that gives this many timesteps.
    Ddim(usize),
}

impl Respacing {
    /// The timesteps of a chain of `steps` that are visited, ascending and unique.
    pub fn timesteps(&self, steps: usize) -> Result<Vec<usize>> {
        check_steps(steps)?;
        match self {
            Self::All => Ok((0..steps).collect()),
            Self::Ddim(count) => ddim_timesteps(steps, *count),
            Self::Sections(counts) => section_timesteps(steps, counts),
        }
    }
}

fn ddim_timesteps(steps: usize, count: usize) -> Result<Vec<usize>> {
    let stride = (1..=steps).find(|stride| steps.div_ceil(*stride) == count);
    match stride {
        Some(stride) => Ok((0..steps).step_by(stride).collect()),
        None => Err(Error::usage(format!(
            "no integer stride over {steps} timesteps gives exactly {count}; use \"{count}\" for an even spread"
        ))),
    }
}

fn section_timesteps(steps: usize, counts: &[usize]) -> Result<Vec<usize>> {
    if counts.iter().all(|&n| n == 0) {
        return Err(Error::usage("a respaced chain needs at least one timestep"));
    }
    let (size, extra) = (steps / counts.len(), steps % counts.len());
    let sizes = (0..counts.len()).map(|i| size + usize::from(i < extra));
    // Every section first: only counts that fit, whose sum is at most `steps`, may decide how much to reserve.
    for (i, (&count, size)) in counts.iter().zip(sizes.clone()).enumerate() {
        if count > size {
            return Err(Error::usage(format!(
                "section {} of the respacing asks for {count} timesteps but spans only {size} of the chain's {steps}",
                i + 1
            )));
        }
    }
    let mut timesteps = Vec::with_capacity(counts.iter().sum());
    let mut start = 0;
    for (&count, size) in counts.iter().zip(sizes) {
        let stride = if count <= 1 {
            1.0
        } else {
            (size - 1) as f64 / (count - 1) as f64
        };
        // Added up, not multiplied, and rounded half to even: as the reference does, so that the
        // timesteps agree exactly.
        let mut at = 0.0f64;
        for _ in 0..count {
            timesteps.push(start + at.round_ties_even() as usize);
            at += stride;
        }
        start += size;
    }
    Ok(timesteps)
}

impl FromStr for Respacing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let count = |part: &str| {
            part.trim().parse::<usize>().map_err(|_| {
                Error::usage(format!(
                    "respacing \"{text}\": `{part}` is not a number of timesteps; expected \"\" (all), \"250\", \
                     \"10,20,30\" or \"ddim50\""
                ))
            })
        };
        match text.strip_prefix("ddim") {
            Some(rest) => Ok(Self::Ddim(count(rest)?)),
            None if text.is_empty() => Ok(Self::All),
            None => Ok(Self::Sections(
                text.split(',').map(count).collect::<Result<_>>()?,
            )),
        }
    }
}

impl fmt::Display for Respacing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => Ok(()),
            Self::Ddim(count) => write!(f, "ddim{count}"),
            Self::Sections(counts) => {
                let parts: Vec<String> = counts.iter().map(usize::to_string).collect();
                f.write_str(&parts.join(","))
            }
        }
    }
}

impl TryFrom<String> for Respacing {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Respacing> for String {
    fn from(respacing: Respacing) -> Self {
        respacing.to_string()
    }
}
