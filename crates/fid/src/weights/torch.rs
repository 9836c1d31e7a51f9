//! PyTorch's two file formats: the legacy one (pickles, then storages) of the public Inception weights, and zip.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::rc::Rc;

use zip::ZipArchive;

use super::pickle::{self, Failure, Pickle, Value};
use super::{Dtype, Entry};

/// First number of a legacy file (`torch/serialization.py`).
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
const PROTOCOL: i128 = 1001;

/// A tensor's place in a storage.
struct View {
    storage: Rc<str>,
    dtype: Dtype,
    numel: usize,
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

/// Tensors of a file that begins with a pickle.
pub(super) fn legacy(mut bytes: &[u8]) -> Result<BTreeMap<String, Entry>, Failure> {
    let number = |bytes: &mut &[u8]| match pickle::read(bytes)?.1 {
        Value::Int(value) => Ok(value),
        other => Err(format!("{other:?}, expected a number")),
    };
    let magic = number(&mut bytes)?;
    if magic != MAGIC {
        return Err("a pickle, but not one of torch.save".into());
    }
    let protocol = number(&mut bytes)?;
    if protocol != PROTOCOL {
        return Err(format!(
            "protocol {protocol} of torch.save, expected {PROTOCOL}"
        ));
    }
    pickle::read(&mut bytes)?; // the machine that wrote it
    let (objects, root) = pickle::read(&mut bytes)?;
    let views = views(&objects, &root)?;
    let (keys, list) = pickle::read(&mut bytes)?;
    let Value::List(list) = list else {
        return Err("no list of storages".into());
    };
    let sizes: BTreeMap<&str, Dtype> = views.values().map(|v| (&*v.storage, v.dtype)).collect();
    let mut storages = BTreeMap::new();
    for key in &keys.lists[list] {
        let Value::Text(key) = key else {
            return Err("a storage without a name".into());
        };
        let dtype = sizes
            .get(&**key)
            .ok_or_else(|| format!("storage {key} belongs to no tensor"))?;
        let (count, rest) = bytes
            .split_first_chunk()
            .ok_or("cut off before a storage")?;
        let count = u64::from_le_bytes(*count);
        let length = usize::try_from(count)
            .ok()
            .and_then(|n| n.checked_mul(dtype.bytes()));
        let (data, rest) = length
            .and_then(|n| rest.split_at_checked(n))
            .ok_or_else(|| {
                format!("cut off: storage {key} has {count} values, the file ends before")
            })?;
        bytes = rest;
        storages.insert(key.clone(), data);
    }
    if !bytes.is_empty() {
        return Err(format!("{} bytes behind the last storage", bytes.len()));
    }
    entries(views, |view| {
        let storage = storages.get(&view.storage);
        storage
            .map(|&s| Cow::Borrowed(s))
            .ok_or_else(|| format!("storage {} is missing", view.storage))
    })
}

/// Tensors of a zip archive.
pub(super) fn archive(bytes: &[u8]) -> Result<BTreeMap<String, Entry>, Failure> {
    let mut archive =
        ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("a damaged zip archive: {e}"))?;
    let names: Vec<String> = archive
        .file_names()
        .filter_map(|name| Some(name.ok()?.into_owned()))
        .collect();
    let pickle = names
        .iter()
        .find(|name| name.ends_with("/data.pkl") || *name == "data.pkl")
        .ok_or("a zip archive without data.pkl, so not one of torch.save")?;
    let folder = pickle.trim_end_matches("data.pkl").to_owned();
    if let Some(order) = names
        .iter()
        .find(|name| **name == format!("{folder}byteorder"))
    {
        let order = member(&mut archive, order, 16)?;
        if order != b"little" {
            return Err("big-endian storages; save the weights again on another machine".into());
        }
    }
    // A pickle of 472 tensors has 60 KB; its storages are members of their own.
    let objects = member(&mut archive, pickle, 64 << 20)?;
    let (objects, root) = pickle::read(&mut &*objects)?;
    entries(views(&objects, &root)?, |view| {
        let name = format!("{folder}data/{}", view.storage);
        let length = view.numel.checked_mul(view.dtype.bytes());
        let length = length.filter(|&n| n <= bytes.len()).ok_or_else(|| {
            format!(
                "storage {} claims {} values, more than the file holds",
                view.storage, view.numel
            )
        })?;
        let data = member(&mut archive, &name, length as u64)?;
        if data.len() == length {
            Ok(Cow::Owned(data))
        } else {
            Err(format!(
                "{name} has {} bytes, expected {length}",
                data.len()
            ))
        }
    })
}

/// A member of at most `limit` bytes.
fn member(
    archive: &mut ZipArchive<Cursor<&[u8]>>,
    name: &str,
    limit: u64,
) -> Result<Vec<u8>, Failure> {
    let failed = |e: &dyn std::fmt::Display| format!("{name}: {e}");
    let file = archive.by_name(name).map_err(|e| failed(&e))?;
    let mut data = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut data)
        .map_err(|e| failed(&e))?;
    if data.len() as u64 > limit {
        return Err(failed(&format!("more than the expected {limit} bytes")));
    }
    Ok(data)
}

/// The tensors of a dictionary, by name.
fn views(objects: &Pickle, root: &Value) -> Result<BTreeMap<String, View>, Failure> {
    let Value::Dict(at) = root else {
        return Err("no dictionary of tensors; save the state_dict of the network".into());
    };
    let mut all = BTreeMap::new();
    for (key, value) in &objects.dicts[*at] {
        let (Value::Text(key), Value::Tensor(arguments)) = (key, value) else {
            return Err(format!(
                "an entry {key:?} that is no tensor; save the state_dict of the network"
            ));
        };
        let view = view(objects, *arguments).map_err(|e| format!("`{key}`: {e}"))?;
        all.insert(key.to_string(), view);
    }
    Ok(all)
}

