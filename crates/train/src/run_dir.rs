use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::{Deserialize, Serialize};
use tinyfusion_checkpoint::{DTypePolicy, Metadata, load_expected, remove_partials, save, write_atomic};
use tinyfusion_core::{Error, Result};

use crate::ParamGroup;
use crate::group::Snapshot;

/// The folder of one training run: `config.toml`, `metrics.jsonl`, `history.jsonl` and
/// `checkpoints/step-000500/{model,ema,optimizer}.safetensors + state.json`.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
}

/// What a checkpoint remembers beside tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Steps done.
    pub(crate) step: u64,
    /// Updates applied: steps less the skipped ones.
    pub(crate) updates: u64,
    /// Steps skipped because the loss or the gradient was not finite.
    pub(crate) skipped: u64,
    /// Seconds spent, over all parts of the run.
    pub(crate) seconds: f64,
}

const STATE: &str = "state.json";

impl RunDir {
    /// Opens or makes the folder and writes the resolved settings. A folder that holds a run with other
    /// settings is refused.
    pub fn open(root: impl Into<PathBuf>, settings: &impl Serialize) -> Result<Self> {
        let root = root.into();
        let text = toml::to_string_pretty(settings).map_err(|e| Error::run(format!("settings: {e}")))?;
        fs::create_dir_all(root.join("checkpoints")).map_err(|e| Error::file(&root, e))?;
        let path = root.join("config.toml");
        match fs::read_to_string(&path) {
            Ok(old) if old != text => {
                let differs = old.lines().zip(text.lines()).find(|(a, b)| a != b);
                let (was, is) = differs.unwrap_or(("fewer lines", "more lines"));
                return Err(Error::usage(format!(
                    "{}: this folder holds a run with other settings (`{was}`, now `{is}`); \
                     use another folder, or remove this one to start again",
                    root.display()
                )));
            }
            Ok(_) => {}
            Err(_) => write_atomic(&path, |f| f.write_all(text.as_bytes()))?,
        }
        remove_partials(&root)?;
        remove_partials(root.join("checkpoints"))?;
        Ok(Self { root })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Steps that have a checkpoint, ascending.
    pub fn checkpoints(&self) -> Result<Vec<u64>> {
        let folder = self.root.join("checkpoints");
        let mut steps = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| Error::file(&folder, e))? {
            let entry = entry.map_err(|e| Error::file(&folder, e))?;
            let name = entry.file_name();
            if let Some(step) = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse().ok()) {
                steps.push(step);
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn checkpoint(&self, step: u64) -> PathBuf {
        self.root.join("checkpoints").join(format!("step-{step:06}"))
    }

    /// Writes a checkpoint beside its place and renames it, then removes the older ones.
    pub(crate) fn save(&self, groups: &[ParamGroup], state: &State) -> Result<()> {
        let place = self.checkpoint(state.step);
        let partial = place.with_extension("partial");
        let write = || -> Result<()> {
            fs::create_dir_all(&partial).map_err(|e| Error::file(&partial, e))?;
            let Snapshot { model, ema, optimizer } = Snapshot::of(groups);
            for (name, dict) in [("model", model), ("ema", ema), ("optimizer", optimizer)] {
                save(partial.join(format!("{name}.safetensors")), &dict, &Metadata::new(), DTypePolicy::Keep)?;
            }
            let text = serde_json::to_string_pretty(state).map_err(|e| Error::run(e.to_string()))?;
            write_atomic(partial.join(STATE), |f| f.write_all(text.as_bytes()))?;
            fs::rename(&partial, &place).map_err(|e| Error::file(&place, e))
        };
        if let Err(error) = write() {
            // Whatever went wrong (a full disk, say), only whole checkpoints stay.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
        sync_folder(&self.root.join("checkpoints"))?;
        for old in self.checkpoints()?.into_iter().filter(|s| *s < state.step) {
            let old = self.checkpoint(old);
            fs::remove_dir_all(&old).map_err(|e| Error::file(&old, e))?;
        }
        Ok(())
    }

    /// Brings `groups` to the newest checkpoint, if there is one, and cuts the logs back to it.
    pub(crate) fn resume(&self, groups: &[ParamGroup], device: &Device) -> Result<Option<State>> {
        let Some(&step) = self.checkpoints()?.last() else {
            for log in [METRICS, HISTORY] {
                self.cut_log(log, 0)?;
            }
            return Ok(None);
        };
        let place = self.checkpoint(step);
        let path = place.join(STATE);
        let text = fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        let state: State = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
        let [model, ema, optimizer] = Snapshot::specs(groups);
        let read = |name: &str, specs| {
            let path = place.join(format!("{name}.safetensors"));
            Ok::<_, Error>(load_expected(path, specs, DTypePolicy::Keep, device)?.tensors)
        };
        let snapshot = Snapshot {
            model: read("model", &model)?,
            ema: read("ema", &ema)?,
            optimizer: read("optimizer", &optimizer)?,
        };
        groups.iter().try_for_each(|g| g.import(&snapshot))?;
        for log in [METRICS, HISTORY] {
            self.cut_log(log, state.step)?;
        }
        Ok(Some(state))
    }

    /// Appends one JSON object as a line.
    pub(crate) fn log(&self, name: &str, line: &str) -> Result<()> {
        let path = self.root.join(name);
        let mut file = fs::OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::file(&path, e))?;
        file.write_all(format!("{}\n", line.trim_end()).as_bytes()).map_err(|e| Error::file(&path, e))
    }

    /// Drops lines of steps after `step`, and a last line that a kill cut short.
    fn cut_log(&self, name: &str, step: u64) -> Result<()> {
        let path = self.root.join(name);
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let keep = |line: &&str| {
            serde_json::from_str::<serde_json::Value>(line)
                .is_ok_and(|v| v.get("step").and_then(serde_json::Value::as_u64).is_some_and(|s| s <= step))
        };
        let kept: String = text.lines().filter(keep).flat_map(|l| [l, "\n"]).collect();
        write_atomic(&path, |f| f.write_all(kept.as_bytes()))
    }
}

/// One line per logged step.
pub(crate) const METRICS: &str = "metrics.jsonl";
/// One line per step from [`TrainStep::record`](crate::TrainStep::record).
pub(crate) const HISTORY: &str = "history.jsonl";

/// Makes renames in `folder` last.
fn sync_folder(folder: &Path) -> Result<()> {
    fs::File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::file(folder, e))
}
