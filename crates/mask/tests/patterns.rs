//! Patterns, candidates, schedules and the masks that need no learning.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tinyfusion_core::{BlockLayout, Group, Selection};
use tinyfusion_mask::{
    Linear, MAX_CANDIDATES, Pattern, candidate_count, candidates, oracle_selection,
    random_selection,
};

fn pairs(pattern: &str, stages: &[usize]) -> Result<Vec<(usize, usize)>, String> {
    let pattern: Pattern = pattern
        .parse()
        .map_err(|e: tinyfusion_core::Error| e.to_string())?;
    let groups = pattern
        .groups(&BlockLayout::stages(stages))
        .map_err(|e| e.to_string())?;
    Ok(groups.iter().map(|g| (g.n, g.m)).collect())
}

#[test]
fn patterns_mean_what_they_say() {
    assert_eq!(pairs("1:2", &[6]).unwrap(), [(1, 2); 3]);
    assert_eq!(pairs("2:4", &[28]).unwrap(), [(2, 4); 7]);
    assert_eq!(pairs("7:14", &[28]).unwrap(), [(7, 14); 2]);
    assert_eq!(pairs("2:4x7", &[28]).unwrap(), [(2, 4); 7]);
    assert_eq!(
        pairs("2:4,2:4,3:4", &[12]).unwrap(),
        [(2, 4), (2, 4), (3, 4)]
    );
    assert_eq!(
        pairs(" 2:4x2 , 3:5 ", &[13]).unwrap(),
        [(2, 4), (2, 4), (3, 5)]
    );
    assert_eq!(pairs("2:4", &[16, 16]).unwrap(), [(2, 4); 8]);
    assert_eq!(pairs("1:2,3:3", &[2, 3]).unwrap(), [(1, 2), (3, 3)]);
}

#[test]
fn patterns_that_make_no_sense_are_explained() {
    for (pattern, stages, part) in [
        ("", &[4][..], "has no `:`"),
        ("2", &[4], "has no `:`"),
        ("0:2", &[4], "has a zero"),
        ("0:0", &[4], "has a zero"),
        ("1:2x0", &[4], "has a zero"),
        ("3:2", &[4], "keeps 3 of only 2"),
        ("a:2", &[4], "has `a` where a number"),
        ("+1:2", &[4], "has `+1`"),
        ("1:-2", &[4], "has `-2`"),
        ("1:2,", &[4], "`` has no `:`"),
        ("1:2x", &[4], "has `` where"),
        ("1:99999999999999999999999", &[4], "too large"),
        (
            "1:4",
            &[6],
            "pattern `1:4` does not fit a depth of 6 blocks",
        ),
        ("2:4", &[16, 6], "stage 1 with its 6 blocks"),
        ("2:4x6", &[28], "cover 24 blocks, the network has 28"),
        ("2:4x9223372036854775807", &[28], "cover too many blocks"),
        ("2:4,3:4", &[4], "cover 8 blocks, the network has 4"),
        (
            "2:3,1:3",
            &[2, 4],
            "group 0 spans the blocks 0 to 2, but stage 0 ends with block 1",
        ),
    ] {
        let error = pairs(pattern, stages).expect_err(pattern);
        assert!(error.contains(part), "{pattern}: {error}");
    }
}

