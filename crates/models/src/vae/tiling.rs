use candle_core::Tensor;
use tinyfusion_core::{Error, Result};

use super::VaeConfig;

/// How a large image is cut into overlapping tiles, which are coded one by one and blended: memory for one tile and
/// the result.
///
/// What comes out differs from what the whole gives: every tile is normalised, and attends, by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tiling {
    /// Side of a tile, in pixels of the latent.
    pub tile: usize,
    /// The part of a tile that lies on its neighbour, 0 to below 1; rounded down to whole pixels of the latent.
    pub overlap: f64,
}

impl Tiling {
    /// Tiles as large as the images of the network's training, a quarter of each on its neighbour: diffusers' choice.
    pub fn of(config: &VaeConfig) -> Self {
        Self {
            tile: (config.sample_size / config.factor()).max(1),
            overlap: 0.25,
        }
    }

    /// Pixels of the latent that neighbours share.
    fn shared(&self) -> Result<usize> {
        if self.tile == 0 || !(0.0..1.0).contains(&self.overlap) {
            return Err(Error::usage(format!(
                "tiles of {} pixels of the latent that overlap by {}: a side of at least 1 and an overlap from 0 to below 1 are expected",
                self.tile, self.overlap
            )));
        }
        // Below 1 it is less than the tile, so tiles move on.
        Ok((self.tile as f64 * self.overlap) as usize)
    }
}

/// `code` of x (B, C, H, W) in tiles, blended. `from` and `to` are the pixels of x and of the result along one side of a pixel
/// of the latent.
///
/// diffusers' `tiled_decode` and `tiled_encode`: tiles begin at every multiple of what a tile does not share, so the last
/// one may be small; each fades in linearly over the one above and then over the one to its left. One tile is
/// `code` of the whole.
pub(super) fn tiled(
    x: &Tensor,
    tiling: &Tiling,
    (from, to): (usize, usize),
    code: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    let shared = tiling.shared()?;
    let (tile, step) = (tiling.tile * from, (tiling.tile - shared) * from);
    if height <= tile && width <= tile {
        return code(x);
    }
    let (shared, kept) = (shared * to, (tiling.tile - shared) * to);
    let mut above: Vec<Tensor> = Vec::new();
    let mut rows = Vec::new();
    for top in (0..height).step_by(step) {
        let x = x.narrow(2, top, tile.min(height - top))?; // (B, C, ≤ tile, W)
        let (mut row, mut parts): (Vec<Tensor>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for (column, left) in (0..width).step_by(step).enumerate() {
            let x = x.narrow(3, left, tile.min(width - left))?.contiguous()?; // (B, C, ≤ tile, ≤ tile)
            let mut y = code(&x)?; // (B, C', h, w)
            if let Some(above) = above.get(column) {
                y = fade(above, &y, 2, shared)?;
            }
            if let Some(left) = row.last() {
                y = fade(left, &y, 3, shared)?;
            }
            let (h, w) = (y.dim(2)?.min(kept), y.dim(3)?.min(kept));
            parts.push(y.narrow(2, 0, h)?.narrow(3, 0, w)?);
            row.push(y);
        }
        rows.push(Tensor::cat(&parts, 3)?);
        above = row;
    }
    Ok(Tensor::cat(&rows, 2)?)
}

/// `b`, whose first `shared` rows (`axis` 2) or columns (3) come out of the last ones of `a`: a·(1 − i/n) + b·i/n.
fn fade(a: &Tensor, b: &Tensor, axis: usize, shared: usize) -> Result<Tensor> {
    let (length, before) = (b.dim(axis)?, a.dim(axis)?);
    // At the image's end both tiles may be cut off within what they share; their ends still lie on each other.
    let n = shared.min(length).min(before);
    if n == 0 {
        return Ok(b.clone());
    }
    let weights: Vec<f32> = (0..n).map(|i| i as f32 / n as f32).collect();
    let mut shape = [1; 4];
    shape[axis] = n;
    let weights = Tensor::from_vec(weights, &shape, b.device())?.to_dtype(b.dtype())?;
    let old = a.narrow(axis, before - n, n)?;
    let old = old.broadcast_mul(&weights.affine(-1.0, 1.0)?)?;
    let new = b.narrow(axis, 0, n)?.broadcast_mul(&weights)?;
    let rest = b.narrow(axis, n, length - n)?;
    Ok(Tensor::cat(&[&(old + new)?, &rest], axis)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use tinyfusion_testing::{flat, max_diff};

    use super::*;

    #[test]
    fn what_codes_pixels_one_by_one_is_not_changed_by_tiles() {
        for (tile, overlap) in [(4, 0.25), (4, 0.0), (5, 0.5), (3, 0.9), (1, 0.5)] {
            for (h, w) in [(1, 9), (4, 4), (5, 6), (7, 8), (9, 11), (12, 4)] {
                let values: Vec<f32> = (0..2 * h * w).map(|i| (i as f32 * 0.7).sin()).collect();
                let x = Tensor::from_vec(values, (1, 2, h, w), &Device::Cpu).unwrap();
                let tiling = Tiling { tile, overlap };
                let double = |x: &Tensor| {
                    let (_, _, h, w) = x.dims4()?;
                    Ok(x.upsample_nearest2d(2 * h, 2 * w)?)
                };
                let y = tiled(&x, &tiling, (1, 2), double).unwrap();
                let want = double(&x).unwrap();
                assert_eq!(y.dims(), want.dims());
                assert!(max_diff(&y, &want) < 1e-6, "{tiling:?} of {h}×{w}");
                let halve = |x: &Tensor| Ok(x.avg_pool2d(2)?);
                let y = tiled(&want, &tiling, (2, 1), halve).unwrap();
                assert_eq!(y.dims(), x.dims());
                assert!(max_diff(&y, &x) < 1e-6, "{tiling:?} of {h}×{w}");
            }
        }
    }

    #[test]
    fn tiles_fade_in_linearly() {
        // Each tile is coded as its number: 0, then 1, which overlap by two pixels of two.
        let number = std::cell::Cell::new(0f32);
        let x = Tensor::zeros((1, 1, 1, 7), candle_core::DType::F32, &Device::Cpu).unwrap();
        let tiling = Tiling {
            tile: 4,
            overlap: 0.25,
        };
        let code = |x: &Tensor| {
            let y = Tensor::full(number.get(), (1, 1, 2, 2 * x.dim(3)?), &Device::Cpu)?;
            number.set(number.get() + 1.0);
            Ok(y)
        };
        let y = tiled(&x, &tiling, (1, 2), code).unwrap();
        // Tiles begin at 0, 3 and 6; two columns of the result are shared.
        let row = [0., 0., 0., 0., 0., 0., 0., 0.5, 1., 1., 1., 1., 1., 1.5];
        assert_eq!(flat(&y.narrow(2, 0, 1).unwrap()), row);
    }
}
