use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tinyfusion_checkpoint::{
    DTypePolicy, Metadata, load_expected, remove_partials, save, write_atomic,
};
use tinyfusion_core::{Error, ParamSpec, Result, StateDict};

use crate::ParamGroup;
use crate::group::Snapshot;
use crate::settings::refuse_other_settings;

/// The folder of one training run: `config.toml`, `metrics.jsonl`, `history.jsonl` and
/// `checkpoints/step-000500/{model,ema,optimizer}.safetensors + state.json`.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
}

/// What a checkpoint remembers beside tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    /// Steps done.
    pub(crate) step: u64,
    /// Updates applied: steps less the skipped ones.
    pub(crate) updates: u64,
    /// Steps skipped because the loss or the gradient was not finite.
    pub(crate) skipped: u64,
    /// Those of them since the last update; checkpoints of the first version lack it.
    #[serde(default)]
    pub(crate) skipped_in_a_row: u64,
    /// Seconds spent, over all parts of the run.
    pub(crate) seconds: f64,
}

impl State {
    /// So many steps more were skipped.
    pub(crate) fn skip(&mut self, steps: u64) {
        self.skipped += steps;
        self.skipped_in_a_row += steps;
    }
}

/// One line per logged step.
pub(crate) const METRICS: &str = "metrics.jsonl";
/// One line per step from [`TrainStep::record`](crate::TrainStep::record).
pub(crate) const HISTORY: &str = "history.jsonl";
const STATE: &str = "state.json";

