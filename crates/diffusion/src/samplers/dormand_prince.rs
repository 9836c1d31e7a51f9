use candle_core::{DType, Tensor};
use tinyfusion_core::{Error, Result};

use super::TimeStep;

/// Error that [`dormand_prince`] allows in a step: atol + rtol·|y|.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Absolute.
    pub atol: f64,
    /// As a share of the state.
    pub rtol: f64,
}

impl Default for Tolerance {
    /// SiT's.
    fn default() -> Self {
        Self {
            atol: 1e-6,
            rtol: 1e-3,
        }
    }
}

/// Times of the stages as shares of the step (Dormand & Prince 1980; Hairer, Nørsett & Wanner, Solving Ordinary
/// Differential Equations I, table II.5.2).
const NODES: [f64; 6] = [1.0 / 5.0, 3.0 / 10.0, 4.0 / 5.0, 8.0 / 9.0, 1.0, 1.0];

/// Row i makes the state of stage i + 1 from the slopes before it; the last row makes the result.
const STAGES: [&[f64]; 6] = [
    &[1.0 / 5.0],
    &[3.0 / 40.0, 9.0 / 40.0],
    &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
    &[
        19372.0 / 6561.0,
        -25360.0 / 2187.0,
        64448.0 / 6561.0,
        -212.0 / 729.0,
    ],
    &[
        9017.0 / 3168.0,
        -355.0 / 33.0,
        46732.0 / 5247.0,
        49.0 / 176.0,
        -5103.0 / 18656.0,
    ],
    &[
        35.0 / 384.0,
        0.0,
        500.0 / 1113.0,
        125.0 / 192.0,
        -2187.0 / 6784.0,
        11.0 / 84.0,
    ],
];

/// Fifth order minus Shampine's fourth (Some practical Runge–Kutta formulas, 1986), as torchdiffeq has it.
const ERROR: [f64; 7] = [
    35.0 / 384.0 - 1951.0 / 21600.0,
    0.0,
    500.0 / 1113.0 - 22642.0 / 50085.0,
    125.0 / 192.0 - 451.0 / 720.0,
    -2187.0 / 6784.0 + 12231.0 / 42400.0,
    11.0 / 84.0 - 649.0 / 6300.0,
    -1.0 / 60.0,
];

/// The state in the middle of a step (Shampine 1986).
const MIDDLE: [f64; 7] = [
    6_025_192_743.0 / 30_085_553_152.0 / 2.0,
    0.0,
    51_252_292_925.0 / 65_400_821_598.0 / 2.0,
    -2_691_868_925.0 / 45_128_329_728.0 / 2.0,
    187_940_372_067.0 / 1_594_534_317_056.0 / 2.0,
    -1_776_094_331.0 / 19_743_644_256.0 / 2.0,
    11_237_099.0 / 235_043_384.0 / 2.0,
];

