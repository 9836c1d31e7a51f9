//! The ten silhouettes as signed distances (negative inside) in units of the shape's radius, x to
//! the right and y up. Only operations that IEEE 754 rounds exactly occur (no sin, no exp), so the
//! images are the same on every platform.
//!
//! Formulas after Inigo Quilez, "2D distance functions" (<https://iquilezles.org/articles/distfunctions2d/>).
//! Where an outline is cut from half planes, the largest of their distances is taken: exact at the
//! edges, and it keeps the corners sharp.

/// Names of the classes; the class id is the position.
pub const CLASSES: [&str; 10] = [
    "disc",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "crescent",
    "hourglass",
    "bar",
];

fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

fn rectangle(x: f32, y: f32, half_width: f32, half_height: f32) -> f32 {
    (x.abs() - half_width).max(y.abs() - half_height)
}

pub(super) fn disc(x: f32, y: f32) -> f32 {
    length(x, y) - 0.95
}

pub(super) fn square(x: f32, y: f32) -> f32 {
    rectangle(x, y, 0.82, 0.82)
}

/// Corners (0, 1), (±1, −0.7).
pub(super) fn triangle(x: f32, y: f32) -> f32 {
    // Normal of the right edge from (0, 1) to (1, −0.7): (1.7, 1) / √3.89.
    const NX: f32 = 0.861_934;
    const NY: f32 = 0.507_020;
    (NX * x.abs() + NY * (y - 1.0)).max(-0.7 - y)
}

/// Five points at distance 1, notches at distance 0.45.
pub(super) fn star(x: f32, y: f32) -> f32 {
    // Mirror the plane into the wedge of half a point (normals at 36° and −36°).
    const KX: f32 = 0.809_017;
    const KY: f32 = -0.587_785_25;
    const NOTCH: f32 = 0.45;
    let mut x = x.abs();
    let mut y = y;
    let d = (KX * x + KY * y).max(0.0) * 2.0;
    (x, y) = (x - d * KX, y - d * KY);
    let d = (-KX * x + KY * y).max(0.0) * 2.0;
    (x, y) = (x + d * KX, y - d * KY);
    x = x.abs();
    y -= 1.0;
    // The edge from the tip (0, 0) to the notch (ex, ey).
    let (ex, ey) = (NOTCH * -KY, NOTCH * KX - 1.0);
    let along = ((x * ex + y * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0);
    let distance = length(x - ex * along, y - ey * along);
    if y * ex - x * ey > 0.0 {
        distance
    } else {
        -distance
    }
}

pub(super) fn cross(x: f32, y: f32) -> f32 {
    rectangle(x, y, 0.98, 0.31).min(rectangle(x, y, 0.31, 0.98))
}

pub(super) fn ring(x: f32, y: f32) -> f32 {
    (length(x, y) - 0.74).abs() - 0.23
}

pub(super) fn heart(x: f32, y: f32) -> f32 {
    // Quilez' heart stands on its tip, 1.21 wide and 1.10 high.
    const SCALE: f32 = 1.62;
    let x = x.abs() / SCALE;
    let y = y / SCALE + 0.56;
    let distance = if x + y > 1.0 {
        length(x - 0.25, y - 0.75) - 0.353_553_4
    } else {
        let m = 0.5 * (x + y).max(0.0);
        let d = length(x, y - 1.0).min(length(x - m, y - m));
        if x > y { d } else { -d }
    };
    distance * SCALE
}

/// A disc without a smaller disc at its right; moved so that its mass is in the middle.
pub(super) fn crescent(x: f32, y: f32) -> f32 {
    let x = x - 0.12;
    (length(x, y) - 1.0).max(0.78 - length(x - 0.5, y))
}

/// Two triangles tip to tip.
pub(super) fn hourglass(x: f32, y: f32) -> f32 {
    // Right edge from (0.06, 0) to (0.82, 0.95): normal (0.95, −0.76) / √1.4801.
    const NX: f32 = 0.780_869;
    const NY: f32 = -0.624_695;
    let (x, y) = (x.abs(), y.abs());
    (NX * (x - 0.06) + NY * y).max(y - 0.95)
}

pub(super) fn bar(x: f32, y: f32) -> f32 {
    rectangle(x, y, 1.05, 0.36)
}
