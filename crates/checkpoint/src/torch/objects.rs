//! What a pickle's values mean: dictionaries of tensors, perhaps under roots.

use candle_core::DType;
use candle_core::pickle::Object;

use crate::root::Root;

/// A tensor as the pickle describes it: a part of a storage, which is a member of the archive.
pub(super) struct Described {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) kind: Option<DType>,
    /// Bytes of a value.
    pub(super) width: usize,
    pub(super) storage: String,
    /// Values of the storage.
    pub(super) numel: usize,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) stride: Vec<usize>,
}

/// The tensors of a pickle (with the prefix of their root), and what else it holds.
pub(super) fn tensors(object: &Object) -> Result<(Vec<Described>, Vec<String>), String> {
    let Object::Dict(pairs) = object else {
        return Err(
            "holds no dictionary of tensors; save one: torch.save(model.state_dict(), …)".into(),
        );
    };
    let root_of = |key: &Object| match key {
        Object::Unicode(key) => Root::ALL
            .into_iter()
            .find(|r| *r != Root::Plain && r.to_string() == *key),
        _ => None,
    };
    let (pairs, around) = unwrapped(pairs);
    let has_roots = pairs
        .iter()
        .any(|(key, value)| root_of(key).is_some() && matches!(value, Object::Dict(_)));
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for (key, value) in pairs {
        let text = label(key);
        if text == METADATA {
            continue;
        }
        match (has_roots, root_of(key), value) {
            (true, Some(root), Object::Dict(pairs)) => {
                for (key, value) in pairs {
                    let name = label(key);
                    if name != METADATA {
                        found.push(entry(&format!("{}{name}", root.prefix()), key, value)?);
                    }
                }
            }
            (false, ..) if arguments(value).is_some() => found.push(entry(&text, key, value)?),
            _ => others.push(text),
        }
    }
    let all: Vec<String> = around.iter().chain(&others).cloned().collect();
    if found.is_empty() {
        let roots: Vec<String> = Root::ALL[1..].iter().map(|r| format!("`{r}`")).collect();
        return Err(format!(
            "holds no tensors by name and no {} with such; it holds {}",
            roots.join(", "),
            if all.is_empty() {
                "nothing".into()
            } else {
                listed(&all)
            }
        ));
    }
    if !has_roots && !others.is_empty() {
        // Of a plain dictionary every entry is a weight.
        return Err(format!(
            "holds {} beside its tensors, which are none; save the tensors alone: torch.save(model.state_dict(), …)",
            listed(&others)
        ));
    }
    Ok((found, all))
}

/// The dictionary that PyTorch Lightning (and with it Stable Diffusion's code) puts under `state_dict`, and what lies
/// around it; any other dictionary is as it is.
fn unwrapped(pairs: &[(Object, Object)]) -> (&[(Object, Object)], Vec<String>) {
    let is_state = |key: &Object| matches!(key, Object::Unicode(key) if key == "state_dict");
    let state = pairs.iter().find_map(|(key, value)| match value {
        Object::Dict(inner) if is_state(key) => Some(inner),
        _ => None,
    });
    match state {
        None => (pairs, Vec::new()),
        Some(inner) => {
            let around = pairs.iter().filter(|(key, _)| !is_state(key));
            (inner, around.map(|(key, _)| label(key)).collect())
        }
    }
}

/// The state of PyTorch's own dictionaries: nothing of the weights.
const METADATA: &str = "_metadata";

