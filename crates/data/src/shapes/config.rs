use serde::{Deserialize, Serialize};
use tinyfusion_core::{Error, Result};

/// How freely the images vary. Lengths are in pixels of the 32×32 image, colours in [0, 1]; "luma"
/// is 0.299 R + 0.587 G + 0.114 B.
///
/// The defaults are modest on purpose: a net of width 64 has to learn them within an hour.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShapesConfig {
    /// Smallest and largest radius of the shape.
    pub radius: [f32; 2],
    /// Largest distance of the centre from the image's middle, in x and in y.
    pub jitter: f32,
    /// Largest rotation to either side, in degrees, at most 45.
    pub rotation: f32,
    /// Smallest and largest saturation of the shape's colour; its hue is free.
    pub saturation: [f32; 2],
    /// Smallest difference in luma between any point of the shape and any point of the background.
    pub min_contrast: f32,
    /// How far the background's luma may go beyond `min_contrast`: small values keep all backgrounds
    /// equally far from the shape.
    pub background_range: f32,
    /// Largest colourfulness of the background, from 0 (grey) to 1.
    pub tint: f32,
    /// How much the texture darkens the shape at most, as a fraction.
    pub texture_contrast: f32,
    /// Smallest and largest period of stripes and dots.
    pub texture_period: [f32; 2],
}

impl Default for ShapesConfig {
    fn default() -> Self {
        Self {
            radius: [9.5, 12.0],
            jitter: 2.5,
            rotation: 15.0,
            saturation: [0.75, 1.0],
            min_contrast: 0.3,
            background_range: 0.3,
            tint: 0.5,
            texture_contrast: 0.2,
            texture_period: [5.0, 7.0],
        }
    }
}

impl ShapesConfig {
    /// Checks the ranges; the error names the field, its value and what it may be.
    pub fn validate(&self) -> Result<()> {
        let range = |name: &str, [low, high]: [f32; 2], min: f32, max: f32| {
            // Written so that a NaN fails.
            if low >= min && low <= high && high <= max {
                return Ok(());
            }
            Err(Error::usage(format!(
                "shapes: {name} = [{low}, {high}], expected two increasing values in [{min}, {max}]"
            )))
        };
        let single = |name: &str, value: f32, min: f32, max: f32| {
            if value >= min && value <= max {
                return Ok(());
            }
            Err(Error::usage(format!(
                "shapes: {name} = {value}, expected a value in [{min}, {max}]"
            )))
        };
        range("radius", self.radius, 2.0, 15.0)?;
        single("jitter", self.jitter, 0.0, 8.0)?;
        single("rotation", self.rotation, 0.0, 45.0)?;
        range("saturation", self.saturation, 0.0, 1.0)?;
        single("background_range", self.background_range, 0.0, 1.0)?;
        single("tint", self.tint, 0.0, 1.0)?;
        single("texture_contrast", self.texture_contrast, 0.0, 0.9)?;
        range("texture_period", self.texture_period, 2.0, 32.0)?;
        // Every shape needs room for its background on the dark side (luma·(1 − texture) − c ≥ 0) or on
        // the light side (luma + c ≤ 1); for all lumas one of them holds exactly when:
        let most = (1.0 - self.texture_contrast) / (2.0 - self.texture_contrast);
        single("min_contrast", self.min_contrast, 0.0, most)
    }
}
