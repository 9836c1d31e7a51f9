//! A folder of PNG, JPEG and WebP images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::{ColorType, ImageDecoder, ImageFormat, ImageReader};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::hash::{hex, sha256};
use crate::{Error, Result};

/// Endings (in lower case) of the files that count as images.
const ENDINGS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// How many files a message lists.
const LISTED: usize = 20;

/// The images below a folder, sorted by path, all of one size.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    files: Vec<PathBuf>,
    size: [usize; 2],
    /// Files of a lossy format, and one of them.
    lossy: (usize, Option<PathBuf>),
    /// Files that are not 8-bit RGB, and one of them.
    converted: (usize, Option<PathBuf>),
}

/// A file that cannot be read, and why.
pub(crate) type Unread = (PathBuf, String);

/// What the first bytes of a file tell.
struct Head {
    size: [usize; 2],
    lossy: bool,
    rgb: bool,
}

impl Folder {
    /// Lists the images below `root` and reads the head of each.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        collect(root, &mut files)?;
        if files.is_empty() {
            return Err(Error::file(
                root,
                format!(
                    "has no image ({}), also not in deeper folders",
                    ENDINGS.join(", ")
                ),
            ));
        }
        let heads: Vec<std::result::Result<Head, String>> =
            files.par_iter().map(|path| head(path)).collect();
        let failures: Vec<Unread> = files
            .iter()
            .zip(&heads)
            .filter_map(|(path, head)| Some((path.clone(), head.as_ref().err()?.clone())))
            .collect();
        unreadable(root, &failures)?;
        let mut sizes: BTreeMap<[usize; 2], (usize, &Path)> = BTreeMap::new();
        let (mut lossy, mut converted) = ((0, None), (0, None));
        for (path, head) in files.iter().zip(heads.iter().flatten()) {
            sizes.entry(head.size).or_insert((0, path)).0 += 1;
            for (count, counted) in [(&mut lossy, head.lossy), (&mut converted, !head.rgb)] {
                if counted {
                    count.0 += 1;
                    count.1.get_or_insert_with(|| path.clone());
                }
            }
        }
        if sizes.len() > 1 {
            let all: Vec<String> = sizes
                .iter()
                .take(LISTED)
                .map(|([h, w], (count, path))| format!("{count} of {w} x {h} ({})", path.display()))
                .collect();
            return Err(Error::file(
                root,
                format!(
                    "holds images of {} sizes: {}; a set has one size, since the network stretches every image to a square. Crop and resize them as the other side was",
                    sizes.len(),
                    all.join(", ")
                ),
            ));
        }
        let size = sizes.keys().next().copied().unwrap_or_default();
        Ok(Self {
            root: root.to_path_buf(),
            files,
            size,
            lossy,
            converted,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.files.len()
    }

    pub(super) fn size(&self) -> [usize; 2] {
        self.size
    }

    /// What to know before quoting a number.
    pub(super) fn warnings(&self) -> Vec<String> {
        let example = |path: &Option<PathBuf>| {
            path.as_ref()
                .map(|p| p.display().to_string())
                .unwrap_or_default()
        };
        let n = self.files.len();
        let mut all = Vec::new();
        if self.lossy.0 > 0 {
            all.push(format!(
                "{} of {n} images are JPEG (such as {}): lossy compression moves the FID by points; save the images as PNG, unless the reference was made from JPEG the same way",
                self.lossy.0,
                example(&self.lossy.1)
            ));
        }
        if self.converted.0 > 0 {
            all.push(format!(
                "{} of {n} images are not 8-bit RGB (such as {}): grey became three equal channels, transparency was dropped",
                self.converted.0,
                example(&self.converted.1)
            ));
        }
        all
    }

    /// SHA-256 over the relative names and contents of all files.
    pub(super) fn sha256(&self) -> Result<String> {
        let hashes: Vec<String> = self
            .files
            .par_iter()
            .map(|path| {
                let bytes = std::fs::read(path)
                    .map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
                Ok(sha256(&bytes))
            })
            .collect::<Result<_>>()?;
        let mut all = Sha256::new();
        for (path, hash) in self.files.iter().zip(hashes) {
            let name = path
                .strip_prefix(&self.root)
                .unwrap_or(path)
                .to_string_lossy();
            all.update(format!("{hash} {name}\n"));
        }
        Ok(hex(all))
    }

    /// The pixels of image `index`: RGB bytes, row by row.
    pub(super) fn decode(&self, index: usize) -> std::result::Result<Vec<u8>, Unread> {
        let path = &self.files[index];
        let failed = |message: String| (path.clone(), message);
        let picture = ImageReader::open(path)
            .and_then(ImageReader::with_guessed_format)
            .map_err(|e| failed(e.to_string()))?
            .decode()
            .map_err(|e| failed(e.to_string()))?
            .into_rgb8();
        let size = [picture.height() as usize, picture.width() as usize];
        if size != self.size {
            return Err(failed(format!(
                "its size became {size:?} while it was read"
            )));
        }
        Ok(picture.into_raw())
    }

    pub(super) fn unreadable(&self, failures: &[Unread]) -> Result<()> {
        unreadable(&self.root, failures)
    }
}

/// One error that lists the files that cannot be read, if there are any.
fn unreadable(root: &Path, failures: &[Unread]) -> Result<()> {
    if failures.is_empty() {
        return Ok(());
    }
    let listed: Vec<String> = failures
        .iter()
        .take(LISTED)
        .map(|(path, cause)| format!("\n  {}: {cause}", path.display()))
        .collect();
    let more = failures.len().saturating_sub(LISTED);
    let more = if more > 0 {
        format!("\n  and {more} more")
    } else {
        String::new()
    };
    Err(Error::file(
        root,
        format!(
            "{} images cannot be read; a metric over the others would be one of another set. Replace or remove them:{}{more}",
            failures.len(),
            listed.concat()
        ),
    ))
}

/// By content, not by name: ImageNet has PNG files called `.JPEG`.
fn head(path: &Path) -> std::result::Result<Head, String> {
    let reader = ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(|e| e.to_string())?;
    // WebP may be lossy or not; its head does not say so here.
    let lossy = reader.format() == Some(ImageFormat::Jpeg);
    let decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err("it has no pixels".into());
    }
    Ok(Head {
        size: [height as usize, width as usize],
        lossy,
        rgb: decoder.color_type() == ColorType::Rgb8,
    })
}

/// Images below `folder`, sorted; names that begin with a dot are left out.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(folder)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut paths = list()
        .map_err(|e| Error::file(folder, format!("cannot be read as a folder of images: {e}")))?;
    paths.retain(|p| {
        p.file_name()
            .is_some_and(|name| !name.to_string_lossy().starts_with('.'))
    });
    paths.sort();
    for path in paths {
        if path.is_dir() {
            collect(&path, files)?;
        } else if path
            .extension()
            .is_some_and(|e| ENDINGS.contains(&e.to_string_lossy().to_lowercase().as_str()))
        {
            files.push(path);
        }
    }
    Ok(())
}
