use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, StateDict};

/// What a block is narrowed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WidthPart {
    /// Heads of the attention.
    Heads,
    /// Channels of the MLP's hidden layer.
    Hidden,
}

/// Where the groups of a [`WidthGroups`] lie in one tensor: along `axis` stand `parts` stretches, and in each of them
/// `size` consecutive entries of every group, group by group. A packed qkv weight has three parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRows {
    /// Name of the tensor.
    pub tensor: String,
    /// The axis along which the groups are told apart.
    pub axis: usize,
    /// Stretches along that axis in each of which every group has its share.
    pub parts: usize,
    /// Entries of one group in one stretch.
    pub size: usize,
}

/// Groups of weights that are removed or kept together, all of one block: its heads, or its hidden channels. A removed
/// group takes its share of every tensor in `rows` with it, and what is left computes what the whole would with that
/// group silent.
///
/// Plain data, with which a model tells the crates that do not know it where it can be narrowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WidthGroups {
    /// The block, numbered over all stages.
    pub block: usize,
    /// Heads or hidden channels.
    pub part: WidthPart,
    /// How many groups there are.
    pub count: usize,
    /// The tensors that they share.
    pub rows: Vec<GroupRows>,
}

impl GroupRows {
    /// The entries of the groups `kept`, of `count`, along the axis.
    fn entries(&self, count: usize, kept: &[usize]) -> Vec<u32> {
        let of_group = |part: usize, group: usize| {
            let first = (part * count + group) * self.size;
            first..first + self.size
        };
        (0..self.parts)
            .flat_map(|part| kept.iter().flat_map(move |&group| of_group(part, group)))
            .map(|entry| entry as u32)
            .collect()
    }

    /// Checks that the tensor has an entry for every group; then (entries before, along and behind the axis).
    fn strides(&self, count: usize, dims: &[usize]) -> Result<(usize, usize, usize)> {
        let along = self.parts * count * self.size;
        if dims.get(self.axis) != Some(&along) {
            return Err(Error::usage(format!(
                "`{}` has shape {dims:?}; {along} entries along axis {} were expected, for {count} groups",
                self.tensor, self.axis
            )));
        }
        let (before, behind) = (&dims[..self.axis], &dims[self.axis + 1..]);
        Ok((before.iter().product(), along, behind.iter().product()))
    }

    /// Adds the `values` of the tensor, of shape `dims`, to the sums (count,) of their groups.
    fn add_to(&self, sums: &mut [f64], values: &[f64], dims: &[usize]) -> Result<()> {
        let (_, along, behind) = self.strides(sums.len(), dims)?;
        let stretch = sums.len() * self.size;
        if behind == 0 || values.len() != dims.iter().product::<usize>() {
            return Err(Error::usage(format!(
                "{} values were given for `{}` of shape {dims:?}",
                values.len(),
                self.tensor
            )));
        }
        for (i, entry) in values.chunks_exact(behind).enumerate() {
            sums[i % along % stretch / self.size] += entry.iter().sum::<f64>();
        }
        Ok(())
    }
}

impl WidthGroups {
    /// Sums over every group, (count,): `values(name)` gives one value for each entry of a tensor, in its order, with
    /// the tensor's shape.
    pub fn sums(
        &self,
        mut values: impl FnMut(&str) -> Result<(Vec<f64>, Vec<usize>)>,
    ) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; self.count];
        for rows in &self.rows {
            let (values, dims) = values(&rows.tensor)?;
            rows.add_to(&mut sums, &values, &dims)?;
        }
        Ok(sums)
    }

    /// Number of values in one group, of tensors as in `weights`.
    pub fn values_of_one(&self, weights: &StateDict) -> Result<usize> {
        let of_rows = |rows: &GroupRows| {
            let tensor = weights.require(&rows.tensor)?;
            rows.strides(self.count, tensor.dims())?;
            Ok(tensor.elem_count() / self.count)
        };
        self.rows.iter().map(of_rows).sum()
    }

    /// The tensors of these groups in `weights` with only the groups `kept`, by name.
    ///
    /// # Errors
    /// If `kept` is empty, does not ascend or names a group that does not exist, and if a tensor is missing or of
    /// another shape.
    pub fn keep(&self, weights: &StateDict, kept: &[usize]) -> Result<Vec<(String, Tensor)>> {
        self.check_kept(kept)?;
        let narrowed = |rows: &GroupRows| {
            let tensor = weights.require(&rows.tensor)?;
            rows.strides(self.count, tensor.dims())?;
            let entries = Tensor::new(rows.entries(self.count, kept), tensor.device())?;
            let narrowed = tensor.index_select(&entries, rows.axis)?;
            Ok((rows.tensor.clone(), narrowed))
        };
        self.rows.iter().map(narrowed).collect()
    }

    fn check_kept(&self, kept: &[usize]) -> Result<()> {
        let what = match self.part {
            WidthPart::Heads => "heads",
            WidthPart::Hidden => "hidden channels",
        };
        let fail = |fault: String| Err(Error::usage(format!("block {}: {fault}", self.block)));
        if kept.is_empty() {
            return fail(format!("none of its {} {what} is to be kept", self.count));
        }
        if let Some(pair) = kept.windows(2).find(|w| w[0] >= w[1]) {
            return fail(format!(
                "kept {what} must ascend, found {} before {}",
                pair[0], pair[1]
            ));
        }
        match kept.last().filter(|last| **last >= self.count) {
            None => Ok(()),
            Some(last) => fail(format!(
                "{what} {last} cannot be kept: there are {} (from 0)",
                self.count
            )),
        }
    }
}

/// The values of a tensor in f64, in order, with its shape: for [`WidthGroups::sums`].
pub fn values_f64(tensor: &Tensor) -> Result<(Vec<f64>, Vec<usize>)> {
    let flat = tensor.detach().flatten_all()?.to_dtype(DType::F64)?;
    Ok((flat.to_vec1::<f64>()?, tensor.dims().to_vec()))
}
