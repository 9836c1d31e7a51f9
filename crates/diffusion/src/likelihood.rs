use candle_core::Tensor;
use tinyfusion_core::Result;

/// KL(N(m₁, e^{l₁}) ‖ N(m₂, e^{l₂})) in nats, elementwise; the arguments are (mean, log variance) and
/// broadcast against each other.
pub fn normal_kl(first: (&Tensor, &Tensor), second: (&Tensor, &Tensor)) -> Result<Tensor> {
    let ((mean1, log1), (mean2, log2)) = (first, second);
    let ratio = log1.broadcast_sub(log2)?; // ln(σ₁² / σ₂²)
    let spread = ((ratio.exp()? - &ratio)? - 1.0)?;
    let shift = mean1
        .broadcast_sub(mean2)?
        .sqr()?
        .broadcast_mul(&log2.neg()?.exp()?)?;
    Ok((spread.broadcast_add(&shift)? * 0.5)?)
}

/// ln of the probability that a Gaussian puts on the 8-bit bin of `x`, elementwise, in nats
/// (Ho et al., 2006.11239, eq. 13).
///
/// `x` (B, C, H, W) holds pixels in [-1, 1] in steps of 2/255; `log_scale` is ln σ and broadcasts. The
/// outermost bins reach to infinity. Probabilities are clamped at 1e-12.
pub fn discretized_gaussian_log_likelihood(
    x: &Tensor,
    mean: &Tensor,
    log_scale: &Tensor,
) -> Result<Tensor> {
    const HALF_BIN: f64 = 1.0 / 255.0;
    const FLOOR: f64 = 1e-12;
    let centered = (x - mean)?;
    let inverse = log_scale.neg()?.exp()?;
    let upper = normal_cdf(&(&centered + HALF_BIN)?.broadcast_mul(&inverse)?)?;
    let lower = normal_cdf(&(&centered - HALF_BIN)?.broadcast_mul(&inverse)?)?;
    let bin = (&upper - &lower)?.maximum(FLOOR)?.log()?;
    let first_bin = upper.maximum(FLOOR)?.log()?;
    let last_bin = (1.0 - lower)?.maximum(FLOOR)?.log()?;
    let inner = x.gt(0.999)?.where_cond(&last_bin, &bin)?;
    Ok(x.lt(-0.999)?.where_cond(&first_bin, &inner)?)
}

/// The tanh approximation of the standard normal distribution function (Page, 1977), which the
/// reference uses in place of erf.
fn normal_cdf(x: &Tensor) -> Result<Tensor> {
    let cube = (x.sqr()? * x)?;
    let inner = ((x + (cube * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
    Ok(((inner.tanh()? + 1.0)? * 0.5)?)
}
