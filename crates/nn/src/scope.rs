use candle_core::Tensor;
use tinyfusion_core::{Error, Result, StateDict};

/// A place in a [`StateDict`] from which layers take their tensors by name.
///
/// Layers share the dictionary's storage: a layer built on variables trains them, one built on
/// [`StateDict::detached`] records nothing.
#[derive(Debug, Clone)]
pub struct Scope<'a> {
    dict: &'a StateDict,
    prefix: String,
    lora_scale: f64,
}

impl<'a> Scope<'a> {
    /// The root of `dict`. Linear layers with `lora_a`/`lora_b` beside them add
    /// `lora_scale`·B·A to their weight.
    pub fn new(dict: &'a StateDict, lora_scale: f64) -> Self {
        Self {
            dict,
            prefix: String::new(),
            lora_scale,
        }
    }

    /// The place one level down.
    #[must_use]
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        };
        Self {
            prefix,
            ..self.clone()
        }
    }

    /// The tensor `name` here, which must have `shape`.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let full = self.key(name);
        let tensor = self.dict.require(&full)?;
        if tensor.dims() != shape {
            return Err(Error::usage(format!(
                "`{full}` has shape {:?}, expected {shape:?}",
                tensor.dims()
            )));
        }
        Ok(tensor.clone())
    }

    /// The tensor `name` here, if there is one.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        self.dict.get(&self.key(name)).cloned()
    }

    /// α/r of low-rank updates.
    pub fn lora_scale(&self) -> f64 {
        self.lora_scale
    }

    fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        }
    }
}
