//! The stages that measure a model.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{LATENTS, Planner, say, strings};
use crate::reproduce::spec::flags;
use crate::reproduce::vocabulary::{Leftover, Row, Stage};

impl Planner<'_> {
    /// The latents, before anything else. Presets that share their folder encode once: the command finds them there.
    pub(super) fn encode(&mut self) -> Result<()> {
        let Some(latents) = &self.preset.latents else {
            return Ok(());
        };
        let (images, folder) = (say(&latents.images), say(&latents.folder));
        let mut args = strings(&["encode", &images, &folder, "--vae", &say(&latents.vae)]);
        args.extend(flags("encode", &latents.flags)?);
        let stage = Stage {
            name: "latents/encoding".into(),
            args,
            // Not the images, whose hash would take as long as the work; the command compares their number.
            inputs: vec![latents.vae.clone()],
            outputs: vec![latents.folder.join(LATENTS)],
            folder: Some(latents.folder.clone()),
            leftover: Leftover::Shared,
            capture: None,
            seconds: self.preset.seconds.encode,
        };
        self.push(stage);
        Ok(())
    }

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
        let mut inputs = vec![model.to_path_buf()];
        self.on_data(&mut args, &mut inputs);
        args.extend(strings(&["--json", &say(file)]));
        let id = row.id.clone();
        self.stage(
            row,
            label,
            Stage {
                name: format!("{id}/{label}"),
                args,
                inputs,
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
        let mut inputs = vec![model.to_path_buf()];
        self.on_data(&mut args, &mut inputs);
        args.extend(strings(&["--json", &say(&file)]));
        let name = format!("{}/activations", row.id);
        self.stage(
            row,
            "activations",
            Stage {
                name,
                args,
                inputs,
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
        let mut inputs = vec![model.to_path_buf()];
        let vae = preset.sample.flags.get("vae");
        inputs.extend(vae.and_then(toml::Value::as_str).map(PathBuf::from));
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
                inputs,
                outputs,
                folder: Some(samples),
                // Every batch is kept as it is drawn.
                leftover: Leftover::Resume,
                capture: None,
                seconds,
            },
        );
        let reference = &preset.evaluate.reference;
        let mut inputs = vec![npz.clone()];
        let mut args = strings(&["evaluate", reference, &say(&npz)]);
        let networks = [
            ("--classifier", &preset.classifier),
            ("--weights", &preset.evaluate.weights),
        ];
        for (flag, network) in networks {
            if let Some(network) = network {
                args.extend(strings(&[flag, &say(network)]));
                inputs.push(network.clone());
            }
        }
        if !reference.starts_with("shapes:") {
            inputs.push(reference.into());
        }
        args.extend(strings(&["--json", &say(&scores)]));
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
