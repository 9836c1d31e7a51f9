use tinyfusion::core::{Error, Result};

use crate::class_names::ClassNames;

/// Whose pictures are drawn: the classes take turns.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Classes(Vec<u32>);

impl Classes {
    /// The classes that `wanted` names by number or name, or all `count`.
    pub(super) fn choose(wanted: &[String], names: &ClassNames, count: usize) -> Result<Self> {
        if wanted.is_empty() {
            return Ok(Self((0..count as u32).collect()));
        }
        let class = |text: &String| match text.parse::<u32>() {
            Ok(number) if (number as usize) < count => Ok(number),
            Ok(number) => Err(Error::usage(format!(
                "class {number}: the model has the classes 0 to {}",
                count - 1
            ))),
            Err(_) => names.find(text, count),
        };
        Ok(Self(wanted.iter().map(class).collect::<Result<_>>()?))
    }

    /// The class of image `number`.
    pub(super) fn of(&self, number: usize) -> u32 {
        self.0[number % self.0.len()]
    }

    /// All, in turn.
    pub(super) fn listed(&self) -> &[u32] {
        &self.0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn classes_take_turns() {
        let names = ClassNames::listed(["star", "ring"]);
        let choose = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
            Classes::choose(&wanted, &names, 3)
        };
        let all = choose(&[]).unwrap();
        assert_eq!([0, 1, 2, 3, 7].map(|i| all.of(i)), [0, 1, 2, 0, 1]);
        assert_eq!(choose(&["2", "Ring", "0"]).unwrap().listed(), [2, 1, 0]);
        let error = choose(&["3"]).unwrap_err().to_string();
        assert!(error.contains("0 to 2"), "{error}");
        assert!(choose(&["box"]).is_err());
    }
}
