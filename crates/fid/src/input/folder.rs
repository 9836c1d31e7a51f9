//! A folder of PNG, JPEG and WebP images.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use image::{ColorType, ImageDecoder, ImageFormat, ImageReader};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::hash::{hex, sha256};
use crate::{Error, Result};

/// Endings (in lower case) of the files that count as images.
const ENDINGS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Endings of pictures that are not read, and so are named instead of passed over.
const OTHER_ENDINGS: [&str; 14] = [
    "bmp", "gif", "tif", "tiff", "jfif", "jpe", "jp2", "jxl", "avif", "heic", "heif", "ppm", "tga",
    "exr",
];

/// How many files a message lists.
const LISTED: usize = 20;

/// The images below a folder, sorted by path, all of one size.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    files: Vec<PathBuf>,
    size: [usize; 2],
    /// What to know of them before quoting a number.
    warnings: Vec<String>,
}

/// A file that cannot be read, and why.
pub(crate) type Unread = (PathBuf, String);

/// What the first bytes of a file tell.
struct Head {
    size: [usize; 2],
    lossy: Option<Lossy>,
    color: ColorType,
}

/// Formats that lose something.
#[derive(Clone, Copy, PartialEq)]
enum Lossy {
    Jpeg,
    WebP,
}

/// What lies below a folder.
#[derive(Default)]
struct Found {
    files: Vec<PathBuf>,
    /// Pictures in formats that are not read.
    others: Vec<PathBuf>,
    /// Folders that were reached a second time, by a link.
    again: Vec<PathBuf>,
    /// The folders themselves, without links.
    seen: BTreeSet<PathBuf>,
}