/// Arguments of `_rebuild_tensor_v2`: storage, offset, shape, stride.
fn view(objects: &Pickle, arguments: usize) -> Result<View, Failure> {
    let [Value::Persistent(storage), offset, shape, stride, ..] = &objects.tuples[arguments][..]
    else {
        return Err("a tensor without a storage".into());
    };
    let size = |value: &Value| match value {
        Value::Int(n) => usize::try_from(*n).map_err(|_| format!("the size {n}")),
        other => Err(format!("the size {other:?}")),
    };
    let sizes = |value: &Value| match value {
        Value::Tuple(at) => objects.tuples[*at]
            .iter()
            .map(size)
            .collect::<Result<Vec<_>, _>>(),
        other => Err(format!("the shape {other:?}")),
    };
    let [
        Value::Text(tag),
        Value::Global(class),
        Value::Text(key),
        _,
        numel,
        ..,
    ] = &objects.tuples[*storage][..]
    else {
        return Err("a storage of an unknown form".into());
    };
    if &**tag != "storage" {
        return Err(format!("a `{tag}` instead of a storage"));
    }
    let view = View {
        storage: key.clone(),
        dtype: match &**class {
            "torch FloatStorage" => Dtype::F32,
            "torch DoubleStorage" => Dtype::F64,
            "torch HalfStorage" => Dtype::F16,
            "torch BFloat16Storage" => Dtype::BF16,
            "torch LongStorage" => Dtype::I64,
            other => {
                return Err(format!(
                    "values of the class `{other}`; expected floating-point numbers"
                ));
            }
        },
        numel: size(numel)?,
        offset: size(offset)?,
        shape: sizes(shape)?,
        stride: sizes(stride)?,
    };
    view.check()?;
    Ok(view)
}

impl View {
    /// The last value lies in the storage, and no value is there twice.
    fn check(&self) -> Result<(), Failure> {
        let Self {
            shape,
            stride,
            numel,
            offset,
            ..
        } = self;
        let fits = || {
            let count = shape
                .iter()
                .try_fold(1usize, |n, &side| n.checked_mul(side))?;
            let last = shape
                .iter()
                .zip(stride)
                .try_fold(*offset, |last, (&side, &step)| {
                    last.checked_add(side.saturating_sub(1).checked_mul(step)?)
                })?;
            Some(count == 0 || (count <= *numel && last < *numel))
        };
        if shape.len() == stride.len() && fits() == Some(true) {
            Ok(())
        } else {
            Err(format!(
                "shape {shape:?} with strides {stride:?} from {offset} on does not lie in its storage of {numel} values"
            ))
        }
    }

    /// The values of `storage` that it shows, row-major.
    fn gather(&self, storage: &[u8]) -> Vec<u8> {
        let bytes = self.dtype.bytes();
        let count: usize = self.shape.iter().product();
        if count == 0 {
            return Vec::new();
        }
        let contiguous = self.shape.iter().zip(&self.stride).rev();
        let mut step = 1;
        let contiguous = contiguous.fold(true, |so_far, (&side, &stride)| {
            let here = side == 1 || stride == step;
            step *= side;
            so_far && here
        });
        if contiguous {
            return storage[self.offset * bytes..][..count * bytes].to_vec();
        }
        let mut out = Vec::with_capacity(count * bytes);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let at: usize = index
                .iter()
                .zip(&self.stride)
                .map(|(i, step)| i * step)
                .sum();
            out.extend_from_slice(&storage[(self.offset + at) * bytes..][..bytes]);
            for (i, &side) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < side {
                    break;
                }
                *i = 0;
            }
        }
        out
    }
}

/// Each view with the values that it shows.
fn entries<'a>(
    views: BTreeMap<String, View>,
    mut storage: impl FnMut(&View) -> Result<Cow<'a, [u8]>, Failure>,
) -> Result<BTreeMap<String, Entry>, Failure> {
    let mut users: BTreeMap<Rc<str>, usize> = BTreeMap::new();
    for view in views.values() {
        *users.entry(view.storage.clone()).or_default() += 1;
    }
    // Views of one storage are usual; a file whose views are much larger than its storages is not.
    let (mut shown, mut total) = (0usize, 0usize);
    let mut stored: BTreeMap<Rc<str>, Cow<'a, [u8]>> = BTreeMap::new();
    let mut all = BTreeMap::new();
    for (name, view) in views {
        let data = match stored.remove(&view.storage) {
            Some(data) => data,
            None => {
                let data = storage(&view)?;
                total += data.len();
                data
            }
        };
        if Some(data.len()) != view.numel.checked_mul(view.dtype.bytes()) {
            return Err(format!(
                "`{name}`: its storage has {} bytes, expected {} values of {} bytes",
                data.len(),
                view.numel,
                view.dtype.bytes()
            ));
        }
        let values = view.gather(&data);
        shown += values.len();
        if shown > 4 * total + (64 << 20) {
            return Err("its tensors are many times larger than its storages".into());
        }
        // Kept only for the views to come: the peak is the file and its tensors.
        if let Some(left) = users.get_mut(&view.storage) {
            *left -= 1;
            if *left > 0 {
                stored.insert(view.storage, data);
            }
        }
        let entry = Entry {
            dtype: view.dtype,
            shape: view.shape,
            data: values,
        };
        all.insert(name, entry);
    }
    Ok(all)
}
