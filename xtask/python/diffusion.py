"""Gaussian diffusion with a learned variance, as in the official DiT code (improved DDPM, arXiv 2102.09672).

All tensors are (B, C, H, W), t is (B,) in 0..1000.
"""

import math

import torch
from torch.nn import functional as F

import setting


def _tables(steps=1000):
    """The linear schedule, computed in f64 and kept in f32."""
    betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device=setting.device)
    bar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64, device=setting.device), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    tables = {
        "sqrt_bar": bar.sqrt(),
        "sqrt_one_minus_bar": (1 - bar).sqrt(),
        "sqrt_recip_bar": (1 / bar).sqrt(),
        "sqrt_recip_bar_minus_1": (1 / bar - 1).sqrt(),
        "coef_x0": betas * before.sqrt() / (1 - bar),
        "coef_xt": (1 - before) * (1 - betas).sqrt() / (1 - bar),
        "log_beta": betas.log(),
        # At t = 0 the variance is 0: its logarithm is that of t = 1.
        "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
    }
    return {name: table.float() for name, table in tables.items()}


TABLES = _tables()


def at(name, t):
    return TABLES[name][t][:, None, None, None]  # (B, 1, 1, 1)


def q_sample(x, t, noise):
    return at("sqrt_bar", t) * x + at("sqrt_one_minus_bar", t) * noise


def true_posterior(x, x_t, t):
    """Mean and log-variance of q(x_{t-1} | x_t, x_0)."""
    return at("coef_x0", t) * x + at("coef_xt", t) * x_t, at("log_variance", t)


def model_posterior(x_t, t, eps, v):
    """Mean and log-variance of p(x_{t-1} | x_t), the learned range."""
    x0 = at("sqrt_recip_bar", t) * x_t - at("sqrt_recip_bar_minus_1", t) * eps
    mean = at("coef_x0", t) * x0 + at("coef_xt", t) * x_t
    share = (v + 1) / 2
    return mean, share * at("log_beta", t) + (1 - share) * at("log_variance", t)


def mean_flat(x):
    return x.mean(dim=(1, 2, 3))  # (B,)


def normal_kl(mean1, log1, mean2, log2):
    return 0.5 * (-1.0 + log2 - log1 + torch.exp(log1 - log2) + (mean1 - mean2) ** 2 * torch.exp(-log2))


def cdf(x):
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def decoder_log_likelihood(x, mean, log_scale):
    """Of a Gaussian discretised to bins of 1/255 on each side."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    plus, minus = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    inner = torch.where(x > 0.999, torch.log((1 - minus).clamp(min=1e-12)), torch.log((plus - minus).clamp(min=1e-12)))
    return torch.where(x < -0.999, torch.log(plus.clamp(min=1e-12)), inner)


def kl_or_decoder(x, x_t, t, target, mean, log_variance):
    """KL(target || N(mean, variance)) in bits, the decoder's likelihood of x where t is 0; (B,)."""
    kl = mean_flat(normal_kl(*target, mean, log_variance)) / math.log(2.0)
    decoder = -mean_flat(decoder_log_likelihood(x, mean, 0.5 * log_variance)) / math.log(2.0)
    return torch.where(t == 0, decoder, kl)


def loss(out, x, x_t, t, noise):
    """MSE of eps plus the variational bound, which trains the variance alone; (B,)."""
    eps, v = out.chunk(2, dim=1)
    posterior = model_posterior(x_t, t, eps.detach(), v)
    vb = kl_or_decoder(x, x_t, t, true_posterior(x, x_t, t), *posterior)
    return mean_flat((noise - eps) ** 2) + vb


def distillation_loss(out, taught, x, x_t, t):
    """MSE of the two eps plus the KL from the teacher's posterior to the student's; (B,)."""
    eps, v = out.chunk(2, dim=1)
    teacher_eps, teacher_v = taught.chunk(2, dim=1)
    target = model_posterior(x_t, t, teacher_eps, teacher_v)
    posterior = model_posterior(x_t, t, eps.detach(), v)
    return mean_flat((eps - teacher_eps) ** 2) + kl_or_decoder(x, x_t, t, target, *posterior)


def without_massive(h, sigmas=2.0):
    """Values further than `sigmas` from their sample's mean become 0; (B, T, D)."""
    mean = h.mean(dim=(1, 2), keepdim=True)
    deviation = h.var(dim=(1, 2), keepdim=True).sqrt()
    return h * ((h - mean).abs() < sigmas * deviation)


def feature_loss(student, teacher):
    """Of pairs of hidden states (B, T, D), each side masked by itself; a scalar."""
    pairs = zip(student, teacher, strict=True)
    return sum(F.mse_loss(without_massive(s.float()), without_massive(t.float())) for s, t in pairs) / len(student)


def guided(model, x, t, y, null, scale):
    """Classifier-free guidance on the first three channels; the rest is the conditional output's (B, 2C, H, W)."""
    out, _ = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))  # (2B, 2C, H, W)
    cond, uncond = out.chunk(2, dim=0)
    eps = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
    return torch.cat([eps, cond[:, 3:]], dim=1)


def p_sample(out, x_t, t, noise):
    """x_{t-1}, without clipping x_0."""
    eps, v = out.chunk(2, dim=1)
    mean, log_variance = model_posterior(x_t, t, eps, v)
    return mean + (t != 0).float()[:, None, None, None] * torch.exp(0.5 * log_variance) * noise
