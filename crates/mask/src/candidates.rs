use tinyfusion_core::{Error, Group, Result};

/// Most candidates that a group may have. 7:14 has 3432; 14:28 would have 40 million, each with a logit.
pub const MAX_CANDIDATES: usize = 100_000;

/// C(M, N), the number of masks of a group, or `None` if it does not fit a `usize`.
pub fn candidate_count(group: Group) -> Option<usize> {
    let Group { n, m } = group;
    if n > m {
        return Some(0);
    }
    // After step i the product is C(m - n' + i, i): every division is exact.
    let fewer = n.min(m - n);
    (1..=fewer).try_fold(1usize, |count, i| {
        Some(count.checked_mul(m - fewer + i)? / i)
    })
}

/// All masks of a group as kept indices within it, each ascending, in lexicographic order (that of
/// Python's `itertools.combinations`). At most [`MAX_CANDIDATES`].
pub fn candidates(group: Group) -> Result<Vec<Vec<usize>>> {
    let Group { n, m } = group;
    if n == 0 || n > m {
        return Err(Error::usage(format!(
            "a group must keep 1 to {m} of its {m} blocks, not {n}"
        )));
    }
    let count = candidate_count(group).filter(|c| *c <= MAX_CANDIDATES).ok_or_else(|| {
        Error::usage(format!(
            "a group {n}:{m} has {} masks, at most {MAX_CANDIDATES} can be learned; use smaller groups",
            candidate_count(group).map_or("too many".into(), |c| c.to_string())
        ))
    })?;
    let mut all = Vec::with_capacity(count);
    let mut kept: Vec<usize> = (0..n).collect();
    loop {
        all.push(kept.clone());
        // The rightmost index that can still move; those behind it close up.
        let Some(at) = (0..n).rev().find(|&i| kept[i] < m - n + i) else {
            return Ok(all);
        };
        kept[at] += 1;
        for i in at + 1..n {
            kept[i] = kept[i - 1] + 1;
        }
    }
}
