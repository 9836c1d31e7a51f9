use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tinyfusion_core::{BlockLayout, Error, Group, Result};

/// How many blocks of which groups are kept, as users write it.
///
/// * `2:4`: groups of 4 blocks of which 2 are kept, repeated to fill the depth;
/// * `2:4x7`: exactly 7 such groups;
/// * `2:4,3:4x2`: the groups as listed.
///
/// In files it is that text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(Kind);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Kind {
    /// One group that repeats.
    Fill(Ratio),
    /// Every group, as runs of equal ones.
    Listed(Vec<(Ratio, usize)>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ratio {
    n: usize,
    m: usize,
}

impl Default for Pattern {
    /// `1:2`, with which the paper's learned masks recover best.
    fn default() -> Self {
        Self(Kind::Fill(Ratio { n: 1, m: 2 }))
    }
}

impl Pattern {
    /// The groups for a network, in order. An error if they do not fit its depth, or if a group would
    /// cross the bridge between two stages.
    pub fn groups(&self, layout: &BlockLayout) -> Result<Vec<Group>> {
        match &self.0 {
            Kind::Fill(ratio) => self.fill(*ratio, layout),
            Kind::Listed(runs) => self.listed(runs, layout),
        }
    }

    fn fill(&self, ratio: Ratio, layout: &BlockLayout) -> Result<Vec<Group>> {
        let mut groups = Vec::new();
        for (stage, blocks) in layout.ranges().enumerate() {
            if blocks.len() % ratio.m != 0 {
                let what = if layout.stage_depths().len() == 1 {
                    format!("a depth of {} blocks", blocks.len())
                } else {
                    format!(
                        "stage {stage} with its {} blocks (groups never cross stages)",
                        blocks.len()
                    )
                };
                return Err(Error::usage(format!(
                    "pattern `{self}` does not fit {what}: it is no multiple of {}; list the groups instead, for \
                     example `1:2,1:1`",
                    ratio.m
                )));
            }
            groups.extend(std::iter::repeat_n(ratio.group(), blocks.len() / ratio.m));
        }
        Ok(groups)
    }

    fn listed(&self, runs: &[(Ratio, usize)], layout: &BlockLayout) -> Result<Vec<Group>> {
        // Before anything is expanded: a count may be absurd.
        let depth = layout.depth();
        let covered = runs.iter().try_fold(0usize, |sum, (ratio, times)| {
            sum.checked_add(ratio.m.checked_mul(*times)?)
        });
        if covered != Some(depth) {
            let covered = covered.map_or("too many".into(), |n| n.to_string());
            return Err(Error::usage(format!(
                "pattern `{self}` does not fit: its groups cover {covered} blocks, the network has {depth}"
            )));
        }
        let groups: Vec<Group> = runs
            .iter()
            .flat_map(|(ratio, times)| std::iter::repeat_n(ratio.group(), *times))
            .collect();
        for (stage, blocks) in layout.ranges().enumerate() {
            let mut start = 0;
            for (g, group) in groups.iter().enumerate() {
                let end = start + group.m;
                if (start + 1..end).contains(&blocks.end) {
                    return Err(Error::usage(format!(
                        "pattern `{self}` does not fit: group {g} spans the blocks {start} to {}, but stage {stage} ends \
                         with block {} and groups never cross stages",
                        end - 1,
                        blocks.end - 1
                    )));
                }
                start = end;
            }
        }
        Ok(groups)
    }
}

impl Ratio {
    fn group(self) -> Group {
        Group {
            n: self.n,
            m: self.m,
        }
    }
}

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |part: &str, what: &str| {
            Error::usage(format!(
                "pattern `{text}`: `{part}` {what}; write N:M (keep N of M blocks), N:MxK (K such groups) or a list \
                 such as `2:4,3:4`"
            ))
        };
        let number = |part: &str, digits: &str| {
            // `parse` alone would take a sign.
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return Err(wrong(
                    part,
                    &format!("has `{digits}` where a number is expected"),
                ));
            }
            digits
                .parse::<usize>()
                .map_err(|_| wrong(part, "has too large a number"))
        };
        let mut parts = Vec::new();
        for part in text.split(',').map(str::trim) {
            let (n, rest) = part
                .split_once(':')
                .ok_or_else(|| wrong(part, "has no `:`"))?;
            let (m, times) = match rest.split_once('x') {
                None => (rest, None),
                Some((m, times)) => (m, Some(number(part, times)?)),
            };
            let ratio = Ratio {
                n: number(part, n)?,
                m: number(part, m)?,
            };
            if ratio.n == 0 || ratio.m == 0 || times == Some(0) {
                return Err(wrong(part, "has a zero; a group keeps at least one block"));
            }
            if ratio.n > ratio.m {
                return Err(wrong(
                    part,
                    &format!("keeps {} of only {} blocks", ratio.n, ratio.m),
                ));
            }
            parts.push((ratio, times));
        }
        if let [(ratio, None)] = parts[..] {
            return Ok(Self(Kind::Fill(ratio)));
        }
        // Equal neighbours become one run, so that patterns of equal groups are equal.
        let mut runs: Vec<(Ratio, usize)> = Vec::new();
        for (ratio, times) in parts {
            let times = times.unwrap_or(1);
            match runs.last_mut() {
                Some((last, count)) if *last == ratio => {
                    *count = count
                        .checked_add(times)
                        .ok_or_else(|| wrong(text, "has too many groups"))?;
                }
                _ => runs.push((ratio, times)),
            }
        }
        Ok(Self(Kind::Listed(runs)))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Fill(Ratio { n, m }) => write!(f, "{n}:{m}"),
            Kind::Listed(runs) => {
                for (i, (Ratio { n, m }, times)) in runs.iter().enumerate() {
                    let comma = if i > 0 { "," } else { "" };
                    write!(f, "{comma}{n}:{m}")?;
                    // Alone, `2:4` would repeat.
                    if *times > 1 || runs.len() == 1 {
                        write!(f, "x{times}")?;
                    }
                }
                Ok(())
            }
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}