/// The first few names.
pub(super) fn listed(names: &[String]) -> String {
    const SHOWN: usize = 6;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A key for people: whatever it is, and no longer than a line.
fn label(key: &Object) -> String {
    match key {
        Object::Unicode(text) => text.chars().take(200).collect(),
        Object::Int(n) => n.to_string(),
        other => format!("{other:?}").chars().take(40).collect(),
    }
}

fn entry(name: &str, key: &Object, value: &Object) -> Result<Described, String> {
    if !matches!(key, Object::Unicode(text) if text.len() <= 200) {
        return Err(format!("has the key {name}…, which is no name of a tensor"));
    }
    let arguments = arguments(value)
        .ok_or_else(|| format!("holds `{name}`, which is no tensor; save the tensors alone"))?;
    described(name, arguments).map_err(|e| format!("holds `{name}`, a tensor with {e}"))
}

/// The arguments of `torch._utils._rebuild_tensor_v2`, if that is what makes the value, perhaps as a parameter.
fn arguments(value: &Object) -> Option<&[Object]> {
    let Object::Reduce { callable, args } = value else {
        return None;
    };
    let (
        Object::Class {
            module_name,
            class_name,
        },
        Object::Tuple(args),
    ) = (&**callable, &**args)
    else {
        return None;
    };
    match (module_name.as_str(), class_name.as_str()) {
        ("torch._utils", "_rebuild_tensor_v2") => Some(args),
        // (data, requires_grad, hooks)
        ("torch._utils", "_rebuild_parameter") => arguments(args.first()?),
        // (function, type, arguments, state)
        ("torch._tensor", "_rebuild_from_type_v2") => match args.get(2)? {
            Object::Tuple(args) => Some(args),
            _ => None,
        },
        _ => None,
    }
}

/// Arguments: storage, offset, shape, strides, …; a storage: a tag, its class, its key, its place, its number of values.
fn described(name: &str, arguments: &[Object]) -> Result<Described, String> {
    let [Object::PersistentLoad(storage), offset, shape, stride, ..] = arguments else {
        return Err("no storage".into());
    };
    let Object::Tuple(storage) = &**storage else {
        return Err("a storage of an unknown form".into());
    };
    let [
        Object::Unicode(tag),
        Object::Class { class_name, .. },
        Object::Unicode(key),
        _,
        numel,
        ..,
    ] = &storage[..]
    else {
        return Err("a storage of an unknown form".into());
    };
    if tag != "storage" || key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err("a storage of an unknown form".into());
    }
    let (kind, width) = match class_name.as_str() {
        "FloatStorage" => (Some(DType::F32), 4),
        "DoubleStorage" => (Some(DType::F64), 8),
        "HalfStorage" => (Some(DType::F16), 2),
        "BFloat16Storage" => (Some(DType::BF16), 2),
        "ByteStorage" => (Some(DType::U8), 1),
        "ShortStorage" => (Some(DType::I16), 2),
        "IntStorage" => (Some(DType::I32), 4),
        "LongStorage" => (Some(DType::I64), 8),
        "BoolStorage" | "CharStorage" => (None, 1),
        other => return Err(format!("values of the unknown class `{other}`")),
    };
    let found = Described {
        name: name.to_string(),
        dtype: class_name.trim_end_matches("Storage").to_string(),
        kind,
        width,
        storage: key.clone(),
        numel: size(numel)?,
        offset: size(offset)?,
        shape: sizes(shape)?,
        stride: sizes(stride)?,
    };
    found.check()?;
    Ok(found)
}

fn size(value: &Object) -> Result<usize, String> {
    let n = match value {
        Object::Int(n) => i64::from(*n),
        Object::Long(n) => *n,
        other => return Err(format!("the size {}", label(other))),
    };
    usize::try_from(n).map_err(|_| format!("the size {n}"))
}

fn sizes(value: &Object) -> Result<Vec<usize>, String> {
    match value {
        Object::Tuple(items) if items.len() <= 8 => items.iter().map(size).collect(),
        other => Err(format!("the shape {}", label(other))),
    }
}

impl Described {
    /// The last value lies in the storage, and no value is there twice.
    fn check(&self) -> Result<(), String> {
        let Self {
            shape,
            stride,
            numel,
            offset,
            ..
        } = self;
        let fits = || {
            // As safetensors' shapes: no product of sides may overflow, whatever the order.
            shape
                .iter()
                .try_fold(1usize, |n, &side| n.checked_mul(side.max(1)))?;
            let count: usize = shape.iter().product();
            let last = shape
                .iter()
                .zip(stride)
                .try_fold(*offset, |last, (&side, &step)| {
                    last.checked_add(side.saturating_sub(1).checked_mul(step)?)
                })?;
            Some(count == 0 && *offset <= *numel || count <= *numel && last < *numel)
        };
        if shape.len() == stride.len() && fits() == Some(true) {
            Ok(())
        } else {
            Err(format!(
                "shape {shape:?} and strides {stride:?} from {offset} on, which do not lie in its storage of {numel} values"
            ))
        }
    }
}
