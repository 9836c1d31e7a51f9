use tinyfusion_core::StepRng;

use super::{SIZE, ShapesConfig, outline};

/// Everything random about one image, decided before any pixel is drawn.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scene {
    pub(super) class: u32,
    centre: [f32; 2],
    radius: f32,
    /// (cos, sin) of the rotation.
    turn: [f32; 2],
    /// Colour of the shape in [0, 1].
    pub(super) colour: [f32; 3],
    /// Colours of the background at the two ends of its gradient.
    pub(super) background: [[f32; 3]; 2],
    gradient: [f32; 2],
    texture: Texture,
}

/// Darkens the shape by up to `depth`.
#[derive(Debug, Clone, PartialEq)]
struct Texture {
    kind: Kind,
    depth: f32,
    /// Direction times frequency (cycles per pixel) along the first axis.
    axis: [f32; 2],
    phase: [f32; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Stripes,
    Dots,
}

/// Perceived brightness (Rec. 601).
pub(super) fn luma([r, g, b]: [f32; 3]) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

fn between([low, high]: [f32; 2], u: f32) -> f32 {
    low + (high - low) * u
}

/// Hue in [0, 1) and saturation at full value, as in HSV.
fn hue(h: f32, saturation: f32) -> [f32; 3] {
    [5.0, 3.0, 1.0].map(|n: f32| {
        let k = (n + h * 6.0) % 6.0;
        1.0 - saturation * k.min(4.0 - k).clamp(0.0, 1.0)
    })
}

/// A unit vector from the half-angle's tangent: no sine, so the same everywhere.
fn unit(t: f32) -> [f32; 2] {
    let n = 1.0 + t * t;
    [(1.0 - t * t) / n, 2.0 * t / n]
}

/// A unit vector in any direction: a quarter turn chosen by `quarter`, and a part of one by `t`.
fn direction(quarter: f32, t: f32) -> [f32; 2] {
    let [x, y] = unit(t);
    match (quarter * 4.0) as u32 {
        0 => [x, y],
        1 => [-y, x],
        2 => [-x, -y],
        _ => [y, -x],
    }
}

impl Scene {
    pub(super) fn draw(config: &ShapesConfig, mut rng: StepRng) -> Self {
        // One number per quantity in a fixed order, also where it is not needed: a change of one
        // range must not reshuffle everything else.
        let mut numbers = rng.uniform(22).into_iter().map(|u| u as f32);
        // Rounding to f32 may give 1.0, so indices are bounded below.
        let mut u = || numbers.next().unwrap_or(0.0);

        let class =
            ((u() * outline::CLASSES.len() as f32) as u32).min(outline::CLASSES.len() as u32 - 1);
        let middle = (SIZE as f32 - 1.0) / 2.0;
        let centre = [0; 2].map(|_| middle + config.jitter * (2.0 * u() - 1.0));
        let radius = between(config.radius, u());
        let half = f64::from(config.rotation).to_radians() / 2.0;
        let turn = unit(half.tan() as f32 * (2.0 * u() - 1.0));

        let colour = hue(u(), between(config.saturation, u()));
        let kind = [Kind::Plain, Kind::Stripes, Kind::Dots][((u() * 3.0) as usize).min(2)];
        let depth = if kind == Kind::Plain {
            0.0
        } else {
            config.texture_contrast
        };
        let frequency = 1.0 / between(config.texture_period, u());
        let axis = direction(u(), u()).map(|a| a * frequency);
        let texture = Texture {
            kind,
            depth,
            axis,
            phase: [u(), u()],
        };

        // The lumas left for the background, darker than the darkest and lighter than the lightest
        // point of the shape. `validate` made sure that one of them exists.
        let dark = luma(colour) * (1.0 - config.texture_contrast) - config.min_contrast;
        let light = luma(colour) + config.min_contrast;
        let take_dark = u() < 0.5;
        let (near, room, sign) = if dark >= 0.0 && (take_dark || light > 1.0) {
            (dark, dark, -1.0)
        } else {
            (light.min(1.0), (1.0 - light).max(0.0), 1.0)
        };
        let background = [0; 2].map(|_| {
            let level = near + sign * u() * room.min(config.background_range);
            // Adding a colour minus its luma keeps the level; the factor keeps it within [0, 1].
            let tint = hue(u(), 1.0);
            let amount = config.tint * u() * level.min(1.0 - level);
            tint.map(|c| level + amount * (c - luma(tint)))
        });
        let gradient = direction(u(), u());
        Self {
            class,
            centre,
            radius,
            turn,
            colour,
            background,
            gradient,
            texture,
        }
    }

