//! Which of a folder's files are its weights: the one rule for what is read from a disk and what is downloaded.

use std::collections::BTreeSet;

/// What diffusers calls the weights of a network: where files of this name stand, no other is meant.
pub(crate) const DIFFUSERS_WEIGHTS: &str = "diffusion_pytorch_model";
/// Endings of weight files, the safest first.
const ENDINGS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "ckpt"];
/// Variants in half precision; they are read where there is nothing better.
const HALF: [&str; 2] = ["fp16", "bf16"];
/// Variants that are other weights than those of the model: never meant by a folder.
const OTHERS: [&str; 2] = ["non_ema", "ema_only"];

/// A weight file's name, taken apart: `x.fp16-00001-of-00002.safetensors`.
#[derive(Debug, PartialEq, Eq)]
struct Name<'a> {
    stem: &'a str,
    variant: Option<&'a str>,
    ending: usize,
    shard: bool,
}

impl<'a> Name<'a> {
    fn parse(file: &'a str) -> Option<Self> {
        let (rest, ending) = file.rsplit_once('.')?;
        let ending = ENDINGS.iter().position(|e| *e == ending)?;
        // The number of a shard stands before the variant or behind it.
        let (rest, late) = without_number(rest);
        let known = |v: &&str| HALF.contains(v) || OTHERS.contains(v);
        let (stem, variant) = match rest.rsplit_once('.').filter(|(_, v)| known(v)) {
            Some((stem, variant)) => (stem, Some(variant)),
            None => (rest, None),
        };
        let (stem, early) = without_number(stem);
        Some(Self {
            stem,
            variant,
            ending,
            shard: late || early,
        })
    }

    /// Whole before half precision, then the better ending, then one file before shards.
    fn rank(&self) -> (Option<usize>, usize, bool) {
        let half = self.variant.and_then(|v| HALF.iter().position(|h| *h == v));
        (half, self.ending, self.shard)
    }

    /// How its index is called, if it is a shard; two spellings are about for a variant.
    fn indices(&self) -> Vec<String> {
        let (stem, ending) = (self.stem, ENDINGS[self.ending]);
        match self.variant {
            None => vec![format!("{stem}.{ending}.index.json")],
            Some(variant) => vec![
                format!("{stem}.{ending}.index.{variant}.json"),
                format!("{stem}.{variant}.{ending}.index.json"),
            ],
        }
    }
}

/// `x` of `x-00001-of-00002`.
fn without_number(stem: &str) -> (&str, bool) {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let number = stem.rsplit_once("-of-").filter(|(_, n)| digits(n));
    let number = number.and_then(|(before, _)| before.rsplit_once('-'));
    match number.filter(|(_, n)| digits(n)) {
        Some((stem, _)) => (stem, true),
        None => (stem, false),
    }
}

/// Weights of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weights {
    /// Their names: one, those of all shards, or several of which nothing tells which is meant.
    pub files: Vec<String>,
    /// The index of shards, where it is there.
    pub index: Option<String>,
}

