//! The stages that measure a model.

use std::path::Path;

use anyhow::Result;

use super::{Planner, say, strings};
use crate::reproduce::spec::flags;
use crate::reproduce::vocabulary::{Leftover, Row, Stage};

impl Planner<'_> {
    pub(super) fn inspect(&mut self, row: &mut Row, model: &Path, folder: &Path) {
        let file = folder.join("inspect.json");
        let id = row.id.clone();
        self.stage(
            row,
            "inspect",
            Stage {
                name: format!("{id}/inspect"),
                args: strings(&["inspect", &say(model), "--json"]),
                inputs: vec![model.to_path_buf()],
                outputs: vec![file.clone()],
                folder: None,
                leftover: Leftover::Remove,
                capture: Some(file.clone()),
                seconds: self.preset.seconds.other,
            },
        );
        row.files.inspect = file;
    }

    pub(super) fn loss(
        &mut self,
        row: &mut Row,
        model: &Path,
        file: &Path,
        label: &'static str,
    ) -> Result<()> {
        let mut args = strings(&["loss", &say(model)]);
        args.extend(flags("loss", &self.preset.loss)?);
        args.extend(strings(&["--json", &say(file)]));
        let id = row.id.clone();
        self.stage(
            row,
            label,
            Stage {
                name: format!("{id}/{label}"),
                args,
                inputs: vec![model.to_path_buf()],
                outputs: vec![file.to_path_buf()],
                folder: None,
                leftover: Leftover::Remove,
                capture: None,
                seconds: self.preset.seconds.loss,
            },
        );
        row.files.loss = file.to_path_buf();
        Ok(())
    }

    /// How large the hidden states are, where the preset asks for it.
    pub(super) fn activations(&mut self, row: &mut Row, model: &Path, folder: &Path) -> Result<()> {
        let Some(table) = &self.preset.activations else {
            return Ok(());
        };
        let file = folder.join("activations.json");
        let mut args = strings(&["activations", &say(model)]);
        args.extend(flags("activations", table)?);
        args.extend(strings(&["--json", &say(&file)]));
        let name = format!("{}/activations", row.id);
        self.stage(
            row,
            "activations",
            Stage {
                name,
                args,
                inputs: vec![model.to_path_buf()],
                outputs: vec![file.clone()],
                folder: None,
                leftover: Leftover::Remove,
                capture: None,
                seconds: self.preset.seconds.loss,
            },
        );
        row.files.activations = Some(file);
        Ok(())
    }

    /// Samples and scores, which completes the row.
    pub(super) fn sample(&mut self, mut row: Row, model: &Path, seconds: f64) -> Result<()> {
        let preset = self.preset;
        let folder = self.out.join("rows").join(&row.id);
        let (samples, scores) = (folder.join("samples"), folder.join("scores.json"));
        let npz = samples.join("samples.npz");
        row.files.sample = samples.join("sample.json");
        row.files.grid = samples.join("grid.png");
        row.files.scores = scores.clone();
        let mut args = strings(&["sample", &say(model), &say(&samples)]);
        let counted = preset.sample.counted.flag();
        args.extend(strings(&[counted, &row.sampling_steps.to_string()]));
        args.extend(flags("sample", &preset.sample.flags)?);
        let id = row.id.clone();
        let outputs = vec![
            npz.clone(),
            row.files.sample.clone(),
            row.files.grid.clone(),
        ];
        self.stage(
            &mut row,
            "sampling",
            Stage {
                name: format!("{id}/sampling"),
                args,
                inputs: vec![model.to_path_buf()],
                outputs,
                folder: Some(samples),
                leftover: Leftover::Remove,
                capture: None,
                seconds,
            },
        );
        let reference = &preset.evaluate.reference;
        let classifier = &preset.classifier;
        let mut inputs = vec![npz.clone(), classifier.clone()];
        if !reference.starts_with("shapes:") {
            inputs.push(reference.into());
        }
        let mut args = strings(&["evaluate", reference, &say(&npz)]);
        args.extend(strings(&[
            "--classifier",
            &say(classifier),
            "--json",
            &say(&scores),
        ]));
        self.stage(
            &mut row,
            "evaluation",
            Stage {
                name: format!("{id}/evaluation"),
                args,
                inputs,
                outputs: vec![scores],
                folder: None,
                leftover: Leftover::Remove,
                capture: None,
                seconds: preset.seconds.evaluate,
            },
        );
        self.rows.push(row);
        Ok(())
    }
}
