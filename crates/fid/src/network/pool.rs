//! Pooling of one image, channels last, 3 × 3.

use pulp::Arch;

use super::activation::Activation;

/// Maximum over 3 × 3 pixels, stride 2, no padding, into the channels `first..` of `out`.
pub(crate) fn max_stride_2(x: &Activation, out: &mut Activation, first: usize) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for y in 0..out.height {
                for column in 0..out.width {
                    let at = out.at(y, column) + first;
                    let sums = &mut out.values[at..][..x.channels];
                    sums.copy_from_slice(x.pixel(2 * y, 2 * column));
                    for (dy, dx) in (0..3).flat_map(|dy| (0..3).map(move |dx| (dy, dx))) {
                        for (sum, &value) in
                            sums.iter_mut().zip(x.pixel(2 * y + dy, 2 * column + dx))
                        {
                            *sum = maximum(*sum, value);
                        }
                    }
                }
            }
        },
    );
}

/// The larger one; NaN if one is, so that damage shows in the features.
#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Height and width of [`max_stride_2`].
pub(crate) fn halved(size: [usize; 2]) -> [usize; 2] {
    size.map(|n| (n - 3) / 2 + 1)
}

/// How [`same_size`] reduces the pixels that a window holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pool {
    /// Their mean: at the border fewer than nine are divided by (`count_include_pad=False`).
    Mean,
    /// Their maximum.
    Max,
}

/// 3 × 3 pixels, stride 1: the size stays, windows end at the border.
pub(crate) fn same_size(x: &Activation, pool: Pool) -> Activation {
    let mut out = Activation::new(x.size(), x.channels, [0, 0]);
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for y in 0..x.height {
                for column in 0..x.width {
                    let rows = y.saturating_sub(1)..(y + 2).min(x.height);
                    let columns = column.saturating_sub(1)..(column + 2).min(x.width);
                    let count = (rows.len() * columns.len()) as f32;
                    let at = out.at(y, column);
                    let sums = &mut out.values[at..][..x.channels];
                    match pool {
                        Pool::Max => sums.copy_from_slice(x.pixel(y, column)),
                        Pool::Mean => sums.fill(0.0),
                    }
                    for (y, column) in rows.flat_map(|y| columns.clone().map(move |c| (y, c))) {
                        let window = x.pixel(y, column);
                        match pool {
                            Pool::Mean => {
                                for (sum, &value) in sums.iter_mut().zip(window) {
                                    *sum += value;
                                }
                            }
                            Pool::Max => {
                                for (sum, &value) in sums.iter_mut().zip(window) {
                                    *sum = maximum(*sum, value);
                                }
                            }
                        }
                    }
                    if pool == Pool::Mean {
                        for sum in sums {
                            *sum /= count;
                        }
                    }
                }
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A comparison with NaN is false, so that it is easily lost.
    #[test]
    fn not_a_number_goes_through_every_pool() {
        for at in 0..25 {
            let mut x = Activation::new([5, 5], 1, [0, 0]);
            x.values
                .iter_mut()
                .enumerate()
                .for_each(|(i, v)| *v = i as f32);
            x.values[at] = f32::NAN;
            let mut out = Activation::new(halved(x.size()), 1, [0, 0]);
            max_stride_2(&x, &mut out, 0);
            assert!(out.values.iter().any(|v| v.is_nan()), "{at}");
            for pool in [Pool::Mean, Pool::Max] {
                let out = same_size(&x, pool);
                assert!(out.values[at].is_nan(), "{at} {pool:?}");
            }
        }
    }
}