    /// A white shape on black, for looking at the outline alone.
    #[cfg(test)]
    pub(super) fn silhouette(class: u32, centre: [f32; 2], radius: f32, degrees: f64) -> Self {
        Self {
            class,
            centre,
            radius,
            turn: unit((degrees.to_radians() / 2.0).tan() as f32),
            colour: [1.0; 3],
            background: [[0.0; 3]; 2],
            gradient: [1.0, 0.0],
            texture: Texture {
                kind: Kind::Plain,
                depth: 0.0,
                axis: [0.0; 2],
                phase: [0.0; 2],
            },
        }
    }

    /// Writes (3, 32, 32) values in [-1, 1].
    pub(super) fn paint(&self, out: &mut [f32]) {
        // Chosen outside the pixel loop, so that each loop is compiled for its outline.
        match self.class {
            0 => self.fill(out, outline::disc),
            1 => self.fill(out, outline::square),
            2 => self.fill(out, outline::triangle),
            3 => self.fill(out, outline::star),
            4 => self.fill(out, outline::cross),
            5 => self.fill(out, outline::ring),
            6 => self.fill(out, outline::heart),
            7 => self.fill(out, outline::crescent),
            8 => self.fill(out, outline::hourglass),
            _ => self.fill(out, outline::bar),
        }
    }

    fn fill(&self, out: &mut [f32], outline: impl Fn(f32, f32) -> f32) {
        let (reds, rest) = out.split_at_mut(SIZE * SIZE);
        let (greens, blues) = rest.split_at_mut(SIZE * SIZE);
        let [cos, sin] = self.turn;
        let [from, to] = self.background;
        let middle = (SIZE as f32 - 1.0) / 2.0;
        for row in 0..SIZE {
            for column in 0..SIZE {
                let (x, y) = (column as f32, row as f32);
                // Position relative to the shape in pixels, y up, turned back by its rotation.
                let (dx, dy) = (x - self.centre[0], self.centre[1] - y);
                let (px, py) = (cos * dx + sin * dy, cos * dy - sin * dx);
                let distance = outline(px / self.radius, py / self.radius) * self.radius;
                // The share of the pixel that a straight edge at this distance covers.
                let cover = (0.5 - distance).clamp(0.0, 1.0);
                let shade = 1.0 - self.texture.depth * self.texture.at(dx, dy);
                // From 0 to 1 over the width of the image.
                let along = (x - middle) * self.gradient[0] + (y - middle) * self.gradient[1];
                let mix = (along / SIZE as f32 + 0.5).clamp(0.0, 1.0);
                let pixel = row * SIZE + column;
                for (channel, plane) in [&mut *reds, &mut *greens, &mut *blues]
                    .into_iter()
                    .enumerate()
                {
                    let behind = from[channel] + (to[channel] - from[channel]) * mix;
                    let value = behind + cover * (self.colour[channel] * shade - behind);
                    plane[pixel] = (2.0 * value - 1.0).clamp(-1.0, 1.0);
                }
            }
        }
    }
}

impl Texture {
    fn at(&self, x: f32, y: f32) -> f32 {
        let [ax, ay] = self.axis;
        let first = || wave(x * ax + y * ay + self.phase[0]);
        match self.kind {
            Kind::Plain => 0.0,
            Kind::Stripes => first(),
            Kind::Dots => first() * wave(y * ax - x * ay + self.phase[1]),
        }
    }
}

/// A smooth wave between 0 and 1 with period 1, without a sine.
fn wave(t: f32) -> f32 {
    let u = (2.0 * (t - t.floor()) - 1.0).abs();
    u * u * (3.0 - 2.0 * u)
}