impl Weights {
    /// The weights among the names of a folder's files. Full precision comes before half (`x.fp16.safetensors`), then the
    /// ending decides (`.safetensors`, `.bin`, `.pt`, `.pth`, `.ckpt`), then one file comes before shards; beside
    /// `diffusion_pytorch_model` of any form nothing else is meant. Variants beside
    /// their original, and those that are other weights (`x.non_ema.safetensors`), are never meant.
    pub fn among<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: BTreeSet<&str> = names.into_iter().collect();
        let is_variant = |file: &str| {
            let parts = file.rsplit_once('.').and_then(|(rest, ending)| {
                let (original, _) = rest.rsplit_once('.')?;
                Some(format!("{original}.{ending}"))
            });
            parts.is_some_and(|original| names.contains(original.as_str()))
        };
        let is_other = |name: &Name<'_>| name.variant.is_some_and(|v| OTHERS.contains(&v));
        let mut candidates: Vec<(&str, Name<'_>)> = names
            .iter()
            .filter_map(|file| Some((*file, Name::parse(file)?)))
            .filter(|(file, name)| !is_variant(file) && !is_other(name))
            .collect();
        let is_theirs = |name: &Name<'_>| name.stem == DIFFUSERS_WEIGHTS;
        if candidates.iter().any(|(_, name)| is_theirs(name)) {
            candidates.retain(|(_, name)| is_theirs(name));
        }
        let Some(best) = candidates.iter().map(|(_, name)| name.rank()).min() else {
            return Self {
                files: Vec::new(),
                index: None,
            };
        };
        let best: Vec<&(&str, Name<'_>)> = candidates
            .iter()
            .filter(|(_, name)| name.rank() == best)
            .collect();
        let spellings = best.iter().flat_map(|(_, name)| match name.shard {
            true => name.indices(),
            false => Vec::new(),
        });
        Self {
            index: spellings.into_iter().find(|i| names.contains(i.as_str())),
            files: best.iter().map(|(file, _)| (*file).to_owned()).collect(),
        }
    }

    /// The checkpoints that they are, for people: every file, but shards by their common name.
    pub fn checkpoints(&self) -> Vec<String> {
        let one = |file: &String| match Name::parse(file).filter(|name| name.shard) {
            Some(name) => format!("{}-*.{}", name.stem, ENDINGS[name.ending]),
            None => file.clone(),
        };
        let all: BTreeSet<String> = self.files.iter().map(one).collect();
        all.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn among(names: &[&str]) -> (Vec<String>, Option<String>) {
        let found = Weights::among(names.iter().copied());
        (found.files, found.index)
    }

    #[test]
    fn whole_before_half_then_the_ending() {
        for (names, expected) in [
            (&["x.bin", "x.fp16.safetensors"][..], "x.bin"),
            (&["x.pt", "x.bf16.bin"], "x.pt"),
            (&["x.bin", "x.safetensors", "x.fp16.bin"], "x.safetensors"),
            (&["x.fp16.bin", "x.fp16.safetensors"], "x.fp16.safetensors"),
            (&["x.bf16.bin"], "x.bf16.bin"),
            (&["x.v2.pt", "x.pt"], "x.pt"),
            (&["DiT-v1.5.pt"], "DiT-v1.5.pt"),
            (&["x.non_ema.safetensors", "x.pth"], "x.pth"),
            (
                &["a.safetensors", "diffusion_pytorch_model.bin"],
                "diffusion_pytorch_model.bin",
            ),
        ] {
            assert_eq!(among(names), (vec![expected.to_string()], None));
        }
        assert_eq!(among(&["x.non_ema.bin", "config.json"]), (vec![], None));
    }

    #[test]
    fn shards_have_an_index() {
        let plain = ["x-00001-of-00002.bin", "x-00002-of-00002.bin"];
        let late = [
            "x-00001-of-00002.fp16.safetensors",
            "x-00002-of-00002.fp16.safetensors",
        ];
        let early = ["x.fp16-00001-of-00001.safetensors"];
        for (files, index) in [
            (&plain[..], "x.bin.index.json"),
            (&late, "x.safetensors.index.fp16.json"),
            (&early, "x.fp16.safetensors.index.json"),
        ] {
            let names = [files, &[index]].concat();
            let expected: Vec<String> = files.iter().map(ToString::to_string).collect();
            assert_eq!(among(&names), (expected, Some(index.into())));
        }
        // One file is simpler, and the same.
        let both = [&plain[..], &["x.bin.index.json", "x.bin"]].concat();
        assert_eq!(among(&both), (vec!["x.bin".into()], None));
    }

    #[test]
    fn several_checkpoints_are_told_apart() {
        let found = Weights::among(["b.pt", "a.pt"]);
        assert_eq!(found.checkpoints(), ["a.pt", "b.pt"]);
        let found = Weights::among(["a-1-of-2.safetensors", "a-2-of-2.safetensors"]);
        assert_eq!(found.checkpoints(), ["a-*.safetensors"]);
    }
}
