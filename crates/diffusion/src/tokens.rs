use candle_core::Tensor;
use tinyfusion_core::{Error, Result};

/// Latents or pixels x (B, C, H, W) as tokens (B, L, C·p·p), row by row, the channel slowest within a token.
pub fn patchify(x: &Tensor, patch: usize) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let p = patch;
    if p == 0 || !h.is_multiple_of(p) || !w.is_multiple_of(p) {
        return Err(Error::usage(format!(
            "a sample of {h}×{w} has no whole patches of {p}×{p}"
        )));
    }
    Ok(x.reshape((b, c, h / p, p, w / p, p))?
        .permute((0, 2, 4, 1, 3, 5))? // (B, H/p, W/p, C, p, p)
        .reshape((b, (h / p) * (w / p), c * p * p))?)
}

/// The inverse of [`patchify`] for square samples: tokens (B, L, C·p·p), L = g², → (B, C, g·p, g·p).
pub fn unpatchify(tokens: &Tensor, patch: usize) -> Result<Tensor> {
    let (b, l, width) = tokens.dims3()?;
    let (g, p) = (l.isqrt(), patch);
    if g * g != l || p == 0 || !width.is_multiple_of(p * p) {
        return Err(Error::usage(format!(
            "tokens {:?} are no square of patches of {p}×{p}",
            tokens.dims()
        )));
    }
    let c = width / (p * p);
    Ok(tokens
        .reshape((b, g, g, c, p, p))?
        .permute((0, 3, 1, 4, 2, 5))? // (B, C, g, p, g, p)
        .reshape((b, c, g * p, g * p))?)
}

/// Positions in a batch of token sequences: which tokens of which sample, sample by sample in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenRows {
    /// (sample, position) of every row.
    pub rows: Vec<(u32, u32)>,
}

impl TokenRows {
    /// Where `chosen(sample, position)` holds, over `samples` sequences of `len` tokens.
    pub(crate) fn filter(
        samples: usize,
        len: usize,
        chosen: impl Fn(usize, usize) -> bool,
    ) -> Self {
        let all = (0..samples).flat_map(|b| (0..len).map(move |i| (b, i)));
        let rows = all.filter(|&(b, i)| chosen(b, i));
        Self {
            rows: rows.map(|(b, i)| (b as u32, i as u32)).collect(),
        }
    }

    /// The rows of x (B, L, D): (N, D).
    pub(crate) fn of(&self, x: &Tensor) -> Result<Tensor> {
        let (b, l, d) = x.dims3()?;
        let index: Vec<u32> = self.rows.iter().map(|(b, i)| b * l as u32 + i).collect();
        let index = Tensor::new(index, x.device())?;
        Ok(x.reshape((b * l, d))?.index_select(&index, 0)?)
    }

    /// The same positions `samples` sequences further on.
    pub(crate) fn shifted(&self, samples: usize) -> Self {
        let shift = |&(b, i): &(u32, u32)| (b + samples as u32, i);
        Self {
            rows: self.rows.iter().map(shift).collect(),
        }
    }
}

/// The mask (B, L) that hides the first `count` tokens of every order.
pub(crate) fn mask_of(orders: &[Vec<usize>], count: usize) -> Result<Tensor> {
    let (b, l) = (orders.len(), orders.first().map_or(0, Vec::len));
    let mut mask = vec![0f32; b * l];
    for (row, order) in mask.chunks_exact_mut(l.max(1)).zip(orders) {
        order[..count].iter().for_each(|&i| row[i] = 1.0);
    }
    Ok(Tensor::from_vec(mask, (b, l), &candle_core::Device::Cpu)?)
}

/// Checks that there is an order of 0..len for each of `samples`.
pub(crate) fn check_orders(orders: &[Vec<usize>], samples: usize, len: usize) -> Result<()> {
    let is_order = |order: &Vec<usize>| {
        let mut seen = vec![false; len];
        order.len() == len
            && order
                .iter()
                .all(|&i| i < len && !std::mem::replace(&mut seen[i], true))
    };
    if orders.len() == samples && len > 0 && orders.iter().all(is_order) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{samples} orders of {len} tokens are needed, each naming every position once; found {} orders",
        orders.len()
    )))
}
