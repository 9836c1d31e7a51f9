"""timm's public blocks of a transformer or, where timm is not installed, the same layers under the same names."""

try:
    from timm.layers import Mlp, PatchEmbed
    from timm.layers.attention import Attention
except ImportError:
    from torch import nn
    from torch.nn import functional as F

    class PatchEmbed(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
            super().__init__()
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

        def forward(self, x):
            return self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D)

    class Attention(nn.Module):
        def __init__(self, dim, num_heads, qkv_bias):
            super().__init__()
            self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, True
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj = nn.Linear(dim, dim)

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            if self.fused_attn:
                out = F.scaled_dot_product_attention(q, k, v)
            else:
                out = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
            return self.proj(out.transpose(1, 2).reshape(b, t, d))

    class Mlp(nn.Module):
        def __init__(self, in_features, hidden_features, act_layer):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(in_features, hidden_features), act_layer(), nn.Linear(hidden_features, in_features)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))


__all__ = ["Attention", "Mlp", "PatchEmbed"]
