//! What is said where a GPU's memory is full.

use clap::ArgMatches;

/// Flags by which a command takes less memory, and how to say so.
const FLAGS: [(&str, &str); 4] = [
    ("recompute", "--recompute"),
    ("vae-tiles", "--vae-tiles"),
    ("micro-batches", "more --micro-batches"),
    ("batch-size", "a smaller --batch-size"),
];

/// Those of [`FLAGS`] that the command at hand has, with the values that it has for them.
#[derive(Debug, Default)]
pub(crate) struct Flags(Vec<(&'static str, &'static str, Option<String>)>);

impl Flags {
    /// Of the subcommand that was called.
    pub(crate) fn of(program: &clap::Command, matches: &ArgMatches) -> Self {
        let Some((command, matches)) = matches
            .subcommand()
            .and_then(|(name, matches)| Some((program.find_subcommand(name)?, matches)))
        else {
            return Self::default();
        };
        let value = |arg: &clap::Arg| {
            let mut values = matches.get_raw(arg.get_id().as_str())?;
            Some(values.next()?.to_string_lossy().into_owned())
        };
        let of = |(flag, advice)| {
            let arg = command
                .get_arguments()
                .find(|a| a.get_long() == Some(flag))?;
            Some((flag, advice, value(arg)))
        };
        Self(FLAGS.into_iter().filter_map(of).collect())
    }

    fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|(f, ..)| *f == flag)
    }

    /// An error's text, if it is of a GPU's memory: what was asked for and what takes less. `memory` is the most that
    /// tensors had, of how much there is, in bytes.
    pub(crate) fn explain(&self, error: &str, memory: Option<(u64, u64)>) -> Option<String> {
        // Behind the first line candle may print a backtrace.
        let cause = error.lines().next()?;
        let is_full = ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"];
        if !is_full.iter().any(|code| cause.contains(code)) {
            return None;
        }
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let taken = memory.map_or(String::new(), |(most, all)| {
            format!(
                " (tensors had up to {:.1} of its {:.1} GB, which other programs use, too)",
                gb(most),
                gb(all)
            )
        });
        let numbers = self.0.iter().filter(|(flag, ..)| !is_switch(flag));
        let asked: Vec<String> = numbers
            .filter_map(|(flag, _, value)| Some(format!("--{flag} {}", value.as_ref()?)))
            .collect();
        let asked = match asked.is_empty() {
            true => String::new(),
            false => format!(", with {}", asked.join(" and ")),
        };
        Some(format!(
            "the GPU's memory is full{taken}{asked}: {cause}; {}",
            self.advice()
        ))
    }

    fn advice(&self) -> String {
        let is_on = |flag: &str, value: &Option<String>| {
            is_switch(flag) && value.as_deref() == Some("true")
        };
        let off = self.0.iter().filter(|(flag, _, value)| !is_on(flag, value));
        let less: Vec<&str> = off.map(|(_, advice, _)| *advice).collect();
        if less.is_empty() {
            return "free some, or pass --device cpu".into();
        }
        // A run's folder keeps to its settings.
        let place = match self.has("micro-batches") {
            true => " (in another folder, but for --recompute)",
            false => "",
        };
        format!("less is taken with {}{place}", less.join(", or with "))
    }
}

/// Whether a flag is on or off.
fn is_switch(flag: &str) -> bool {
    ["recompute", "vae-tiles"].contains(&flag)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::Cli;

    const CAUSE: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";

    fn flags(line: &str) -> Flags {
        let mut command = Cli::command();
        let words = ["tinyfusion"].into_iter().chain(line.split(' '));
        let matches = command.try_get_matches_from_mut(words).unwrap();
        Flags::of(&command, &matches)
    }

    #[test]
    fn the_advice_is_of_flags_that_the_command_has() {
        let said = |line: &str| flags(line).explain(CAUSE, None).unwrap();
        let text = said("distill a b --batch-size 256");
        assert_eq!(
            text,
            format!(
                "the GPU's memory is full, with --batch-size 256: {CAUSE}; less is taken with --recompute, or with more \
                 --micro-batches, or with a smaller --batch-size (in another folder, but for --recompute)"
            )
        );
        let text = said("learn a b --recompute --micro-batches 2");
        assert!(text.contains("full, with --micro-batches 2: "), "{text}");
        assert!(!text.contains("with --recompute"), "{text}");
        let text = said("sample a b --count 9");
        assert!(
            text.contains("full, with --batch-size 50: ")
                && text.ends_with("with --vae-tiles, or with a smaller --batch-size"),
            "{text}"
        );
        assert!(said("loss a").ends_with("pass --device cpu"));
    }

    #[test]
    fn only_a_full_memory_is_explained_and_on_one_line() {
        let flags = flags("loss a");
        assert!(flags.explain("a.safetensors: not found", None).is_none());
        let traced = format!("a.safetensors: `w` [3]: {CAUSE}\n   0: bt\n");
        let text = flags.explain(&traced, Some((79_250_000_000, 85_000_000_000)));
        let text = text.unwrap();
        assert!(
            text.contains("79.2 of its 85.0 GB") && text.contains("`w` [3]: Driver"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