/// Dormand–Prince 5(4) with adaptive steps: dy/dt = `field(t, y)` from `start` (any shape, f32) at `times[0]`;
/// returns y at all `times`, which ascend or descend.
///
/// It follows torchdiffeq, which SiT samples with: time in f64, the state in f32; a step passes if the root mean square
/// of error/(atol + rtol·max(|y₀|, |y₁|)) is at most 1; the next one is 0.9·ratio^(−1/5) times as long, within
/// [0.2, 10] and not shorter after a step that passed; the first one after Hairer (II.4). Steps are not cut at the times asked
/// for: the solver goes beyond the last one and a polynomial of fourth order leads back.
pub fn dormand_prince(
    mut field: impl FnMut(f64, &Tensor) -> Result<Tensor>,
    start: &Tensor,
    times: &[f64],
    tolerance: Tolerance,
    mut on_step: impl FnMut(&TimeStep<'_>) -> Result<()>,
) -> Result<Vec<Tensor>> {
    check(times, tolerance)?;
    // Downwards is upwards in −t with the opposite slope.
    let sign = if times[1] < times[0] { -1.0 } else { 1.0 };
    let mut slope = |t: f64, y: &Tensor| -> Result<Tensor> { Ok((field(sign * t, y)? * sign)?) };
    let y = start.to_dtype(DType::F32)?;
    let t = sign * times[0];
    let f = slope(t, &y)?;
    let mut dt = first_step(&mut slope, t, &y, &f, tolerance)?;
    let mut reached = vec![y.clone()];
    let mut last = Span::resting(t, y, f);
    let mut done = 0;
    for next in times[1..].iter().map(|t| sign * t) {
        while next > last.t1 {
            let t1 = last.t1 + dt;
            if t1.is_nan() || t1 <= last.t1 {
                return Err(Error::run(format!(
                    "Dormand-Prince: steps became too short to go on at t = {}; the tolerances (atol {}, rtol {}) cannot \
                     be met there, loosen them or use a solver of fixed steps",
                    sign * last.t1,
                    tolerance.atol,
                    tolerance.rtol
                )));
            }
            let (span, ratio) = last.step(&mut slope, t1, dt, tolerance)?;
            if ratio.is_nan() {
                return Err(Error::run(format!(
                    "Dormand-Prince: the slope between t = {} and {} is not finite",
                    sign * last.t1,
                    sign * t1
                )));
            }
            let (from, accepted) = (last.t1, ratio <= 1.0);
            if accepted {
                (last, done) = (span, done + 1);
            }
            on_step(&TimeStep {
                done,
                total: None,
                from: sign * from,
                to: sign * t1,
                accepted,
                sample: &last.y1,
            })?;
            dt *= growth(ratio);
        }
        reached.push(last.at(next)?);
    }
    Ok(reached)
}

fn check(times: &[f64], tolerance: Tolerance) -> Result<()> {
    let Tolerance { atol, rtol } = tolerance;
    let good = |v: f64| v.is_finite() && v >= 0.0;
    if !(good(atol) && good(rtol) && atol + rtol > 0.0) {
        return Err(Error::usage(format!(
            "Dormand-Prince: atol and rtol must be finite, not negative and not both 0, found {atol} and {rtol}"
        )));
    }
    let ascends = times.windows(2).all(|w| w[0] < w[1]);
    let descends = times.windows(2).all(|w| w[0] > w[1]);
    if times.len() < 2 || !(ascends || descends) || times.iter().any(|t| !t.is_finite()) {
        return Err(Error::usage(
            "Dormand-Prince: the times asked for must be at least two, finite, and ascend or descend",
        ));
    }
    Ok(())
}

/// By what the step is multiplied after an error of `ratio` times what is allowed.
fn growth(ratio: f64) -> f64 {
    if ratio == 0.0 {
        return 10.0;
    }
    let least = if ratio < 1.0 { 1.0 } else { 0.2 };
    (0.9 / ratio.powf(0.2)).max(least).min(10.0)
}

/// The first step (Hairer, Nørsett & Wanner, II.4, "starting step size").
fn first_step(
    slope: &mut impl FnMut(f64, &Tensor) -> Result<Tensor>,
    t: f64,
    y: &Tensor,
    f: &Tensor,
    tolerance: Tolerance,
) -> Result<f64> {
    let scale = ((y.abs()? * tolerance.rtol)? + tolerance.atol)?;
    let (d0, d1) = (rms(&(y / &scale)?)?, rms(&(f / &scale)?)?);
    if !(d0.is_finite() && d1.is_finite()) {
        return Err(Error::run(
            "Dormand-Prince: the start or its slope is not finite (or 0 where atol is 0)",
        ));
    }
    let h0 = if d0 < 1e-5 || d1 < 1e-5 {
        1e-6
    } else {
        0.01 * d0 / d1
    };
    let ahead = slope(t + h0, &(y + (f * h0)?)?)?;
    let d2 = rms(&((ahead - f)? / scale)?)? / h0;
    let h1 = if d1 <= 1e-15 && d2 <= 1e-15 {
        (h0 * 1e-3).max(1e-6)
    } else {
        (0.01 / d1.max(d2)).powf(0.2)
    };
    Ok((100.0 * h0).min(h1))
}

/// √mean x²
fn rms(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt())
}

