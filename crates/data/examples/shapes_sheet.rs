//! Writes a contact sheet of the embedded dataset, one column per class, and says how fast it draws.
//!
//! `cargo run --release -p tinyfusion-data --example shapes_sheet -- shapes.png [seed]`

use std::time::Instant;

use tinyfusion_core::{Error, Result};
use tinyfusion_data::shapes::{CLASSES, Shapes, ShapesConfig, Split};
use tinyfusion_data::{Source, grid, to_uint8};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().unwrap_or_else(|| "shapes.png".into());
    let seed = args.next().and_then(|s| s.parse().ok()).unwrap_or(0);
    let shapes = Shapes::new(ShapesConfig::default(), seed, Split::Train)?;

    let mut image = vec![0f32; 3 * 32 * 32];
    let start = Instant::now();
    for i in 0..10_000 {
        shapes.draw(i, &mut image)?;
    }
    let micros = start.elapsed().as_secs_f64() * 1e6 / 1e4;

    const ROWS: usize = 12;
    let mut indices = vec![0u64; ROWS * CLASSES.len()];
    for class in 0..CLASSES.len() {
        let found = (0u64..)
            .filter(|&i| shapes.class(i) as usize == class)
            .take(ROWS);
        for (row, i) in found.enumerate() {
            indices[row * CLASSES.len() + class] = i;
        }
    }
    let batch = shapes.batch(&indices)?;
    let sheet = grid(&to_uint8(&batch.x)?, CLASSES.len(), 2)?;
    let (width, height) = (sheet.width() * 3, sheet.height() * 3);
    let sheet =
        image::imageops::resize(&sheet, width, height, image::imageops::FilterType::Nearest);
    sheet.save(&path).map_err(|e| Error::file(&path, e))?;
    #[allow(clippy::print_stdout)] // A program may speak.
    {
        println!(
            "{path}: columns are {}; {micros:.1} µs an image on one thread",
            CLASSES.join(", ")
        );
    }
    Ok(())
}
