//! The stages of a mask: the search, the cut, and the cut model's loss.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tinyfusion_report::Recovery;

use super::{Ids, Planner, model_files, say, strings};
use crate::reproduce::spec::{Criterion, DENSE, Extent, Masks, flags, merged, verb};
use crate::reproduce::vocabulary::{Files, Leftover, Row, Stage};

/// A mask that has been found, cut and weighed.
#[derive(Debug, Clone)]
pub(super) struct Mask {
    /// What the ids of its rows begin with.
    pub(super) rows: Ids,
    /// All that a row inherits from its mask.
    pub(super) row: Row,
    /// The model that was cut.
    pub(super) parent: PathBuf,
    pub(super) cut: PathBuf,
}

/// A mask before its stages are planned.
struct Search<'a> {
    masks: &'a Masks,
    extent: &'a Extent,
    /// Of its stages and folder.
    id: String,
    seed: u64,
    parent: PathBuf,
    folder: PathBuf,
}

impl Planner<'_> {
    /// The mask of a criterion: search or score, cut, and its loss before any recovery.
    pub(super) fn mask(
        &mut self,
        masks: &Masks,
        extent: &Extent,
        draw: u64,
        repeat: u64,
    ) -> Result<Mask> {
        // What a seed does not change is there once; a model that was trained before has a seed.
        let shared = !masks.criterion.is_seeded() && masks.of.is_none();
        let rows = self.ids(masks, extent, draw, repeat);
        let key = (rows.first.clone(), repeat);
        if shared && repeat > 0 {
            let first = self.masks.get(&(rows.first.clone(), 0));
            let first = first.with_context(|| "planned with the first seed")?;
            let mut mask = first.clone();
            mask.row.seed = self.preset.seed + repeat;
            mask.row.name = self.name(masks, extent, &mask.row);
            mask.rows = rows;
            self.masks.insert(key, mask.clone());
            return Ok(mask);
        }
        let parent = self.model(masks.of.as_deref().unwrap_or(DENSE), repeat)?;
        let id = rows.own.clone();
        let search = Search {
            masks,
            extent,
            seed: self.seed(masks, draw, repeat),
            parent,
            folder: self.out.join("masks").join(&id),
            id,
        };
        let mask = self.find(&search, rows, repeat)?;
        self.masks.insert(key, mask.clone());
        Ok(mask)
    }

    /// Every draw of every repeat has a seed of its own.
    fn seed(&self, masks: &Masks, draw: u64, repeat: u64) -> u64 {
        self.preset.seed + repeat * masks.draws + draw
    }

    fn ids(&self, masks: &Masks, extent: &Extent, draw: u64, repeat: u64) -> Ids {
        let mut group = masks.label().to_string();
        let only = masks.id.is_some() && masks.extents().len() == 1;
        match extent {
            _ if only => {}
            Extent::Own => {}
            Extent::Pattern(pattern) => group += &format!("-{}", slug(pattern)),
            Extent::Keep(n) => group += &format!("-{n}"),
            Extent::Blocks(blocks) => group += &format!("-{}", blocks.len()),
        }
        let with = |seed: u64| format!("{group}-seed-{seed}");
        let (own, first) = match masks.criterion {
            Criterion::Random => (
                with(self.seed(masks, draw, repeat)),
                with(self.seed(masks, draw, 0)),
            ),
            _ if repeat == 0 => (group.clone(), group.clone()),
            _ => (with(self.preset.seed + repeat), group.clone()),
        };
        Ids { own, first, group }
    }

    /// For people.
    fn name(&self, masks: &Masks, extent: &Extent, row: &Row) -> String {
        let mut name = masks
            .name
            .as_deref()
            .unwrap_or(masks.criterion.name())
            .to_string();
        let only = masks.name.is_some() && masks.extents().len() == 1;
        match extent {
            _ if only => {}
            Extent::Own => {}
            Extent::Pattern(pattern) => name += &format!(" {pattern}"),
            Extent::Keep(n) => name += &format!(" {n} of all"),
            Extent::Blocks(blocks) => name += &format!(" {} blocks", blocks.len()),
        }
        if masks.criterion == Criterion::Learned && masks.name.is_none() {
            name += &format!(" ({})", self.delta(masks));
        }
        if masks.criterion == Criterion::Random || self.seeds > 1 {
            name += &format!(", seed {}", row.seed);
        }
        name
    }

    /// The weight update that is learned along with the mask.
    fn delta(&self, masks: &Masks) -> String {
        let table = merged(&self.preset.learn, &masks.flags);
        let delta = table.get("delta").and_then(toml::Value::as_str);
        delta.unwrap_or("lora").into()
    }

    /// What the rows show in the study's table.
    fn labels(&self, masks: &Masks) -> BTreeMap<String, String> {
        let mut labels = masks.labels.clone();
        if masks.criterion == Criterion::Learned {
            labels
                .entry("delta".into())
                .or_insert_with(|| self.delta(masks));
        }
        labels
    }

    fn find(&mut self, search: &Search<'_>, rows: Ids, repeat: u64) -> Result<Mask> {
        let Search {
            masks,
            extent,
            seed,
            parent,
            folder,
            ..
        } = search;
        let cut = folder.join("cut");
        let mut row = Row {
            id: search.id.clone(),
            group: rows.group.clone(),
            repeat,
            name: String::new(),
            criterion: masks.criterion.word(),
            pattern: match extent {
                Extent::Pattern(pattern) => Some(pattern.clone()),
                _ => None,
            },
            recovery: Recovery::None,
            recovery_label: None,
            budget_steps: None,
            samples_seen: None,
            x: None,
            labels: self.labels(masks),
            seed: *seed,
            sampling_steps: self.preset.sample.steps,
            ancestors: self.ancestors(masks, repeat),
            files: Files::default(),
            stages: Vec::new(),
        };
        row.name = self.name(masks, extent, &row);
        match masks.criterion {
            Criterion::Fixed => self.cut_blocks(search, &mut row, &cut)?,
            Criterion::Width => self.narrow(search, &mut row, &cut, repeat)?,
            _ => self.search_and_cut(search, &mut row, &cut)?,
        }
        self.inspect(&mut row, &cut, folder);
        let calibration = folder.join("calibration.json");
        self.loss(&mut row, &cut, &calibration, "calibration")?;
        row.files.calibration = Some(calibration);
        Ok(Mask {
            rows,
            row,
            parent: parent.clone(),
            cut,
        })
    }

    /// The selections from the teacher to the model that `masks` cuts.
    fn ancestors(&self, masks: &Masks, repeat: u64) -> Vec<PathBuf> {
        let Some(of) = &masks.of else {
            return Vec::new();
        };
        let Some(model) = self.models.get(&(of.clone(), repeat)) else {
            return Vec::new();
        };
        let trained = |r: &&Row| model.starts_with(self.out.join("rows").join(&r.id));
        let parent = self.rows.iter().find(trained);
        parent.map_or_else(Vec::new, |p| {
            let own = p.files.selection.iter().cloned();
            p.ancestors.iter().cloned().chain(own).collect()
        })
    }

    fn search_and_cut(&mut self, search: &Search<'_>, row: &mut Row, cut: &Path) -> Result<()> {
        let Search {
            masks,
            extent,
            id,
            seed,
            parent,
            folder,
        } = search;
        let preset = self.preset;
        let criterion = masks.criterion;
        let learned = criterion == Criterion::Learned;
        let found = folder.join("search");
        let selection = found.join("selection.json");
        let mut args = strings(&[verb(criterion), &say(parent), &say(&found)]);
        if !learned {
            args.extend(strings(&["--criterion", criterion.word()]));
        }
        match extent {
            Extent::Pattern(pattern) => args.extend(strings(&["--pattern", pattern])),
            Extent::Keep(n) => args.extend(strings(&["--keep", &n.to_string()])),
            Extent::Own | Extent::Blocks(_) => {}
        }
        let (base, seconds) = match criterion {
            Criterion::Learned => (&preset.learn, preset.seconds.learn),
            c if c.looks_at_data() => (&preset.score, preset.seconds.score),
            _ => (&toml::Table::new(), preset.seconds.other),
        };
        args.extend(flags(verb(criterion), &merged(base, &masks.flags))?);
        let mut inputs = vec![parent.clone()];
        if learned || criterion.looks_at_data() {
            self.on_data(&mut args, &mut inputs);
        }
        if criterion.is_seeded() {
            args.extend(strings(&["--seed", &seed.to_string()]));
        }
        row.files.selection = Some(selection.clone());
        let mut outputs = vec![selection.clone()];
        if learned {
            row.files.history = Some(found.join("history.jsonl"));
            row.files.search_metrics = Some(found.join("metrics.jsonl"));
            outputs.extend(row.files.history.clone());
            outputs.extend(row.files.search_metrics.clone());
        }
        self.stage(
            row,
            "search",
            Stage {
                name: format!("{id}/search"),
                args,
                inputs,
                outputs,
                folder: Some(found),
                leftover: match learned {
                    true => Leftover::Resume,
                    false => Leftover::Remove,
                },
                capture: None,
                seconds,
            },
        );
        let args = [
            "cut",
            &say(parent),
            &say(cut),
            "--selection",
            &say(&selection),
        ];
        let inputs = vec![parent.clone(), selection];
        self.make(row, "cut", strings(&args), inputs, cut);
        Ok(())
    }

    /// Blocks that the preset names: the selection lies beside the cut model.
    fn cut_blocks(&mut self, search: &Search<'_>, row: &mut Row, cut: &Path) -> Result<()> {
        let blocks: Vec<String> = search.masks.blocks.iter().map(usize::to_string).collect();
        let parent = &search.parent;
        let mut args = strings(&["cut", &say(parent), &say(cut), "--keep", &blocks.join(",")]);
        args.extend(flags("cut", &search.masks.flags)?);
        row.files.selection = Some(cut.join("selection.json"));
        self.make(row, "cut", args, vec![parent.clone()], cut);
        Ok(())
    }

    /// All blocks, each of them narrower.
    fn narrow(
        &mut self,
        search: &Search<'_>,
        row: &mut Row,
        cut: &Path,
        repeat: u64,
    ) -> Result<()> {
        let parent = &search.parent;
        let mut args = strings(&["narrow", &say(parent), &say(cut)]);
        let mut inputs = vec![parent.clone()];
        if let Some(name) = &search.masks.parameters_of {
            let other = self.masks.get(&(name.clone(), repeat));
            let other = other.with_context(|| {
                format!("parameters_of names `{name}`, but no mask of this id stands before")
            })?;
            args.extend(strings(&["--parameters-of", &say(&other.cut)]));
            inputs.push(other.cut.clone());
        }
        args.extend(flags("narrow", &search.masks.flags)?);
        let importance = search.masks.flags.get("importance");
        let importance = importance.and_then(toml::Value::as_str);
        if importance != Some("magnitude") {
            args.extend(strings(&["--seed", &search.seed.to_string()]));
        }
        if importance.is_none_or(|importance| importance == "taylor") {
            self.on_data(&mut args, &mut inputs);
        }
        // It names all blocks: the hidden states keep their width, so that the teacher's can be matched.
        row.files.selection = Some(cut.join("selection.json"));
        self.make(row, "narrow", args, inputs, cut);
        if let Some(stage) = self.stages.last_mut() {
            stage.seconds = self.preset.seconds.score;
        }
        Ok(())
    }

    /// A stage that makes the model directory `cut`.
    fn make(
        &mut self,
        row: &mut Row,
        label: &'static str,
        args: Vec<String>,
        inputs: Vec<PathBuf>,
        cut: &Path,
    ) {
        let mut outputs = model_files(cut);
        let beside = row.files.selection.iter().filter(|s| s.starts_with(cut));
        outputs.extend(beside.cloned());
        let name = format!("{}/{label}", row.id);
        self.stage(
            row,
            label,
            Stage {
                name,
                args,
                inputs,
                outputs,
                folder: Some(cut.to_path_buf()),
                leftover: Leftover::Remove,
                capture: None,
                seconds: self.preset.seconds.other,
            },
        );
    }
}

/// A pattern in a file's name: `2:4x7,3:4` as `2-4x7_3-4`.
fn slug(pattern: &str) -> String {
    pattern.replace(':', "-").replace(',', "_")
}