#[test]
fn candidates_are_all_subsets_in_order() {
    assert_eq!(
        candidates(Group { n: 2, m: 4 }).unwrap(),
        [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    );
    for m in 1..=12 {
        for n in 1..=m {
            let group = Group { n, m };
            let all = candidates(group).unwrap();
            assert_eq!(Some(all.len()), candidate_count(group));
            // Every bit pattern with n of m bits is there once.
            let expected = (0u32..1 << m)
                .filter(|bits| bits.count_ones() as usize == n)
                .count();
            assert_eq!(all.len(), expected);
            assert!(
                all.windows(2).all(|w| w[0] < w[1]),
                "strictly lexicographic"
            );
            assert!(
                all.iter()
                    .all(|c| c.len() == n && c.windows(2).all(|w| w[0] < w[1]) && c[n - 1] < m)
            );
        }
    }
    assert_eq!(candidate_count(Group { n: 7, m: 14 }), Some(3432));
}

#[test]
fn too_many_candidates_are_an_error_at_once() {
    for (n, m, part) in [
        (14, 28, "40116600 masks"),
        (500, 1000, "too many masks"),
        (0, 4, "not 0"),
        (5, 4, "not 5"),
    ] {
        let error = candidates(Group { n, m }).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(
        candidates(Group {
            n: 1,
            m: MAX_CANDIDATES
        })
        .is_ok()
    );
    assert!(
        candidates(Group {
            n: 1,
            m: MAX_CANDIDATES + 1
        })
        .is_err()
    );
}

#[test]
fn schedules_reach_both_ends() {
    let tau = Linear { from: 4.0, to: 0.1 };
    assert_eq!(
        (
            tau.at(0, 10_000),
            tau.at(9_999, 10_000),
            tau.at(20_000, 10_000)
        ),
        (4.0, 0.1, 0.1)
    );
    assert!((tau.at(5, 11) - 2.05).abs() < 1e-12);
    assert_eq!((tau.at(0, 1), tau.at(0, 0)), (4.0, 4.0));
    assert_eq!(Linear::constant(100.0).at(3, 9), 100.0);
}

#[test]
fn the_oracle_is_bk_sdm() {
    let kept = |stages: &[usize]| oracle_selection(&BlockLayout::stages(stages)).unwrap().kept;
    assert_eq!(
        kept(&[28]),
        [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    );
    assert_eq!(kept(&[4, 4]), [0, 2, 5, 7]);
    assert_eq!(kept(&[6]), [0, 2, 5]);
    assert_eq!(kept(&[5]), [0, 2, 4]);
    assert_eq!(kept(&[3, 3]), [0, 2, 4, 5]);
    assert_eq!(kept(&[1]), [0]);
    assert!(oracle_selection(&BlockLayout::single(0)).is_err());
}

#[test]
fn random_masks_are_uniform_over_the_pattern() {
    let groups = [Group { n: 1, m: 2 }, Group { n: 2, m: 3 }];
    let draws = 6_000;
    let mut counts: BTreeMap<Vec<usize>, usize> = BTreeMap::new();
    for draw in 0..draws {
        *counts
            .entry(random_selection(&groups, 11, draw).unwrap().kept)
            .or_default() += 1;
    }
    assert_eq!(counts.len(), 6);
    // 1000 expected each, with a standard deviation of 29.
    assert!(
        counts.values().all(|c| (850..1150).contains(c)),
        "{counts:?}"
    );
    let again = random_selection(&groups, 11, 3).unwrap();
    assert_eq!(again, random_selection(&groups, 11, 3).unwrap());
    assert_eq!(again.settings["draw"], 3);
    // Far too many masks to list them: only the drawn one is made.
    let all: BTreeSet<Vec<usize>> = (0..20)
        .map(|d| {
            random_selection(&[Group { n: 14, m: 28 }], 0, d)
                .unwrap()
                .kept
        })
        .collect();
    assert_eq!(all.len(), 20);
    assert!(random_selection(&[Group { n: 3, m: 2 }], 0, 0).is_err());
    assert!(random_selection(&[], 0, 0).is_err());
}

fn group() -> impl Strategy<Value = (usize, usize)> {
    (1usize..9).prop_flat_map(|m| (1..=m, Just(m)))
}

/// Patterns as users write them, with spaces and counts in odd places.
fn text() -> impl Strategy<Value = String> {
    let part =
        (group(), prop::option::of(1usize..5), any::<bool>()).prop_map(|((n, m), times, space)| {
            let times = times.map_or(String::new(), |k| format!("x{k}"));
            format!("{}{n}:{m}{times}", if space { " " } else { "" })
        });
    prop::collection::vec(part, 1..6).prop_map(|parts| parts.join(","))
}

proptest! {
    #[test]
    fn every_pattern_round_trips(text in text()) {
        let pattern: Pattern = text.parse().unwrap();
        let shown = pattern.to_string();
        prop_assert_eq!(&shown.parse::<Pattern>().unwrap(), &pattern);
        let json = serde_json::to_string(&pattern).unwrap();
        prop_assert_eq!(&json, &format!("\"{shown}\""));
        prop_assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap(), pattern);
    }

    /// Listed groups come back as listed, whatever the notation, and cover exactly the depth.
    #[test]
    fn listed_groups_are_kept(groups in prop::collection::vec(group(), 2..8)) {
        let text: Vec<String> = groups.iter().map(|(n, m)| format!("{n}:{m}")).collect();
        let depth = groups.iter().map(|g| g.1).sum();
        prop_assert_eq!(pairs(&text.join(","), &[depth]).unwrap(), groups);
        prop_assert!(pairs(&text.join(","), &[depth + 1]).is_err());
    }

    #[test]
    fn nothing_that_is_no_pattern_panics(text in "[0-9:x, +-]{0,12}") {
        if let Ok(pattern) = text.parse::<Pattern>() {
            let _ = pattern.groups(&BlockLayout::stages([7, 5]));
        }
    }

    #[test]
    fn every_selection_validates(groups in prop::collection::vec(group(), 1..8), seed: u64, draw: u64) {
        let groups: Vec<Group> = groups.into_iter().map(|(n, m)| Group { n, m }).collect();
        let selection = random_selection(&groups, seed, draw).unwrap();
        let back = Selection::from_json(&selection.to_json().unwrap()).unwrap();
        prop_assert_eq!(back, selection);
    }

    #[test]
    fn the_oracle_fits_every_network(stages in prop::collection::vec(1usize..20, 1..4)) {
        let selection = oracle_selection(&BlockLayout::stages(stages.clone())).unwrap();
        prop_assert_eq!(selection.depth, stages.iter().sum::<usize>());
        prop_assert_eq!(selection.kept.len(), stages.iter().map(|d| d.div_ceil(2)).sum::<usize>());
    }
}