impl RunDir {
    /// Opens or makes the folder and writes the resolved settings. A folder that holds a run with other
    /// settings, or anything that is no run, is refused.
    pub fn open(root: impl Into<PathBuf>, settings: &impl Serialize) -> Result<Self> {
        let root = root.into();
        let text = toml::to_string_pretty(settings)
            .map_err(|e| Error::run(format!("the settings cannot be written as TOML: {e}")))?;
        let folder = root.join("checkpoints");
        let path = root.join("config.toml");
        let make_folder = || {
            fs::create_dir_all(&folder)
                .map_err(|e| Error::file(&folder, format!("could not be made: {e}")))
        };
        match fs::read_to_string(&path) {
            Ok(old) => {
                refuse_other_settings(&path, &old, &text)?;
                make_folder()?;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                refuse_other_things(&root)?;
                make_folder()?;
                write_atomic(&path, |f| f.write_all(text.as_bytes()))?;
            }
            Err(e) => return Err(Error::file(&path, format!("could not be read: {e}"))),
        }
        Ok(Self { root })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Steps that have a checkpoint, ascending.
    pub fn checkpoints(&self) -> Result<Vec<u64>> {
        let folder = self.folder();
        let failed = |e| Error::file(&folder, format!("could not be read: {e}"));
        let mut steps = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let step = name
                .to_str()
                .and_then(|n| n.strip_prefix("step-")?.parse().ok());
            // Only the names that are written here: `step-7` or a copy made by hand is not one.
            steps.extend(step.filter(|s| name.to_str() == Some(&step_name(*s))));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn folder(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    fn checkpoint(&self, step: u64) -> PathBuf {
        self.folder().join(step_name(step))
    }

    /// Keeps other processes from training in this folder until the returned file is dropped; the system
    /// lets go of it when a process is killed. Also clears away what such a process left half-written.
    pub(crate) fn lock(&self) -> Result<Option<File>> {
        let folder = self.folder();
        // Elsewhere a folder cannot be opened as a file.
        let lock = if cfg!(unix) {
            let file = File::open(&folder)
                .map_err(|e| Error::file(&folder, format!("could not be opened: {e}")))?;
            match file.try_lock() {
                Ok(()) => Some(file),
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::usage(format!(
                        "{}: another process trains in this folder; wait for it, or use another folder",
                        self.root.display()
                    )));
                }
                Err(TryLockError::Error(e)) => {
                    tracing::debug!(folder = %folder.display(), "no locks here: {e}");
                    None
                }
            }
        } else {
            None
        };
        remove_partials(&self.root)?;
        remove_partials(&folder)?;
        Ok(lock)
    }

    /// Writes a checkpoint beside its place and renames it, then removes the older ones.
    pub(crate) fn save(&self, groups: &[ParamGroup], state: &State) -> Result<()> {
        let place = self.checkpoint(state.step);
        let partial = place.with_extension("partial");
        if let Err(cause) = self.write_checkpoint(groups, state, &partial, &place) {
            // Whatever went wrong (a full disk, say), only whole checkpoints stay.
            let _ = fs::remove_dir_all(&partial);
            let stands = match self.checkpoints()?.last() {
                Some(step) => format!(
                    "the checkpoint of step {step} is whole, and the same command resumes from it"
                ),
                None => "there is none before it".into(),
            };
            return Err(Error::file(
                &place,
                format!("this checkpoint could not be written; {stands}. The cause: {cause}"),
            ));
        }
        for old in self.checkpoints()?.into_iter().filter(|s| *s < state.step) {
            let old = self.checkpoint(old);
            // Not worth the end of a long run: the next checkpoint tries again.
            if let Err(e) = fs::remove_dir_all(&old) {
                tracing::warn!(
                    "{}: an old checkpoint could not be removed: {e}",
                    old.display()
                );
            }
        }
        Ok(())
    }

    fn write_checkpoint(
        &self,
        groups: &[ParamGroup],
        state: &State,
        partial: &Path,
        place: &Path,
    ) -> Result<()> {
        // The lines up to this step must not be lost to a power cut that the checkpoint survives.
        for log in [METRICS, HISTORY] {
            let path = self.root.join(log);
            match OpenOptions::new()
                .append(true)
                .open(&path)
                .and_then(|f| f.sync_all())
            {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::file(&path, e)),
                _ => {}
            }
        }
        fs::create_dir(partial)
            .map_err(|e| Error::file(partial, format!("could not be made: {e}")))?;
        let Snapshot {
            model,
            ema,
            optimizer,
        } = Snapshot::of(groups);
        for (name, dict) in [("model", model), ("ema", ema), ("optimizer", optimizer)] {
            let path = partial.join(format!("{name}.safetensors"));
            save(path, &dict, &Metadata::new(), DTypePolicy::Keep)?;
        }
        let text = serde_json::to_string_pretty(state).map_err(|e| Error::run(e.to_string()))?;
        write_atomic(partial.join(STATE), |f| f.write_all(text.as_bytes()))?;
        fs::rename(partial, place)
            .map_err(|e| Error::file(place, format!("could not be renamed: {e}")))?;
        sync_folder(&self.folder())
    }

    /// Brings `groups` to the newest checkpoint, if there is one, and cuts the logs back to it. After an
    /// error nothing is changed.
    pub(crate) fn resume(&self, groups: &[ParamGroup], device: &Device) -> Result<Option<State>> {
        let Some(&step) = self.checkpoints()?.last() else {
            self.cut_logs(0)?;
            return Ok(None);
        };
        let place = self.checkpoint(step);
        let (state, snapshot) = read_checkpoint(&place, step, groups, device).map_err(|e| match e {
            Error::File { path, message } => Error::File {
                path,
                message: format!(
                    "{message}; the run cannot go on from this checkpoint: bring the file back, or remove \
                     the folder {} to start from the checkpoint before it or from the beginning",
                    place.display()
                ),
            },
            other => other,
        })?;
        groups.iter().try_for_each(|g| g.import(&snapshot))?;
        self.cut_logs(step)?;
        Ok(Some(state))
    }

