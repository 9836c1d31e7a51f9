//! Writing a folder of shards.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tinyfusion_core::{Error, LatentBatch, Result};

use super::super::LatentWriter;
use super::super::writer::replace;
use super::{INDEX_FILE, LatentIndex, Shard};

/// A shard of the index that is not what it says.
#[derive(Debug)]
pub struct Damage {
    file: String,
    /// The images that it should hold.
    pub images: Range<u64>,
    /// What is wrong, with the file's name.
    pub error: Error,
}

/// Writes a folder for [`ShardedLatents`](super::ShardedLatents), shard by shard; one that was interrupted is gone on with.
#[derive(Debug)]
pub struct ShardWriter {
    folder: PathBuf,
    index: LatentIndex,
    /// The shard that is being written, and images in it.
    open: Option<(LatentWriter, u64)>,
}

impl ShardWriter {
    /// Begins the folder, or goes on behind its last whole shard.
    ///
    /// # Errors
    /// If `index` is not consistent, or latents of other settings stand in the folder.
    pub fn open(folder: impl AsRef<Path>, index: &LatentIndex) -> Result<Self> {
        let folder = folder.as_ref().to_path_buf();
        index
            .check()
            .map_err(|what| Error::usage(format!("the index of latents {what}")))?;
        fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, e))?;
        let path = folder.join(INDEX_FILE);
        let mut index = LatentIndex {
            shards: Vec::new(),
            ..index.clone()
        };
        if path.exists() {
            let there = LatentIndex::read(&folder)?;
            index.shards.clone_from(&there.shards);
            if there != index {
                let (there, here) = (differing(&there, &index), differing(&index, &there));
                return Err(Error::usage(format!(
                    "{}: latents of other settings stand there ({there}; asked for: {here}); use another folder",
                    path.display()
                )));
            }
        }
        let writer = Self {
            folder,
            index,
            open: None,
        };
        writer.save()?;
        Ok(writer)
    }

    /// The shards that are not what the index says: cut short, overwritten or gone. Headers, sizes and labels are looked
    /// at, the latents themselves are not.
    pub fn damaged(&self) -> Vec<Damage> {
        let mut found = Vec::new();
        let mut start = 0;
        for shard in &self.index.shards {
            let images = start..start + shard.images;
            start = images.end;
            if let Err(error) = self.index.open_shard(&self.folder, shard) {
                found.push(Damage {
                    file: shard.file.clone(),
                    images,
                    error,
                });
            }
        }
        found
    }

    /// Begins such a shard anew, for all of its images in order. What stands there is replaced when it is finished.
    pub fn again(&self, damage: &Damage) -> Result<LatentWriter> {
        self.create(&damage.file, damage.images.end - damage.images.start)
    }

    /// Images in whole shards: where encoding goes on.
    pub fn written(&self) -> u64 {
        self.index.written()
    }

    /// Appends images: x (B, V·P·C, H, W) as [`LatentIndex::row_shape`] has it, y (B,). Batches may cross the end of a shard.
    pub fn push(&mut self, batch: &LatentBatch) -> Result<()> {
        let count = batch.y.dim(0)?;
        let mut done = 0;
        while done < count {
            let room = self
                .index
                .shard_images
                .min(self.index.images - self.written());
            if room == 0 {
                return Err(Error::usage(format!(
                    "{} is announced with {} images, and has them",
                    self.folder.display(),
                    self.index.images
                )));
            }
            let (mut writer, held) = match self.open.take() {
                Some(open) => open,
                None => (self.begin(room)?, 0),
            };
            let take = (count - done).min((room - held) as usize);
            writer.push(&LatentBatch {
                x: batch.x.narrow(0, done, take)?,
                y: batch.y.narrow(0, done, take)?,
            })?;
            done += take;
            let held = held + take as u64;
            if held < room {
                self.open = Some((writer, held));
                continue;
            }
            writer.finish()?;
            self.index.shards.push(Shard {
                file: self.next_name(),
                images: room,
            });
            self.save()?;
        }
        Ok(())
    }

    /// Ends the folder.
    ///
    /// # Errors
    /// If images are missing.
    pub fn finish(self) -> Result<()> {
        let held = self.open.as_ref().map_or(0, |(_, held)| *held);
        let found = self.written() + held;
        if found == self.index.images {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{} is announced with {} images, but got {found}",
            self.folder.display(),
            self.index.images
        )))
    }

    fn begin(&self, images: u64) -> Result<LatentWriter> {
        self.create(&self.next_name(), images)
    }

    fn create(&self, file: &str, images: u64) -> Result<LatentWriter> {
        let index = &self.index;
        LatentWriter::create(
            self.folder.join(file),
            images as usize,
            index.row_shape(),
            index.classes,
            index.dtype,
        )
    }

    fn next_name(&self) -> String {
        format!("shard-{:05}.safetensors", self.index.shards.len())
    }

    fn save(&self) -> Result<()> {
        let path = self.folder.join(INDEX_FILE);
        let failed = |e: io::Error| Error::file(&path, format!("cannot be written: {e}"));
        let text = serde_json::to_string_pretty(&self.index).map_err(|e| failed(e.into()))?;
        replace(&path, format!("{text}\n").as_bytes()).map_err(failed)
    }
}

/// The settings of `index` that are not those of `other`, for people.
fn differing(index: &LatentIndex, other: &LatentIndex) -> String {
    let fields = |i: &LatentIndex| {
        let own = [
            ("content", format!("{:?}", i.content)),
            ("flips", i.flips.to_string()),
            ("shape", format!("{:?}", i.shape)),
            ("classes", i.classes.to_string()),
            ("scale", i.scale.to_string()),
            ("dtype", i.dtype.name().into()),
            ("images", i.images.to_string()),
            ("shard_images", i.shard_images.to_string()),
        ];
        let own = own.map(|(key, value)| (key.to_string(), value));
        let origin = i
            .origin
            .iter()
            .map(|(k, v)| (format!("origin {k}"), v.clone()));
        own.into_iter().chain(origin).collect::<Vec<_>>()
    };
    let others = fields(other);
    let said: Vec<String> = fields(index)
        .into_iter()
        .filter(|field| !others.contains(field))
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    match said.is_empty() {
        true => "nothing of it".into(),
        false => said.join(", "),
    }
}
