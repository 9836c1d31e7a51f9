//! Seeds of one method taken together.

use crate::results::ResultRow;

/// The rows of one method, which differ in their seeds.
#[derive(Debug, Clone)]
pub struct Group<'a> {
    /// See [`ResultRow::group`].
    pub id: String,
    /// For people: a row's name without its seed.
    pub name: String,
    /// At least one, in the order of the results.
    pub rows: Vec<&'a ResultRow>,
}

impl<'a> Group<'a> {
    /// The first row: what all rows of the group have in common can be read off it.
    pub fn first(&self) -> &'a ResultRow {
        self.rows[0]
    }

    /// Rows that have no score, in words: `1 diverged, 1 failed`; none if there are none.
    pub fn lost(&self) -> Option<String> {
        let diverged = self.rows.iter().filter(|r| r.diverged()).count();
        let failed = self
            .rows
            .iter()
            .filter(|r| r.failed.is_some() && !r.diverged())
            .count();
        let said: Vec<String> = [(diverged, "diverged"), (failed, "failed")]
            .into_iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, what)| format!("{n} {what}"))
            .collect();
        (!said.is_empty()).then(|| said.join(", "))
    }
}

/// The groups of `rows`, in the order in which they begin.
pub fn groups(rows: &[ResultRow]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for row in rows {
        let id = row.group();
        match groups.iter_mut().find(|g| g.id == id) {
            Some(group) => group.rows.push(row),
            None => groups.push(Group {
                id,
                name: without_seed(&row.name),
                rows: vec![row],
            }),
        }
    }
    groups
}

/// `random 1:2, seed 3, fine-tuned` as `random 1:2, fine-tuned`.
fn without_seed(name: &str) -> String {
    let seed = |part: &&str| {
        let number = part.trim().strip_prefix("seed ");
        !number.is_some_and(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_digit()))
    };
    name.split(',').filter(seed).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_a_method_are_one_group() {
        let results = crate::sample::results();
        let groups = groups(&results.rows);
        assert_eq!(groups.len(), results.rows.len() - 3);
        let random = groups.iter().find(|g| g.id == "random-1-2-ft").unwrap();
        assert_eq!(random.rows.len(), 4);
        assert_eq!(random.name, "random 1:2, fine-tuned");
        assert_eq!(random.lost(), None);
    }

    #[test]
    fn only_a_seed_is_taken_out_of_a_name() {
        assert_eq!(without_seed("a, seed 12"), "a");
        assert_eq!(without_seed("seedling, seed x, b"), "seedling, seed x, b");
    }

    #[test]
    fn what_was_lost_is_counted() {
        let mut rows = crate::sample::results().rows;
        rows[2].held_out_loss = None;
        let groups = groups(&rows);
        assert_eq!(groups[2].lost().as_deref(), Some("1 diverged"));
    }
}