    /// Appends the record of `step`, one JSON object, as a line.
    pub(crate) fn log(&self, name: &str, step: u64, line: &str) -> Result<()> {
        let path = self.root.join(name);
        let line = line.trim_end();
        // A line that a resume could not find again would be there twice, or vanish.
        if line.contains('\n') || step_of(line) != Some(step) {
            return Err(Error::run(format!(
                "{}: a record is one line of JSON with `\"step\": {step}`, found: {line}",
                path.display()
            )));
        }
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut f| f.write_all(format!("{line}\n").as_bytes()))
            .map_err(|e| Error::file(&path, format!("could not be written: {e}")))
    }

    /// Drops the lines of steps after `step`, and a last line that a kill cut short.
    fn cut_logs(&self, step: u64) -> Result<()> {
        for name in [METRICS, HISTORY] {
            let path = self.root.join(name);
            let text = match fs::read(&path) {
                Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::file(&path, format!("could not be read: {e}"))),
            };
            let kept: String = text
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n') && step_of(line).is_some_and(|s| s <= step))
                .collect();
            // An unchanged log needs no new copy, for which a full disk would have no room.
            if kept != text {
                write_atomic(&path, |f| f.write_all(kept.as_bytes()))?;
            }
        }
        Ok(())
    }
}

/// An error where `root`, which has no config.toml, has something in it that is not a run's.
fn refuse_other_things(root: &Path) -> Result<()> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::file(root, format!("could not be read: {e}"))),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::file(root, format!("could not be read: {e}")))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !["checkpoints", METRICS, HISTORY].contains(&name.as_str())
            && !name.ends_with(".partial")
        {
            return Err(Error::usage(format!(
                "{}: this folder holds no training run, but `{name}`; use a new or an empty folder",
                root.display()
            )));
        }
    }
    Ok(())
}

fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The entry `step` of a line of JSON.
fn step_of(line: &str) -> Option<u64> {
    serde_json::from_str::<Value>(line)
        .ok()?
        .get("step")?
        .as_u64()
}

/// Reads and checks a whole checkpoint before anything is taken from it.
fn read_checkpoint(
    place: &Path,
    step: u64,
    groups: &[ParamGroup],
    device: &Device,
) -> Result<(State, Snapshot)> {
    let path = place.join(STATE);
    let text = fs::read_to_string(&path)
        .map_err(|e| Error::file(&path, format!("could not be read: {e}")))?;
    let state: State = serde_json::from_str(&text)
        .map_err(|e| Error::file(&path, format!("does not parse: {e}")))?;
    if state.step != step || state.updates + state.skipped != step {
        return Err(Error::file(
            &path,
            format!(
                "belongs to another step: its folder is of step {step}, it says step {} with {} updates and {} skipped",
                state.step, state.updates, state.skipped
            ),
        ));
    }
    let [model, ema, optimizer] = Snapshot::specs(groups);
    let snapshot = Snapshot {
        model: read_tensors(place, "model", &model, device)?,
        ema: read_tensors(place, "ema", &ema, device)?,
        optimizer: read_tensors(place, "optimizer", &optimizer, device)?,
    };
    Ok((state, snapshot))
}

fn read_tensors(
    place: &Path,
    name: &str,
    specs: &[ParamSpec],
    device: &Device,
) -> Result<StateDict> {
    let path = place.join(format!("{name}.safetensors"));
    let tensors = load_expected(&path, specs, DTypePolicy::Keep, device)?.tensors;
    if let Some((name, t)) = tensors.iter().find(|(_, t)| t.dtype() != DType::F32) {
        return Err(Error::file(
            &path,
            format!("`{name}` is {:?}, f32 is expected", t.dtype()),
        ));
    }
    Ok(tensors)
}

/// Makes renames in `folder` last.
fn sync_folder(folder: &Path) -> Result<()> {
    // Elsewhere a folder cannot be opened as a file; the rename is then as durable as the system makes it.
    if cfg!(unix) {
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(|e| Error::file(folder, format!("could not be synced: {e}")))?;
    }
    Ok(())
}
