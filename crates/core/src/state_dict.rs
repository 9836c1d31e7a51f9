use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Tensor, Var};

use crate::{Error, Result};

/// Name and shape of one parameter of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Key as in the official checkpoint.
    pub name: String,
    /// Expected shape.
    pub shape: Vec<usize>,
}

/// Named tensors in a fixed (alphabetical) order.
///
/// A parameter is trainable when its tensor is a variable: networks built on the dictionary record
/// gradients for exactly those, and [`detached`](Self::detached) gives a view of the same storage
/// that records nothing and still sees every update.
#[derive(Debug, Clone, Default)]
pub struct StateDict(BTreeMap<String, Tensor>);

impl StateDict {
    /// An empty dictionary.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.0.insert(name.into(), tensor);
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// The tensor called `name`, or an error that names it.
    pub fn require(&self, name: &str) -> Result<&Tensor> {
        self.get(name)
            .ok_or_else(|| Error::usage(format!("missing tensor `{name}`")))
    }

    /// Removes and returns a tensor.
    pub fn remove(&mut self, name: &str) -> Option<Tensor> {
        self.0.remove(name)
    }

    /// Tensors in alphabetical order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of values over all tensors.
    pub fn elem_count(&self) -> usize {
        self.0.values().map(Tensor::elem_count).sum()
    }

    /// A view on the same storage that records no gradients.
    pub fn detached(&self) -> Self {
        self.0
            .iter()
            .map(|(k, v)| (k.clone(), v.detach()))
            .collect()
    }

    /// [`detached`](Self::detached), giving this one up: storage that nobody else shares goes with the last view on it.
    pub fn into_detached(self) -> Self {
        self.0.into_iter().map(|(k, v)| (k, v.detach())).collect()
    }

    /// A deep copy that shares nothing.
    pub fn copied(&self) -> Result<Self> {
        self.0
            .iter()
            .map(|(k, v)| Ok((k.clone(), v.detach().copy()?)))
            .collect()
    }

    /// Turns every tensor for which `choose(name)` holds into a variable and returns those, in order.
    pub fn make_trainable(&mut self, choose: impl Fn(&str) -> bool) -> Result<Vec<(String, Var)>> {
        let mut vars = Vec::new();
        for (name, tensor) in &mut self.0 {
            if choose(name) {
                let var = Var::from_tensor(&tensor.detach())?;
                *tensor = var.as_tensor().clone();
                vars.push((name.clone(), var));
            }
        }
        Ok(vars)
    }

    /// Checks names and shapes against `expected`; one error lists what is missing, unexpected and mismatched.
    pub fn check(&self, expected: &[ParamSpec]) -> Result<()> {
        let found = self.0.iter().map(|(k, t)| (k.as_str(), t.dims()));
        check_shapes(&found.collect(), expected)
    }
}

/// Compares the names and shapes `found`, of tensors that need not be in memory, with those that a network expects; one
/// error lists what is missing, unexpected and mismatched.
pub fn check_shapes(found: &BTreeMap<&str, &[usize]>, expected: &[ParamSpec]) -> Result<()> {
    let mut problems = Vec::new();
    for spec in expected {
        match found.get(spec.name.as_str()) {
            None => problems.push(format!("missing `{}` {:?}", spec.name, spec.shape)),
            Some(dims) if *dims != spec.shape.as_slice() => problems.push(format!(
                "`{}` has shape {dims:?}, expected {:?}",
                spec.name, spec.shape
            )),
            Some(_) => {}
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|s| s.name.as_str()).collect();
    problems.extend(
        found
            .keys()
            .filter(|n| !known.contains(*n))
            .map(|n| format!("unexpected `{n}`")),
    );
    if problems.is_empty() {
        return Ok(());
    }
    const SHOWN: usize = 8;
    let more = problems.len().saturating_sub(SHOWN);
    let mut text = problems[..problems.len().min(SHOWN)].join("; ");
    if more > 0 {
        text += &format!("; and {more} more");
    }
    Err(Error::usage(format!(
        "the weights do not fit the network: {text}"
    )))
}

impl FromIterator<(String, Tensor)> for StateDict {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}