impl Folder {
    /// Lists the images below `root` and reads the head of each.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let found = Found::below(root)?;
        if found.files.is_empty() {
            let others = match found.others.first() {
                Some(one) => format!(
                    "; the {} pictures in other formats (such as {}) are not read, save them as PNG",
                    found.others.len(),
                    one.display()
                ),
                None => String::new(),
            };
            return Err(Error::file(
                root,
                format!(
                    "has no image ({}), also not in deeper folders{others}",
                    ENDINGS.join(", ")
                ),
            ));
        }
        Self::of(root, found)
    }

    /// The same, or `None` if there is no image.
    pub(super) fn find(root: &Path) -> Result<Option<Self>> {
        let found = Found::below(root)?;
        match found.files.is_empty() {
            true => Ok(None),
            false => Self::of(root, found).map(Some),
        }
    }

    fn of(root: &Path, found: Found) -> Result<Self> {
        let files = &found.files;
        let heads: Vec<std::result::Result<Head, String>> =
            files.par_iter().map(|path| head(path)).collect();
        let failures: Vec<Unread> = files
            .iter()
            .zip(&heads)
            .filter_map(|(path, head)| Some((path.clone(), head.as_ref().err()?.clone())))
            .collect();
        unreadable(root, &failures)?;
        let mut sizes: BTreeMap<[usize; 2], (usize, &Path)> = BTreeMap::new();
        for (path, head) in files.iter().zip(heads.iter().flatten()) {
            sizes.entry(head.size).or_insert((0, path)).0 += 1;
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
        let warnings = found.warnings(&heads.into_iter().flatten().collect::<Vec<_>>());
        Ok(Self {
            root: root.to_path_buf(),
            files: found.files,
            size,
            warnings,
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
        self.warnings.clone()
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
    let lossy = match reader.format() {
        Some(ImageFormat::Jpeg) => Some(Lossy::Jpeg),
        Some(ImageFormat::WebP) if lossy_webp(path).map_err(|e| e.to_string())? => {
            Some(Lossy::WebP)
        }
        _ => None,
    };
    let decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err("it has no pixels".into());
    }
    Ok(Head {
        size: [height as usize, width as usize],
        lossy,
        color: decoder.color_type(),
    })
}

/// Whether a WebP's pixels are a chunk `VP8 ` (lossy) and not `VP8L` (lossless); of an animation the first decides.
fn lossy_webp(path: &Path) -> std::io::Result<bool> {
    let mut file = BufReader::new(File::open(path)?);
    file.seek(SeekFrom::Start(12))?; // RIFF, size, WEBP
    let mut chunk = [0u8; 8];
    // A few chunks stand before the pixels: VP8X, ICCP, ANIM, ALPH.
    for _ in 0..16 {
        if file.read_exact(&mut chunk).is_err() {
            break;
        }
        let [a, b, c, d, size @ ..] = chunk;
        match &[a, b, c, d] {
            b"VP8 " => return Ok(true),
            b"VP8L" => return Ok(false),
            b"ANMF" => file.seek_relative(16)?, // the frame's own chunks follow
            _ => {
                let size = i64::from(u32::from_le_bytes(size));
                file.seek_relative(size + size % 2)?;
            }
        }
    }
    Ok(false)
}

impl Found {
    fn below(root: &Path) -> Result<Self> {
        let mut found = Self::default();
        found.collect(root)?;
        Ok(found)
    }

    /// Images below `folder`, sorted; names that begin with a dot are left out, and no folder is read twice, so that links
    /// in a circle end.
    fn collect(&mut self, folder: &Path) -> Result<()> {
        let failed = |e: std::io::Error| {
            Error::file(folder, format!("cannot be read as a folder of images: {e}"))
        };
        if !self.seen.insert(folder.canonicalize().map_err(failed)?) {
            self.again.push(folder.to_path_buf());
            return Ok(());
        }
        let list = || -> std::io::Result<Vec<PathBuf>> {
            std::fs::read_dir(folder)?
                .map(|entry| Ok(entry?.path()))
                .collect()
        };
        let mut paths = list().map_err(failed)?;
        paths.retain(|p| {
            p.file_name()
                .is_some_and(|name| !name.to_string_lossy().starts_with('.'))
        });
        paths.sort();
        for path in paths {
            if path.is_dir() {
                self.collect(&path)?;
                continue;
            }
            let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
            match ending.as_deref() {
                Some(ending) if ENDINGS.contains(&ending) => self.files.push(path),
                Some(ending) if OTHER_ENDINGS.contains(&ending) => self.others.push(path),
                _ => {}
            }
        }
        Ok(())
    }

    /// What to know of the images, whose heads these are.
    fn warnings(&self, heads: &[Head]) -> Vec<String> {
        let n = self.files.len();
        let mut all = Vec::new();
        let mut say = |kind: &dyn Fn(&Head) -> bool, what: &str, then: &str| {
            let mut of_kind = self.files.iter().zip(heads).filter(|(_, head)| kind(head));
            if let Some((example, _)) = of_kind.next() {
                all.push(format!(
                    "{} of {n} images are {what} (such as {}): {then}",
                    1 + of_kind.count(),
                    example.display()
                ));
            }
        };
        let then = "lossy compression moves the FID by points; save the images as PNG, unless the reference was made from such files the same way";
        say(&|head| head.lossy == Some(Lossy::Jpeg), "JPEG", then);
        say(&|head| head.lossy == Some(Lossy::WebP), "lossy WebP", then);
        // Grey may be transparent and 16-bit too, so a file is named once for each.
        let is = |head: &Head| {
            (
                !head.color.has_color(),
                head.color.has_alpha(),
                u16::from(head.color.bytes_per_pixel()) > u16::from(head.color.channel_count()),
            )
        };
        say(
            &|head| is(head).0,
            "not 8-bit RGB but grey",
            "grey became three equal channels",
        );
        say(
            &|head| is(head).1,
            "not 8-bit RGB but transparent",
            "transparency was dropped",
        );
        say(
            &|head| is(head).2,
            "not 8-bit RGB but of more bits",
            "their values were rounded to 8 bits",
        );
        if let Some(one) = self.others.first() {
            all.push(format!(
                "{} pictures in other formats (such as {}) lie beside the {n} images and are left out; save them as PNG if they belong to the set",
                self.others.len(),
                one.display()
            ));
        }
        if let Some(one) = self.again.first() {
            all.push(format!(
                "{} folders are linked more than once (such as {}): each was read once",
                self.again.len(),
                one.display()
            ));
        }
        all
    }
}
