//! Where a model stands, as commands are told: `PATH[#WORD[,WORD…]]`. The one place where this is parsed; README.md and
//! the help of `inspect` describe it.

use std::path::{Path, PathBuf};

use tinyfusion::checkpoint::Root;
use tinyfusion::core::{Error, Result};
use tinyfusion::models::import::Hints;

/// A path, and what is said behind it of a file that does not say it itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Address {
    pub(crate) path: PathBuf,
    /// Which of a training checkpoint's dictionaries is meant.
    pub(crate) root: Option<Root>,
    pub(crate) hints: Hints,
}

impl Address {
    /// Splits what the user gave. A file whose name has a `#` is taken as it is.
    pub(crate) fn parse(text: &Path) -> Result<Self> {
        let whole = || Self {
            path: text.to_path_buf(),
            root: None,
            hints: Hints::default(),
        };
        let split = text.to_str().and_then(|t| t.rsplit_once('#'));
        let Some((path, words)) = split.filter(|_| !text.exists()) else {
            return Ok(whole());
        };
        let mut address = Self {
            path: path.into(),
            ..whole()
        };
        for word in words.split(',') {
            let wrong = |what: &str| {
                Error::usage(format!(
                    "{}: `{word}` behind the #: {what}; a root (ema, model, model_ema), family=dit|sit|mar, heads=N and \
                     classes=N may stand there, between commas",
                    text.display()
                ))
            };
            let number = |value: &str| match value.parse() {
                Ok(n) if n > 0 => Ok(Some(n)),
                _ => Err(wrong("is no number from 1 on")),
            };
            match word.split_once('=') {
                None => {
                    let root = word.parse().map_err(|_| wrong("is not known"))?;
                    if address.root.replace(root).is_some() {
                        return Err(wrong("is a second root"));
                    }
                }
                Some(("family", value)) => {
                    let kind = value.parse().map_err(|_| wrong("is no family"))?;
                    address.hints.kind = Some(kind);
                }
                Some(("heads", value)) => address.hints.num_heads = number(value)?,
                Some(("classes", value)) => address.hints.num_classes = number(value)?,
                Some(_) => return Err(wrong("is not known")),
            }
        }
        Ok(address)
    }

    /// Whether something is said behind the path.
    pub(crate) fn says_more(&self) -> bool {
        self.root.is_some() || self.hints != Hints::default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use tinyfusion::models::import::Kind;

    use super::*;

    #[test]
    fn words_behind_a_path() {
        let parse = |text: &str| Address::parse(Path::new(text));
        let plain = parse("a/b.pt").unwrap();
        assert_eq!(
            (plain.path.to_str(), plain.says_more()),
            (Some("a/b.pt"), false)
        );
        let all = parse("a#b/c.pt#ema,family=sit,heads=6,classes=10").unwrap();
        assert_eq!(all.path.to_str(), Some("a#b/c.pt"));
        assert_eq!(all.root, Some(Root::Ema));
        let hints = Hints {
            kind: Some(Kind::Sit),
            num_heads: Some(6),
            num_classes: Some(10),
        };
        assert_eq!(all.hints, hints);
        for wrong in [
            "a#",
            "a#emma",
            "a#ema,model",
            "a#heads=0",
            "a#heads=x",
            "a#family=unet",
            "a#depth=3",
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(matches!(error, Error::Usage(_)), "{wrong}");
            assert!(error.to_string().contains("model_ema"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_called_so_is_meant() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.pt#ema");
        std::fs::write(&path, "").unwrap();
        assert_eq!(Address::parse(&path).unwrap().path, path);
    }
}
