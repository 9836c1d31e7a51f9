use super::activation::Activation;

/// Side of the network's input.
pub(crate) const SIDE: usize = 299;

/// An image (`height` × `width` × 3 bytes, RGB) at `to` = (rows, columns), values 0 to 255: (rows, columns, 3).
///
/// TensorFlow 1's `ResizeBilinear` with neither `align_corners` nor `half_pixel_centers`, which the FID of 2017 used
/// and every comparable one since: output i lies at i·(in / out), nothing is averaged when the image shrinks. In f32
/// without fused multiply-adds, columns first, equal to TensorFlow's to the bit.
///
/// # Panics
/// When the image has no pixels or not height × width × 3 bytes.
pub fn resize(image: &[u8], [height, width]: [usize; 2], to: [usize; 2]) -> Vec<f32> {
    assert!(height > 0 && width > 0, "an image has pixels");
    assert_eq!(image.len(), height * width * 3, "bytes of the image");
    let (rows, columns) = (taps(height, to[0]), taps(width, to[1]));
    let mut out = Vec::with_capacity(to[0] * to[1] * 3);
    for row in &rows {
        let line = |y: usize| &image[y * width * 3..][..width * 3];
        let (above, below) = (line(row.low), line(row.high));
        for column in &columns {
            for c in 0..3 {
                let value = |line: &[u8], x: usize| f32::from(line[x * 3 + c]);
                let mix = |a: f32, b: f32, weight: f32| a + (b - a) * weight;
                let top = mix(
                    value(above, column.low),
                    value(above, column.high),
                    column.weight,
                );
                let bottom = mix(
                    value(below, column.low),
                    value(below, column.high),
                    column.weight,
                );
                out.push(mix(top, bottom, row.weight));
            }
        }
    }
    out
}

/// The two input positions that an output position lies between, and how far it is from the first.
struct Tap {
    low: usize,
    high: usize,
    weight: f32,
}

fn taps(from: usize, to: usize) -> Vec<Tap> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let position = i as f32 * scale;
            let low = position.floor();
            Tap {
                low: (low as usize).min(from - 1),
                high: (low as usize + 1).min(from - 1),
                weight: position - low,
            }
        })
        .collect()
}

/// The image as the network takes it: 299 × 299, (x − 128) / 128.
pub(crate) fn prepare(image: &[u8], size: [usize; 2]) -> Activation {
    let mut x = Activation::new([SIDE, SIDE], 3, [0, 0]);
    for (x, value) in x.values.iter_mut().zip(resize(image, size, [SIDE, SIDE])) {
        *x = (value - 128.0) / 128.0;
    }
    x
}
