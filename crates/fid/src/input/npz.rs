//! numpy's `.npz`: a zip archive of `.npy` arrays. Headers are believed only as far as the bytes are there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use half::f16;
use zip::ZipArchive;

use super::npy::{Dtype, Header};
use crate::{Error, Result};

/// Most bytes that an array read at once may have; images are streamed and have no limit.
const LARGEST: usize = 4 << 30;

/// Something that can be read from any place.
trait Source: Read + Seek + Send {}
impl<T: Read + Seek + Send> Source for T {}

/// An open `.npz` with the headers of its arrays read and checked against their sizes. An array that cannot be read is
/// an error when it is asked for: others of the file do not suffer from it.
pub struct Npz {
    path: PathBuf,
    archive: ZipArchive<Box<dyn Source>>,
    /// By name; or why one cannot be read.
    arrays: BTreeMap<String, std::result::Result<Array, String>>,
}

#[derive(Debug)]
struct Array {
    member: usize,
    header: Header,
    /// Bytes of its values.
    bytes: usize,
}

impl std::fmt::Debug for Npz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Npz")
            .field("path", &self.path)
            .field("arrays", &self.arrays)
            .finish_non_exhaustive()
    }
}

impl Npz {
    /// Opens the file `path`.
    ///
    /// # Errors
    /// When it is no zip archive.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file =
            File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
        Self::new(Box::new(BufReader::with_capacity(1 << 20, file)), path)
    }

    /// The same from the content of a file; `source` is its name in messages.
    pub fn parse(bytes: Vec<u8>, source: impl AsRef<Path>) -> Result<Self> {
        Self::new(Box::new(Cursor::new(bytes)), source.as_ref())
    }

    fn new(source: Box<dyn Source>, path: &Path) -> Result<Self> {
        let failed = |message: String| Error::file(path, message);
        let mut archive = ZipArchive::new(source)
            .map_err(|e| failed(format!("not a readable .npz (a zip archive): {e}")))?;
        let mut arrays = BTreeMap::new();
        for member in 0..archive.len() {
            let name = archive
                .name_for_index(member)
                .and_then(|name| name.ok())
                .and_then(|name| Some(name.strip_suffix(".npy")?.to_owned()));
            if let Some(name) = name {
                arrays.insert(name, array(&mut archive, member));
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            archive,
            arrays,
        })
    }

    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of its arrays, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// Whether there is an array `name`.
    pub fn has(&self, name: &str) -> bool {
        self.arrays.contains_key(name)
    }

    /// Shape of the array `name` and numpy's name of its type.
    pub fn shape(&self, name: &str) -> Result<(&[usize], &'static str)> {
        let header = &self.array(name)?.header;
        Ok((&header.shape, header.dtype.name()))
    }

    fn fail(&self, message: String) -> Error {
        Error::file(&self.path, message)
    }

    fn array(&self, name: &str) -> Result<&Array> {
        match self.arrays.get(name) {
            Some(Ok(array)) => Ok(array),
            Some(Err(why)) => Err(self.fail(format!("array `{name}`: {why}"))),
            None => {
                let all: Vec<&str> = self.names().collect();
                Err(self.fail(format!(
                    "has no array `{name}`; it has [{}]",
                    all.join(", ")
                )))
            }
        }
    }

    /// Shape and values, row-major, of an array of floating-point numbers; all finite.
    pub fn floats(&mut self, name: &str) -> Result<(Vec<usize>, Vec<f64>)> {
        let (shape, dtype, data) = self.whole(name)?;
        let values: Vec<f64> = match dtype {
            Dtype::F16 => each(&data, |b| f16::from_le_bytes(b).to_f64()),
            Dtype::F32 => each(&data, |b| f32::from_le_bytes(b).into()),
            Dtype::F64 => each(&data, f64::from_le_bytes),
            other => {
                let found = other.name();
                return Err(self.fail(format!(
                    "`{name}` is {found} {shape:?}, expected floating-point numbers"
                )));
            }
        };
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(self.fail(format!(
                "`{name}` {shape:?} holds {} at position {at}; finite numbers are expected",
                values[at]
            )));
        }
        Ok((shape, values))
    }

    /// A matrix (N, D) of floating-point numbers in f32, row-major, with N and D; neither is zero.
    pub fn matrix(&mut self, name: &str) -> Result<(Vec<f32>, [usize; 2])> {
        let (shape, values) = self.floats(name)?;
        match shape[..] {
            [rows, columns] if rows > 0 && columns > 0 => Ok((
                values.into_iter().map(|v| v as f32).collect(),
                [rows, columns],
            )),
            _ => Err(self.fail(format!(
                "`{name}` is {shape:?}, expected floating-point numbers (N, D)"
            ))),
        }
    }

    /// The one number of an array, whatever its type.
    pub fn number(&mut self, name: &str) -> Result<f64> {
        let floating = matches!(
            self.array(name)?.header.dtype,
            Dtype::F16 | Dtype::F32 | Dtype::F64
        );
        let (shape, values) = match floating {
            true => self.floats(name)?,
            false => {
                let (shape, values) = self.integers(name)?;
                (shape, values.into_iter().map(|v| v as f64).collect())
            }
        };
        match values[..] {
            [value] => Ok(value),
            _ => Err(self.fail(format!("`{name}` is {shape:?}, expected one number"))),
        }
    }

    /// Shape and values, row-major, of an array of integers.
    pub fn integers(&mut self, name: &str) -> Result<(Vec<usize>, Vec<i64>)> {
        let (shape, dtype, data) = self.whole(name)?;
        let values = match dtype {
            Dtype::I8 => each(&data, |[b]| i8::from_le_bytes([b]).into()),
            Dtype::U8 => each(&data, |[b]| b.into()),
            Dtype::I16 => each(&data, |b| i16::from_le_bytes(b).into()),
            Dtype::U16 => each(&data, |b| u16::from_le_bytes(b).into()),
            Dtype::I32 => each(&data, |b| i32::from_le_bytes(b).into()),
            Dtype::U32 => each(&data, |b| u32::from_le_bytes(b).into()),
            Dtype::I64 => each(&data, i64::from_le_bytes),
            other => {
                let found = other.name();
                return Err(self.fail(format!("`{name}` is {found} {shape:?}, expected integers")));
            }
        };
        Ok((shape, values))
    }

    /// The bytes of an array of uint8, as text or images, row-major.
    pub fn bytes(&mut self, name: &str) -> Result<(Vec<usize>, Vec<u8>)> {
        match self.whole(name)? {
            (shape, Dtype::U8, data) => Ok((shape, data)),
            (shape, other, _) => {
                let found = other.name();
                Err(self.fail(format!("`{name}` is {found} {shape:?}, expected uint8")))
            }
        }
    }

    /// Everything of one array, row-major.
    fn whole(&mut self, name: &str) -> Result<(Vec<usize>, Dtype, Vec<u8>)> {
        let Array { header, bytes, .. } = self.array(name)?;
        let (header, bytes) = (header.clone(), *bytes);
        if bytes > LARGEST {
            return Err(self.fail(format!(
                "`{name}` has {bytes} bytes, expected at most {LARGEST}"
            )));
        }
        let mut data = Vec::new();
        let failed = |path: &Path, e: std::io::Error| {
            Error::file(path, format!("`{name}` cannot be read: {e}"))
        };
        let path = self.path.clone();
        // Grows with what is there: a header and an archive that lie together cost nothing.
        self.values(name)?
            .read_to_end(&mut data)
            .map_err(|e| failed(&path, e))?;
        if data.len() != bytes {
            return Err(self.fail(format!(
                "`{name}` ends after {} of {bytes} bytes",
                data.len()
            )));
        }
        let data = if header.fortran {
            row_major(&data, &header)
        } else {
            data
        };
        Ok((header.shape, header.dtype, data))
    }

    /// A reader over the bytes of an array's values as they are stored.
    fn values(&mut self, name: &str) -> Result<impl Read> {
        let Array {
            member,
            header,
            bytes,
        } = self.array(name)?;
        let (member, skip, bytes) = (*member, header.length, *bytes);
        let path = self.path.clone();
        let failed =
            move |e: &dyn std::fmt::Display| Error::file(&path, format!("a damaged .npz: {e}"));
        let mut file = self.archive.by_index(member).map_err(|e| failed(&e))?;
        std::io::copy(&mut (&mut file).take(skip as u64), &mut std::io::sink())
            .map_err(|e| failed(&e))?;
        // One byte more, so that the archive's checksum is compared when the last one is read.
        Ok(file.take(bytes as u64 + 1))
    }

    /// Checks that the array `name` holds images, uint8 (N, H, W, 3), and returns N and [H, W].
    pub fn image_shape(&self, name: &str) -> Result<(usize, [usize; 2])> {
        let Array { header, .. } = self.array(name)?;
        let shape = &header.shape;
        let found = format!("`{name}` is {} {shape:?}", header.dtype.name());
        if header.dtype != Dtype::U8 {
            return Err(self.fail(format!(
                "{found}, expected images as uint8 (N, H, W, 3); quantise them as the sampler would"
            )));
        }
        match shape[..] {
            [n, height, width, 3] if n > 0 && height > 0 && width > 0 => Ok((n, [height, width])),
            [0, ..] => Err(self.fail(format!("{found}: there is no image"))),
            [_, 3, _, _] => Err(self.fail(format!(
                "{found}, expected (N, H, W, 3): the channels come last; transpose to (0, 2, 3, 1)"
            ))),
            _ => Err(self.fail(format!("{found}, expected RGB images (N, H, W, 3)"))),
        }
    }

    /// Hands the images of the array `name` to `take`, `batch` at a time and in order: their bytes, one after the
    /// other, each H × W × 3. Only one batch stands in memory, except of arrays in Fortran order.
    pub fn for_each_batch(
        &mut self,
        name: &str,
        batch: usize,
        take: &mut dyn FnMut(Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let (n, [height, width]) = self.image_shape(name)?;
        if batch == 0 {
            return Err(Error::Config(
                "images are read in batches of 0; expected at least 1".into(),
            ));
        }
        let image = height * width * 3;
        if self.array(name)?.header.fortran {
            let (_, data) = self.bytes(name)?;
            return data
                .chunks(batch * image)
                .try_for_each(|images| take(images.to_vec()));
        }
        let path = self.path.clone();
        let mut reader = self.values(name)?;
        for start in (0..n).step_by(batch) {
            let bytes = batch.min(n - start) * image;
            let mut images = Vec::new();
            let found = reader.by_ref().take(bytes as u64).read_to_end(&mut images);
            match found {
                Ok(found) if found == bytes => take(images)?,
                Ok(_) => {
                    return Err(Error::file(
                        &path,
                        format!("`{name}` ends within image {start} to {}", start + batch),
                    ));
                }
                Err(e) => return Err(Error::file(&path, format!("`{name}` cannot be read: {e}"))),
            }
        }
        let mut rest = Vec::new();
        reader
            .read_to_end(&mut rest)
            .map_err(|e| Error::file(&path, format!("`{name}` cannot be read: {e}")))?;
        Ok(())
    }
}

