//! Crops images as ADM and DiT do: `cargo run --release -p tinyfusion-data --example crop -- SIZE OUT IMAGE…`. It is what
//! `tests/python/check_crop.py` compares with Pillow.

use std::path::Path;

use tinyfusion_core::{Error, Result};
use tinyfusion_data::center_crop;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [size, out, images @ ..] = &args[..] else {
        return Err(Error::usage("crop SIZE OUT IMAGE…"));
    };
    let size: usize = size
        .parse()
        .map_err(|_| Error::usage(format!("`{size}` is no number of pixels")))?;
    for path in images {
        let image = image::open(path).map_err(|e| Error::file(path, e))?;
        let name = Path::new(path).file_name().unwrap_or_default();
        let to = Path::new(out).join(name);
        let cropped = center_crop(&image.to_rgb8(), size);
        cropped.save(&to).map_err(|e| Error::file(&to, e))?;
    }
    Ok(())
}
