use candle_core::{DType, Tensor};
use tinyfusion_core::{Error, Result};

/// Pixels in [-1, 1] as bytes: clamp(127.5·x + 128, 0, 255), truncated (DiT, `sample_ddp.py`).
///
/// # Shapes
/// Any shape, f32 → the same shape, u8.
///
/// # Errors
/// When a value is not finite: it has no colour, and drawn black or white it would hide that the network
/// failed.
pub fn to_uint8(x: &Tensor) -> Result<Tensor> {
    let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let lost = values.iter().filter(|v| !v.is_finite()).count();
    if lost > 0 {
        return Err(Error::run(format!(
            "{lost} of {} pixel values are not finite numbers, so there is no picture to draw: the network \
             or its sampler produced them; try other weights, less guidance or more steps",
            values.len()
        )));
    }
    let bytes: Vec<u8> = values
        .into_iter()
        // Rust's `as` truncates and saturates, as the reference's conversion after its clamp.
        .map(|v| (127.5 * v + 128.0).clamp(0.0, 255.0) as u8)
        .collect();
    Ok(Tensor::from_vec(bytes, x.shape(), x.device())?)
}

/// Most pixels of a [`grid`], 3 GiB of them.
const MAX_PIXELS: u64 = 1 << 30;

/// Composes images into one picture, row by row, at most `columns` to a row, with `gap` white pixels
/// between them; places left over in the last row are white.
///
/// # Shapes
/// (N, 3, H, W) u8 → an RGB image of c·W + (c − 1)·gap by r·H + (r − 1)·gap pixels, where c = min(columns, N)
/// and r = ⌈N / c⌉.
///
/// # Errors
/// When there is nothing to draw, or the picture would have more than 2³⁰ pixels.
pub fn grid(images: &Tensor, columns: usize, gap: usize) -> Result<image::RgbImage> {
    let (n, channels, height, width) = images.dims4()?;
    if channels != 3 || images.dtype() != DType::U8 || images.elem_count() == 0 || columns == 0 {
        return Err(Error::usage(format!(
            "a grid takes at least one column and images (N, 3, H, W) of u8 with at least one pixel; found \
             {columns} columns and {:?} of {:?}",
            images.dims(),
            images.dtype()
        )));
    }
    let columns = columns.min(n);
    let rows = n.div_ceil(columns);
    let side = |count: usize, length: usize| -> Option<u32> {
        let gaps = (count - 1).checked_mul(gap)?;
        count
            .checked_mul(length)?
            .checked_add(gaps)?
            .try_into()
            .ok()
    };
    let sides = side(columns, width).zip(side(rows, height));
    let Some((wide, high)) = sides.filter(|&(w, h)| u64::from(w) * u64::from(h) <= MAX_PIXELS)
    else {
        return Err(Error::usage(format!(
            "a grid of {rows} rows and {columns} columns of {height}×{width} images, {gap} pixels apart, has \
             more than {MAX_PIXELS} pixels; show fewer images"
        )));
    };
    let mut picture = image::RgbImage::from_pixel(wide, high, image::Rgb([255; 3]));
    let pixels = images
        .permute((0, 2, 3, 1))?
        .flatten_all()?
        .to_vec1::<u8>()?; // (N·H·W·3,)
    for (i, image) in pixels.chunks_exact(height * width * 3).enumerate() {
        let left = (i % columns) * (width + gap);
        let top = (i / columns) * (height + gap);
        for (p, rgb) in image.chunks_exact(3).enumerate() {
            let (x, y) = (left + p % width, top + p / width);
            picture.put_pixel(x as u32, y as u32, image::Rgb([rgb[0], rgb[1], rgb[2]]));
        }
    }
    Ok(picture)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn to_uint8_truncates_as_the_reference() {
        let x = [
            -2.0f32,
            -1.0,
            -0.999,
            0.0,
            0.003,
            0.004,
            0.996,
            0.9999,
            1.0,
            9.0,
            f32::MAX,
            f32::MIN,
        ];
        let x = Tensor::new(&x, &Device::Cpu).unwrap();
        // 127.5·(−1) + 128 = 0.5 → 0; 127.5·0.003 + 128 = 128.38 → 128; 127.5·0.996 + 128 = 254.99 → 254.
        let bytes = to_uint8(&x).unwrap().to_vec1::<u8>().unwrap();
        assert_eq!(bytes, [0, 0, 0, 128, 128, 128, 254, 255, 255, 255, 255, 0]);
    }

    #[test]
    fn to_uint8_refuses_values_that_are_not_finite_and_counts_them() {
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for value in bad {
            let x = Tensor::new(&[[0.0, value], [1.0, 0.5]], &Device::Cpu).unwrap();
            let error = to_uint8(&x).unwrap_err();
            assert!(
                matches!(&error, Error::Run(m) if m.starts_with("1 of 4 ")),
                "{error}"
            );
        }
        let error = to_uint8(&Tensor::new(&bad, &Device::Cpu).unwrap()).unwrap_err();
        assert!(error.to_string().starts_with("3 of 3 "), "{error}");
    }

    #[test]
    fn to_uint8_keeps_shape_and_order_of_a_view() {
        let x = Tensor::new(&[[-1f32, 0.0, 1.0], [1.0, 0.5, -0.5]], &Device::Cpu)
            .unwrap()
            .t()
            .unwrap();
        let bytes = to_uint8(&x).unwrap().to_vec2::<u8>().unwrap();
        assert_eq!(bytes, [[0, 255], [128, 191], [255, 64]]);
    }

    #[test]
    fn grid_places_every_image() {
        // Image i has red = i, green = 10 + x, blue = 20 + y.
        let (n, height, width) = (5usize, 2usize, 3usize);
        let mut values = Vec::new();
        for i in 0..n {
            for c in 0..3 {
                for y in 0..height {
                    for x in 0..width {
                        values.push([i, 10 + x, 20 + y][c] as u8);
                    }
                }
            }
        }
        let images = Tensor::from_vec(values, (n, 3, height, width), &Device::Cpu).unwrap();
        let picture = grid(&images, 2, 1).unwrap();
        assert_eq!(picture.dimensions(), (7, 8)); // 2·3 + 1, 3·2 + 2
        for (px, py, rgb) in picture.enumerate_pixels() {
            let (column, x) = (px as usize / 4, px as usize % 4);
            let (row, y) = (py as usize / 3, py as usize % 3);
            let i = row * 2 + column;
            let expected = if x == 3 || y == 2 || i >= n {
                [255; 3]
            } else {
                [i as u8, 10 + x as u8, 20 + y as u8]
            };
            assert_eq!(rgb.0, expected, "pixel {px}, {py}");
        }
    }

    #[test]
    fn a_grid_is_no_wider_than_its_images() {
        let images = Tensor::zeros((3, 3, 2, 4), DType::U8, &Device::Cpu).unwrap();
        for columns in [3, 4, 1000, usize::MAX] {
            let picture = grid(&images, columns, 1).unwrap();
            assert_eq!(picture.dimensions(), (14, 2), "{columns} columns"); // 3·4 + 2, one row
        }
    }

    #[test]
    fn a_grid_of_absurd_size_is_a_usage_error() {
        let images = Tensor::zeros((3, 3, 2, 4), DType::U8, &Device::Cpu).unwrap();
        for columns in [1, 2, 3] {
            // Too many pixels, more than a side holds, and sums and products that overflow.
            for gap in [1 << 29, 1 << 31, usize::MAX / 2, usize::MAX - 1, usize::MAX] {
                let error = grid(&images, columns, gap).unwrap_err();
                assert!(
                    matches!(&error, Error::Usage(m) if m.contains(&gap.to_string())),
                    "{error}"
                );
            }
        }
        // One image has no gap.
        let one = images.narrow(0, 0, 1).unwrap();
        assert_eq!(grid(&one, 1, usize::MAX).unwrap().dimensions(), (4, 2));
    }

    #[test]
    fn grid_refuses_what_is_not_pictures() {
        let zeros = |shape: (usize, usize, usize, usize), dtype| {
            Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
        };
        for (images, columns) in [
            (zeros((1, 4, 2, 2), DType::U8), 1),
            (zeros((1, 3, 2, 2), DType::F32), 1),
            (zeros((0, 3, 2, 2), DType::U8), 1),
            (zeros((1, 3, 0, 2), DType::U8), 1),
            (zeros((1, 3, 2, 0), DType::U8), 1),
            (zeros((1, 3, 2, 2), DType::U8), 0),
        ] {
            let message = grid(&images, columns, 0).unwrap_err().to_string();
            assert!(message.contains("(N, 3, H, W)"), "{message}");
        }
    }
}