/// The header of a member, which fits the member's size.
fn array(
    archive: &mut ZipArchive<Box<dyn Source>>,
    member: usize,
) -> std::result::Result<Array, String> {
    let mut file = archive
        .by_index(member)
        .map_err(|e| format!("a damaged .npz: {e}"))?;
    let size = file.size();
    let header = Header::read(&mut file)?;
    let bytes = header.data_bytes(size)?;
    Ok(Array {
        member,
        header,
        bytes,
    })
}

/// The values of consecutive `BYTES` bytes.
fn each<const BYTES: usize, T>(data: &[u8], value: impl Fn([u8; BYTES]) -> T) -> Vec<T> {
    data.as_chunks().0.iter().map(|b| value(*b)).collect()
}

/// Columns-first data in row-major order.
fn row_major(data: &[u8], header: &Header) -> Vec<u8> {
    let size = header.dtype.bytes();
    let shape = &header.shape;
    let strides: Vec<usize> = shape
        .iter()
        .scan(1usize, |step, &side| {
            let this = *step;
            *step *= side;
            Some(this)
        })
        .collect();
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0; shape.len()];
    for _ in 0..data.len() / size {
        let at: usize = index.iter().zip(&strides).map(|(i, step)| i * step).sum();
        out.extend_from_slice(&data[at * size..][..size]);
        for (i, &side) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < side {
                break;
            }
            *i = 0;
        }
    }
    out
}
