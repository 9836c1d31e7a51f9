"""DiT (Peebles & Xie 2023, arXiv 2212.09748) on timm's public blocks, under the official checkpoint's names.

B samples, T tokens, D the hidden size, C the latent's channels, p the side of a patch.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

import setting
from blocks import Attention, Mlp, PatchEmbed
from tensors import load_file


def modulate(x, shift, scale):
    """(B, T, D) by (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.half = frequencies // 2

    def forward(self, t, dtype):
        freqs = torch.exp(-math.log(10000) * torch.arange(self.half, dtype=torch.float32, device=t.device) / self.half)
        angles = t[:, None].float() * freqs  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))  # (B, D)


class LabelEmbedder(nn.Module):
    """The last row is the null class; labels are dropped by the caller."""

    def __init__(self, rows, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)  # (B, D)


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, hidden_features=int(hidden_size * mlp_ratio), act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (B, T, D)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, T, p·p·C_out)


# Whether attention is one operation; blocks are made accordingly.
FUSED_ATTENTION = True


class DiT(nn.Module):
    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.patch_size = patch_size
        self.grid = input_size // patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def unpatchify(self, x):
        b, g, p, c = x.shape[0], self.grid, self.patch_size, self.out_channels
        x = x.reshape(b, g, g, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(b, c, g * p, g * p)

    def forward(self, x, t, y, mask=None, taps=()):
        """The output (B, C_out, H, W), and the outputs of the blocks in `taps`.

        `mask` (B, depth) is the learnable one: every block runs for every sample, h + m·(block(h) - h).
        """
        h = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t, self.pos_embed.dtype) + self.y_embedder(y)  # (B, D)
        tapped = []
        for i, block in enumerate(self.blocks):
            out = block(h, c)
            h = out if mask is None else h + mask[:, i, None, None] * (out - h)
            if i in taps:
                tapped.append(h)
        return self.unpatchify(self.final_layer(h, c)).float(), tapped


class Lora(nn.Module):
    """A frozen linear layer with (alpha / rank)·B·A beside it, computed as peft does: two products per input."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        device = base.weight.device
        self.base = base.to(setting.dtype)  # frozen: rounded once
        self.a = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.b = nn.Linear(rank, base.out_features, bias=False, device=device)
        self.scale = alpha / rank
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.scale * self.b(self.a(x))


def add_lora(model, rank, alpha):
    """Freezes the model and puts a pair of trainable matrices beside every linear layer."""
    model.requires_grad_(False)
    layers = [(m, n, c) for m in model.modules() for n, c in m.named_children() if isinstance(c, nn.Linear)]
    for parent, name, linear in layers:
        setattr(parent, name, Lora(linear, rank, alpha))


def load(folder: Path):
    """The model of a folder with `config.json` and `model.safetensors`; every key has to fit."""
    config = json.loads((folder / "config.json").read_text())
    # The file's tensors, mapped into memory, become the parameters: nothing is held twice, not even while loading.
    with torch.device("meta"):
        model = DiT(**config["model"])
    weights = load_file(folder / "model.safetensors", device=str(setting.device))
    model.load_state_dict(weights, strict=True, assign=True)
    for block in model.blocks:
        block.attn.fused_attn = block.attn.fused_attn and FUSED_ATTENTION
    return model