/// y + dt·Σ weight·slope
fn along(y: &Tensor, dt: f64, weights: &[f64], slopes: &[Tensor]) -> Result<Tensor> {
    Ok((y + sum(dt, weights, slopes)?)?)
}

/// dt·Σ weight·slope; the first weight is not 0.
fn sum(dt: f64, weights: &[f64], slopes: &[Tensor]) -> Result<Tensor> {
    let mut total = (&slopes[0] * (weights[0] * dt))?;
    for (weight, slope) in weights.iter().zip(slopes).skip(1) {
        if *weight != 0.0 {
            total = (total + (slope * (weight * dt))?)?;
        }
    }
    Ok(total)
}

/// A step that was accepted: the state and slope at its end, and the polynomial between its ends.
struct Span {
    t0: f64,
    t1: f64,
    y1: Tensor,
    f1: Tensor,
    /// Coefficients of x⁰ … x⁴ with x = (t − t0)/(t1 − t0).
    polynomial: Vec<Tensor>,
}

impl Span {
    /// At the start, before any step.
    fn resting(t: f64, y: Tensor, f: Tensor) -> Self {
        Self {
            t0: t,
            t1: t,
            polynomial: vec![y.clone()],
            y1: y,
            f1: f,
        }
    }

    /// The step of length `dt` from the end of this one to `t1`, and its error over what is allowed.
    fn step(
        &self,
        slope: &mut impl FnMut(f64, &Tensor) -> Result<Tensor>,
        t1: f64,
        dt: f64,
        tolerance: Tolerance,
    ) -> Result<(Self, f64)> {
        let (t0, y0) = (self.t1, &self.y1);
        let mut slopes = vec![self.f1.clone()]; // the last stage of a step is the first of the next
        let mut y1 = y0.clone();
        for (node, weights) in NODES.iter().zip(STAGES) {
            let t = if *node == 1.0 { t1 } else { t0 + node * dt };
            y1 = along(y0, dt, weights, &slopes)?;
            slopes.push(slope(t, &y1)?);
        }
        let allowed = ((y0.abs()?.maximum(&y1.abs()?)? * tolerance.rtol)? + tolerance.atol)?;
        let ratio = rms(&(sum(dt, &ERROR, &slopes)? / allowed)?)?;
        let middle = along(y0, dt, &MIDDLE, &slopes)?;
        let (f0, f1) = (slopes[0].clone(), slopes.swap_remove(slopes.len() - 1));
        let polynomial = fit(y0, &middle, &y1, &(&f0 * dt)?, &(&f1 * dt)?)?;
        let span = Self {
            t0,
            t1,
            y1,
            f1,
            polynomial,
        };
        Ok((span, ratio))
    }

    /// y at a time within the step.
    fn at(&self, t: f64) -> Result<Tensor> {
        let x = (t - self.t0) / (self.t1 - self.t0);
        let mut y = self.polynomial[0].clone();
        let mut power = 1.0;
        for coefficient in &self.polynomial[1..] {
            power *= x;
            y = (y + (coefficient * power)?)?;
        }
        Ok(y)
    }
}

/// The polynomial of fourth order through the states at both ends and the middle with the slopes `g0`, `g1`
/// (times the step) at the ends.
fn fit(y0: &Tensor, middle: &Tensor, y1: &Tensor, g0: &Tensor, g1: &Tensor) -> Result<Vec<Tensor>> {
    let fourth = ((((g1 - g0)? * 2.0)? - ((y1 + y0)? * 8.0)?)? + (middle * 16.0)?)?;
    let third =
        (((((g0 * 5.0)? - (g1 * 3.0)?)? + (y0 * 18.0)?)? + (y1 * 14.0)?)? - (middle * 32.0)?)?;
    let second = ((((g1 - (g0 * 4.0)?)? - (y0 * 11.0)?)? - (y1 * 5.0)?)? + (middle * 16.0)?)?;
    Ok(vec![y0.clone(), g0.clone(), second, third, fourth])
}
