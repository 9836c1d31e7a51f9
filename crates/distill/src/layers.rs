use tinyfusion_core::{BlockLayout, Error, Group, Result, Selection};

/// Which blocks of student and teacher are compared when features are distilled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMap {
    student_depth: usize,
    teacher_depth: usize,
    pairs: Vec<(usize, usize)>,
}

impl LayerMap {
    /// Blocks aligned at the ends of the selection's groups: there student and teacher have done the same share
    /// of their work. A student cut by explicit indices has one group, so that only the last blocks are compared.
    pub fn group_ends(selection: &Selection) -> Result<Self> {
        Self::groups(&selection.groups)
    }

    /// Every block of the student with the teacher's block before the next that was kept: the states that the
    /// student's next block was trained on. For masks without groups, as ranked ones are. `layout` is the teacher's.
    pub fn every_block(selection: &Selection, layout: &BlockLayout) -> Result<Self> {
        selection.check_layout(layout)?;
        let kept = &selection.kept;
        let mut pairs = Vec::with_capacity(kept.len());
        for stage in layout.ranges() {
            let here: Vec<usize> = (0..kept.len())
                .filter(|i| stage.contains(&kept[*i]))
                .collect();
            for &i in &here {
                let next = kept.get(i + 1).filter(|next| stage.contains(next));
                pairs.push((i, next.copied().unwrap_or(stage.end) - 1));
            }
        }
        Self::new(kept.len(), selection.depth, pairs)
    }

    /// Blocks aligned at the ends of `groups` of n student blocks and m teacher blocks, whatever the student was cut
    /// from: a student of a quarter of the depth and a teacher of half of it have groups of 1:2.
    pub fn groups(groups: &[Group]) -> Result<Self> {
        let (mut student, mut teacher) = (0, 0);
        let mut pairs = Vec::with_capacity(groups.len());
        for group in groups {
            student += group.n;
            teacher += group.m;
            if group.n > 0 {
                pairs.push((student - 1, teacher - 1));
            }
        }
        Self::new(student, teacher, pairs)
    }

    /// Any pairs (student block, teacher block), strictly ascending on both sides.
    pub fn new(
        student_depth: usize,
        teacher_depth: usize,
        pairs: Vec<(usize, usize)>,
    ) -> Result<Self> {
        let fail = |what: String| Err(Error::usage(format!("layer map: {what}")));
        if pairs.is_empty() {
            return fail("no blocks are paired".into());
        }
        if let Some((s, t)) = pairs
            .iter()
            .find(|(s, t)| *s >= student_depth || *t >= teacher_depth)
        {
            return fail(format!(
                "student block {s} with teacher block {t}, but the depths are {student_depth} and {teacher_depth}"
            ));
        }
        if let Some(w) = pairs
            .windows(2)
            .find(|w| w[0].0 >= w[1].0 || w[0].1 >= w[1].1)
        {
            return fail(format!(
                "pairs must ascend on both sides, found {:?} before {:?}",
                w[0], w[1]
            ));
        }
        Ok(Self {
            student_depth,
            teacher_depth,
            pairs,
        })
    }

    /// The pairs (student block, teacher block).
    pub fn pairs(&self) -> &[(usize, usize)] {
        &self.pairs
    }

    /// The student's blocks, ascending.
    pub fn student_blocks(&self) -> Vec<usize> {
        self.pairs.iter().map(|p| p.0).collect()
    }

    /// The teacher's blocks, ascending.
    pub fn teacher_blocks(&self) -> Vec<usize> {
        self.pairs.iter().map(|p| p.1).collect()
    }

    /// Checks that the map is for networks of these depths, and that a pair is of one stage in both.
    pub fn check(&self, student: &BlockLayout, teacher: &BlockLayout) -> Result<()> {
        for (who, expected, found) in [
            ("student", self.student_depth, student.depth()),
            ("teacher", self.teacher_depth, teacher.depth()),
        ] {
            if expected != found {
                return Err(Error::usage(format!(
                    "the blocks are aligned from {} to {}, but the {who} has {found} instead of {expected}; pass the \
                     selection that cut this student from this teacher, align them by a pattern, or use features = \
                     \"none\"",
                    self.teacher_depth, self.student_depth
                )));
            }
        }
        let stage_of =
            |layout: &BlockLayout, block: usize| layout.ranges().position(|r| r.contains(&block));
        let torn = |(s, t): &&(usize, usize)| stage_of(student, *s) != stage_of(teacher, *t);
        match self.pairs.iter().find(torn) {
            None => Ok(()),
            Some((s, t)) => Err(Error::usage(format!(
                "student block {s} and teacher block {t} are of different stages: the selection's groups cross from one \
                 into the other"
            ))),
        }
    }
}
