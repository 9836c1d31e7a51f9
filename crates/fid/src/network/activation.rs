use std::cell::RefCell;

thread_local! {
    /// Values of activations that are done with. Every image needs the same sizes, and memory from the system would be
    /// cleared page by page for each.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Gives this thread's spare memory back.
pub(crate) fn forget_spares() {
    SPARE.with(|spare| spare.take());
}

/// What one image is inside the network: height × width × channels, channels last, in a margin of zeros that
/// serves as the padding of the convolution that reads it.
#[derive(Debug)]
pub(crate) struct Activation {
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
    /// Rows of zeros above and below, columns of zeros left and right.
    pub(crate) margin: [usize; 2],
    /// (height + 2·margin, width + 2·margin, channels), row-major.
    pub(crate) values: Vec<f32>,
}

impl Activation {
    /// Zeros in the margin, and inside of it whatever was there: all of it is written before it is read.
    pub(crate) fn new([height, width]: [usize; 2], channels: usize, margin: [usize; 2]) -> Self {
        let length = (height + 2 * margin[0]) * (width + 2 * margin[1]) * channels;
        let spare = SPARE.with_borrow_mut(|spare| {
            let at = spare.iter().position(|values| values.len() == length)?;
            Some(spare.swap_remove(at))
        });
        let fresh = spare.is_none();
        let mut activation = Self {
            height,
            width,
            channels,
            margin,
            values: spare.unwrap_or_else(|| vec![0.0; length]),
        };
        if cfg!(debug_assertions) {
            activation.values.fill(f32::NAN); // shows what is read before it is written
        }
        if !fresh || cfg!(debug_assertions) {
            activation.clear_margin();
        }
        activation
    }

    fn clear_margin(&mut self) {
        let (pitch, side) = (self.pitch(), self.margin[1] * self.channels);
        let above = self.margin[0] * pitch;
        let below = self.values.len() - above;
        self.values[..above].fill(0.0);
        self.values[below..].fill(0.0);
        if side > 0 {
            for row in self.values[above..below].chunks_exact_mut(pitch) {
                row[..side].fill(0.0);
                row[pitch - side..].fill(0.0);
            }
        }
    }

    pub(crate) fn size(&self) -> [usize; 2] {
        [self.height, self.width]
    }

    /// Values from one row to the next.
    pub(crate) fn pitch(&self) -> usize {
        (self.width + 2 * self.margin[1]) * self.channels
    }

    /// Where the channels of the pixel at row `y`, column `x` begin.
    pub(crate) fn at(&self, y: usize, x: usize) -> usize {
        (y + self.margin[0]) * self.pitch() + (x + self.margin[1]) * self.channels
    }

    /// The channels of one pixel.
    pub(crate) fn pixel(&self, y: usize, x: usize) -> &[f32] {
        &self.values[self.at(y, x)..][..self.channels]
    }

    /// Mean over the pixels, by channel, summed in f64.
    pub(crate) fn mean(&self) -> Vec<f32> {
        let mut sums = vec![0f64; self.channels];
        for y in 0..self.height {
            for x in 0..self.width {
                for (sum, &value) in sums.iter_mut().zip(self.pixel(y, x)) {
                    *sum += f64::from(value);
                }
            }
        }
        let pixels = (self.height * self.width) as f64;
        sums.into_iter().map(|sum| (sum / pixels) as f32).collect()
    }
}

impl Drop for Activation {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        if !values.is_empty() {
            // A thread that ends has no place for it any more, and the memory goes.
            let _ = SPARE.try_with(|spare| spare.borrow_mut().push(values));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_is_used_again_with_a_clean_margin() {
        forget_spares();
        let mut x = Activation::new([2, 3], 2, [1, 2]);
        x.values.fill(5.0);
        let place = x.values.as_ptr();
        drop(x);
        let x = Activation::new([2, 3], 2, [1, 2]);
        assert_eq!(x.values.as_ptr(), place);
        for y in 0..4 {
            for column in 0..7 {
                let inside = (1..3).contains(&y) && (2..5).contains(&column);
                let values = &x.values[(y * 7 + column) * 2..][..2];
                assert!(inside || values == [0.0; 2], "{y} {column}: {values:?}");
            }
        }
        // Another shape of the same size, whose margin lies elsewhere.
        drop(x);
        let x = Activation::new([4, 7], 2, [0, 0]);
        assert_eq!(x.values.as_ptr(), place);
        drop(x);
        let x = Activation::new([2, 7], 2, [1, 0]);
        assert_eq!(x.values[..14], [0.0; 14]);
        assert_eq!(x.values[42..], [0.0; 14]);
        drop(x);
        forget_spares();
        assert!(SPARE.with_borrow(Vec::is_empty));
    }
}
