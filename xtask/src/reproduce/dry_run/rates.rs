//! What the units of every command cost here, as far as they grow with a model's blocks and a batch.

use super::cost::Cost;

/// Images of the draws that were measured.
pub(super) const FEW: u64 = 2;

/// What the units of every command cost here.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    /// Blocks of the whole network.
    pub(super) depth: f64,
    pub(super) learn: Steps,
    pub(super) fine_tune: Steps,
    pub(super) forward: Forward,
    pub(super) sample: Draws,
    pub(super) encode: Each,
    /// An image through the evaluator's network.
    pub(super) evaluate: Each,
    /// Bytes of a model on disk, over blocks.
    pub(super) model: Plane,
}

/// a + b·x + c·y + d·x·y, none of them below 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plane([f64; 4]);

impl Plane {
    /// Through values at the corners of `xs` × `ys`, in the order (0, 0), (1, 0), (0, 1), (1, 1). Noise must not make a
    /// larger step a cheaper one: what would fall is level.
    pub(super) fn through(xs: [u64; 2], ys: [u64; 2], values: [f64; 4]) -> Self {
        let [x0, x1] = xs.map(|x| x as f64);
        let [y0, y1] = ys.map(|y| y as f64);
        let [v00, v10, v01, v11] = values;
        let d = ((v11 - v01 - v10 + v00) / ((x1 - x0) * (y1 - y0))).max(0.0);
        let b = ((v10 - v00) / (x1 - x0) - d * y0).max(0.0);
        let c = ((v01 - v00) / (y1 - y0) - d * x0).max(0.0);
        let a = (v00 - b * x0 - c * y0 - d * x0 * y0).max(0.0);
        Self([a, b, c, d])
    }

    pub(super) fn at(self, x: f64, y: f64) -> f64 {
        let [a, b, c, d] = self.0;
        a + b * x + c * y + d * x * y
    }
}

/// Training steps, over blocks and batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Steps {
    pub(super) seconds: Plane,
    pub(super) bytes: Plane,
    /// Bytes that a run leaves on disk, over blocks.
    pub(super) disk: Plane,
}

impl Steps {
    pub(super) fn steps(&self, depth: f64, batch: f64, steps: f64) -> Cost {
        Cost {
            seconds: steps * self.seconds.at(depth, batch),
            bytes: Some(self.bytes.at(depth, batch)),
            disk: self.disk.at(depth, 0.0),
            unknown: 0,
        }
    }
}

/// Samples that pass the network once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Forward {
    /// Of one sample: over blocks, and nothing else.
    pub(super) seconds: Plane,
    /// Over blocks and samples at a time.
    pub(super) bytes: Plane,
}

/// Most samples that `loss` and the scores look at in one batch.
const HELD_OUT_BATCH: f64 = 128.0;

impl Forward {
    pub(super) fn samples(&self, depth: f64, samples: f64) -> Cost {
        Cost {
            seconds: samples * self.seconds.at(depth, 0.0),
            bytes: Some(self.bytes.at(depth, samples.min(HELD_OUT_BATCH))),
            ..Cost::default()
        }
    }
}

/// Images drawn, and decoded where the preset says by what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Draws {
    /// Of one image: over blocks and counted steps.
    pub(super) seconds: Plane,
    /// Of one image and one step of a MAR's tokens, beyond the measured ones.
    pub(super) token_step: f64,
    /// Steps of the tokens that are in `seconds`.
    pub(super) token_steps: f64,
    pub(super) decode: f64,
    pub(super) decode_bytes: f64,
    pub(super) bytes: Plane,
    /// Of every image at a time beyond the measured ones.
    pub(super) image_bytes: f64,
    /// Images that are drawn at a time.
    pub(super) at_a_time: f64,
    /// Bytes of an image on disk.
    pub(super) image_disk: f64,
}

impl Draws {
    pub(super) fn images(&self, depth: f64, counted: f64, steps: f64, count: f64) -> Cost {
        let tokens = self.token_step * (steps - self.token_steps).max(0.0);
        let more = (count.min(self.at_a_time) - FEW as f64).max(0.0);
        Cost {
            seconds: count * (self.seconds.at(depth, counted) + tokens + self.decode),
            bytes: Some(
                self.bytes.at(depth, counted) + more * self.image_bytes + self.decode_bytes,
            ),
            disk: count * self.image_disk,
            unknown: 0,
        }
    }
}

/// One image.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Each {
    pub(super) seconds: f64,
    /// Memory, of any number of them.
    pub(super) bytes: f64,
    /// What each leaves on disk.
    pub(super) disk: f64,
}

impl Each {
    pub(super) fn of(&self, images: f64) -> Cost {
        Cost {
            seconds: images * self.seconds,
            bytes: Some(self.bytes),
            disk: images * self.disk,
            unknown: 0,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Made up: a block of a sample takes a second in `learn`, half a second in the others.
    pub(in super::super) fn rates() -> Rates {
        let steps = |block: f64| Steps {
            seconds: Plane([0.1, 0.0, 0.2, block]),
            bytes: Plane([1e6, 1e5, 0.0, 1e4]),
            disk: Plane([0.0, 1e3, 0.0, 0.0]),
        };
        Rates {
            depth: 16.0,
            learn: steps(1.0),
            fine_tune: steps(0.5),
            forward: Forward {
                seconds: Plane([0.1, 0.5, 0.0, 0.0]),
                bytes: Plane([1e6, 1e5, 0.0, 0.0]),
            },
            sample: Draws {
                seconds: Plane([0.0, 0.0, 0.1, 0.5]),
                token_step: 0.0,
                token_steps: 4.0,
                decode: 1.0,
                decode_bytes: 0.0,
                bytes: Plane([1e6, 1e5, 0.0, 0.0]),
                image_bytes: 1e3,
                at_a_time: 100.0,
                image_disk: 10.0,
            },
            encode: Each {
                seconds: 2.0,
                bytes: 1e6,
                disk: 5.0,
            },
            evaluate: Each {
                seconds: 0.25,
                bytes: 2e6,
                disk: 0.0,
            },
            model: Plane([10.0, 1.0, 0.0, 0.0]),
        }
    }

    #[test]
    fn four_corners_give_the_plane_and_noise_does_not_make_larger_cheaper() {
        let truth = Plane([1.0, 2.0, 3.0, 4.0]);
        let corner = |x: u64, y: u64| truth.at(x as f64, y as f64);
        let values = [corner(2, 2), corner(4, 2), corner(2, 4), corner(4, 4)];
        let found = Plane::through([2, 4], [2, 4], values);
        assert!((found.at(28.0, 128.0) - truth.at(28.0, 128.0)).abs() < 1e-9);
        let noisy = Plane::through([2, 4], [2, 4], [5.0, 4.0, 6.0, 5.5]);
        assert!(noisy.at(28.0, 2.0) >= noisy.at(4.0, 2.0));
        assert!(noisy.at(4.0, 128.0) >= noisy.at(4.0, 2.0));
    }
}
