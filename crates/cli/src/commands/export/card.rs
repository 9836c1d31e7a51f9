//! The model card: README.md with the hub's header.

use std::fmt::Write as _;

use serde_json::Value;
use tinyfusion::checkpoint::{Provenance, Root};
use tinyfusion::core::BlockLayout;

use crate::family::Samples;

/// What a card says.
pub(super) struct Card<'a> {
    pub(super) family: &'static str,
    pub(super) layout: BlockLayout,
    pub(super) parameters: usize,
    /// The network's sizes under the official constructor's names.
    pub(super) sizes: &'a Value,
    pub(super) samples: Samples,
    pub(super) provenance: &'a Provenance,
    pub(super) metrics: Option<&'a Value>,
    pub(super) license: &'a str,
    pub(super) base_model: Option<&'a str>,
}

/// Keys of `tinyfusion evaluate --json`, and what a reader calls them.
const METRICS: [(&str, &str); 8] = [
    ("fid", "FID"),
    ("sfid", "sFID"),
    ("inception_score", "Inception Score"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("kid", "KID"),
    ("accuracy", "accuracy"),
    ("sample_count", "samples"),
];

impl Card<'_> {
    pub(super) fn for_diffusers(&self, has_vae: bool) -> String {
        let (import, load) = if has_vae {
            ("DiTPipeline", "pipe = DiTPipeline.from_pretrained(FOLDER)")
        } else {
            (
                "AutoencoderKL, DiTPipeline",
                "pipe = DiTPipeline.from_pretrained(FOLDER, vae=AutoencoderKL.from_pretrained(VAE))",
            )
        };
        let (note, guidance) = if self.samples.classes == 1000 {
            ("", "")
        } else {
            // Written into the pipeline, whatever the network's table of labels.
            (
                "# DiTPipeline guides with class 1000, which this network does not have.\n",
                ", guidance_scale=1.0",
            )
        };
        let usage = format!(
            "from diffusers import {import}\n\n{load}\n\
             # The network was trained with time frequencies whose exponents are divided by 128; diffusers' class divides by 127.\n\
             for block in pipe.transformer.transformer_blocks:\n    block.norm1.emb.time_proj.downscale_freq_shift = 0\n{note}\
             images = pipe(class_labels=[0, 1], num_inference_steps=50{guidance}).images\n"
        );
        self.text("diffusers", &usage)
    }

    pub(super) fn for_original(&self, file: &str, roots: &[Root]) -> String {
        let sizes = self.sizes.as_object().into_iter().flatten();
        let arguments: Vec<String> = sizes
            .map(|(key, value)| format!("{key}={}", python(value)))
            .collect();
        let root = match roots.last() {
            Some(root) => format!("[\"{root}\"]"),
            None => String::new(),
        };
        let module = match self.family {
            "MAR" => "models.mar",
            _ => "models",
        };
        let usage = format!(
            "import torch\nfrom {module} import {0}\n\nmodel = {0}({1})\n\
             model.load_state_dict(torch.load(\"{file}\", weights_only=True){root})\n",
            self.family,
            arguments.join(", ")
        );
        self.text("pytorch", &usage)
    }

    pub(super) fn for_safetensors(&self) -> String {
        let usage = "from safetensors.torch import load_file\n\nweights = load_file(\"model.safetensors\")\n";
        self.text("safetensors", usage)
    }

    fn text(&self, library: &str, usage: &str) -> String {
        let mut out = String::new();
        self.write(&mut out, library, usage)
            .unwrap_or_else(|_| unreachable!("a String takes every text"));
        out
    }

    fn write(&self, out: &mut String, library: &str, usage: &str) -> std::fmt::Result {
        let Self {
            family, provenance, ..
        } = self;
        writeln!(out, "---\nlicense: {}", self.license)?;
        writeln!(out, "library_name: {library}")?;
        writeln!(out, "pipeline_tag: unconditional-image-generation")?;
        if let Some(base) = self.base_model {
            writeln!(out, "base_model: {base}")?;
        }
        let records = || std::iter::once(*provenance).chain(&provenance.ancestors);
        let is_cut = records().any(|r| r.kept.is_some());
        writeln!(
            out,
            "tags:\n- tinyfusion\n- {}\n- class-conditional",
            family.to_lowercase()
        )?;
        if is_cut {
            writeln!(out, "- pruning")?;
        }
        writeln!(out, "---\n\n# {family} of {} blocks\n", self.layout.depth())?;
        writeln!(
            out,
            "{:.1} M parameters; draws {}. Written by `tinyfusion export`, version {}.\n",
            self.parameters as f64 / 1e6,
            self.samples,
            provenance.tool_version.as_deref().unwrap_or("unknown")
        )?;
        writeln!(out, "```python\n{usage}```\n")?;
        if let Some(metrics) = self.metrics {
            writeln!(out, "## Metrics\n\n| | |\n|---|--:|")?;
            for (key, name) in METRICS {
                if let Some(value) = metrics.get(key).filter(|v| v.is_number()) {
                    writeln!(out, "| {name} | {value} |")?;
                }
            }
            for key in ["reference", "features"] {
                if let Some(value) = metrics.get(key).and_then(Value::as_str) {
                    writeln!(out, "| {key} | {} |", cell(value))?;
                }
            }
            writeln!(out)?;
        }
        writeln!(out, "## Where it came from\n")?;
        for record in records() {
            writeln!(out, "| | |\n|---|---|")?;
            let mut row = |name: &str, value: Option<String>| match value {
                Some(value) => writeln!(out, "| {name} | {} |", cell(&value)),
                None => Ok(()),
            };
            row("command", record.command.as_ref().map(|c| format!("`{c}`")))?;
            row(
                "kept blocks",
                record.kept.as_ref().map(|k| format!("{k:?}")),
            )?;
            row("chosen by", record.criterion.clone())?;
            row("pattern", record.pattern.clone())?;
            let narrowed = record.narrowed.as_ref();
            row(
                "narrowed",
                narrowed.map(|n| format!("{:.1} % by {}", 100.0 * n.ratio, n.importance)),
            )?;
            row("training steps", record.steps.map(|s| s.to_string()))?;
            row("made from SHA-256", record.parent_sha256.clone())?;
            for (key, value) in &record.notes {
                row(key, Some(value.clone()))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// Text in one cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', r"\|").replace(['\n', '\r'], " ")
}

/// A JSON value as Python writes it.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        other => other.to_string(),
    }
}
