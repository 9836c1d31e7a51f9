/// What one image is inside the network: height × width × channels, channels last, in a margin of zeros that
/// serves as the padding of the convolution that reads it.
#[derive(Debug, Clone)]
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
    /// Zeros.
    pub(crate) fn new([height, width]: [usize; 2], channels: usize, margin: [usize; 2]) -> Self {
        let padded = (height + 2 * margin[0]) * (width + 2 * margin[1]);
        Self {
            height,
            width,
            channels,
            margin,
            values: vec![0.0; padded * channels],
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
