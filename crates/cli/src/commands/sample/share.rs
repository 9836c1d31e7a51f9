use std::ops::Range;
use std::str::FromStr;

use tinyfusion::core::{Error, Result};

/// One of `of` shares of the images of a run, numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    index: usize,
    of: usize,
}

impl Share {
    /// The images of this share of `count`: shares follow each other and differ by one image at most.
    pub(super) fn of(self, count: usize) -> Result<Range<usize>> {
        if count < self.of {
            return Err(Error::usage(format!(
                "{} shares of {count} images: some would be empty",
                self.of
            )));
        }
        // u128, since a count times a number of shares may not fit.
        let border = |index: usize| (count as u128 * index as u128 / self.of as u128) as usize;
        Ok(border(self.index)..border(self.index + 1))
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text
            .split_once('/')
            .and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        match numbers {
            Some((index, of)) if index < of => Ok(Self { index, of }),
            _ => Err("expected I/N with I from 0 to N − 1, such as 0/8".into()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_image_once() {
        for (count, of) in [(10, 3), (8, 8), (50_000, 7), (1, 1)] {
            let mut next = 0;
            for index in 0..of {
                let share: Share = format!("{index}/{of}").parse().unwrap();
                let images = share.of(count).unwrap();
                assert_eq!(images.start, next);
                assert!(images.len().abs_diff(count / of) <= 1);
                next = images.end;
            }
            assert_eq!(next, count);
        }
    }

    #[test]
    fn what_is_no_share_is_refused() {
        for text in ["", "1", "3/3", "0/0", "-1/2", "a/b", "1/2/3"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        let share: Share = "0/9".parse().unwrap();
        assert!(share.of(8).is_err());
    }
}
