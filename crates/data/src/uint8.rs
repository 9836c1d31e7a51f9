use candle_core::{DType, Tensor};
use tinyfusion_core::{Error, Result};

/// Pixels in [-1, 1] as bytes: clamp(127.5·x + 128, 0, 255), truncated (DiT, `sample_ddp.py`).
///
/// # Shapes
/// Any shape, f32 → the same shape, u8. Not a number becomes 0.
pub fn to_uint8(x: &Tensor) -> Result<Tensor> {
    let bytes: Vec<u8> = x
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        // Rust's `as` truncates and saturates, as the reference's conversion after its clamp.
        .map(|v| (127.5 * v + 128.0).clamp(0.0, 255.0) as u8)
        .collect();
    Ok(Tensor::from_vec(bytes, x.shape(), x.device())?)
}

/// Composes images into one picture, row by row, `columns` to a row, with `gap` white pixels between
/// them; places left over in the last row are white.
///
/// # Shapes
/// (N, 3, H, W) u8 → an RGB image of columns·W + (columns − 1)·gap by rows·H + (rows − 1)·gap pixels.
pub fn grid(images: &Tensor, columns: usize, gap: usize) -> Result<image::RgbImage> {
    let (n, channels, height, width) = images.dims4()?;
    if channels != 3 || images.dtype() != DType::U8 || n == 0 || columns == 0 {
        return Err(Error::usage(format!(
            "a grid takes at least one column and images (N, 3, H, W) of u8 with N > 0; found {columns} \
             columns and {:?} of {:?}",
            images.dims(),
            images.dtype()
        )));
    }
    let rows = n.div_ceil(columns);
    let size = |count: usize, length: usize| (count * length + (count - 1) * gap) as u32;
    let mut picture = image::RgbImage::from_pixel(
        size(columns, width),
        size(rows, height),
        image::Rgb([255; 3]),
    );
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
