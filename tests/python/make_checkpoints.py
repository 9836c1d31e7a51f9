"""Writes the small checkpoints in assets/golden/checkpoints with the libraries that write real ones.

    pip install -r tests/python/requirements.txt
    python tests/python/make_checkpoints.py assets/golden/checkpoints

The networks are tiny and their weights random; what matters is the form of the files.
"""

import argparse
import collections
import pathlib
import shutil
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file

OUT = pathlib.Path(sys.argv[1])
D, DEPTH, HEADS, PATCH, CHANNELS, SIZE, CLASSES, MLP = 8, 2, 2, 2, 4, 4, 3, 4


def random(generator, *shape):
    return torch.randn(*shape, generator=generator) * 0.3


def positions(width, grid):
    """The table of the official code: columns first, sines before cosines."""
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    rows = []
    for r in range(grid):
        for c in range(grid):
            rows.append(np.concatenate([f(x * omega) for x in (c, r) for f in (np.sin, np.cos)]))
    return torch.from_numpy(np.stack(rows)).float()[None]


def dit(generator):
    d = collections.OrderedDict()

    def linear(name, o, i):
        d[f"{name}.weight"] = random(generator, o, i)
        d[f"{name}.bias"] = random(generator, o)

    d["pos_embed"] = positions(D, SIZE // PATCH)
    d["x_embedder.proj.weight"] = random(generator, D, CHANNELS, PATCH, PATCH)
    d["x_embedder.proj.bias"] = random(generator, D)
    linear("t_embedder.mlp.0", D, 256)
    linear("t_embedder.mlp.2", D, D)
    d["y_embedder.embedding_table.weight"] = random(generator, CLASSES + 1, D)
    for i in range(DEPTH):
        linear(f"blocks.{i}.attn.qkv", 3 * D, D)
        linear(f"blocks.{i}.attn.proj", D, D)
        linear(f"blocks.{i}.mlp.fc1", MLP * D, D)
        linear(f"blocks.{i}.mlp.fc2", D, MLP * D)
        linear(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    linear("final_layer.linear", PATCH * PATCH * 2 * CHANNELS, D)
    linear("final_layer.adaLN_modulation.1", 2 * D, D)
    return d


def mar(generator):
    d = collections.OrderedDict()

    def linear(name, o, i):
        d[f"{name}.weight"] = random(generator, o, i)
        d[f"{name}.bias"] = random(generator, o)

    def norm(name, n):
        d[f"{name}.weight"] = 1 + random(generator, n)
        d[f"{name}.bias"] = random(generator, n)

    tokens, buffer, c, w = 4, 2, 16, 4
    d["class_emb.weight"] = random(generator, CLASSES, D)
    d["fake_latent"] = random(generator, 1, D)
    d["mask_token"] = random(generator, 1, 1, D)
    d["encoder_pos_embed_learned"] = random(generator, 1, buffer + tokens, D)
    d["decoder_pos_embed_learned"] = random(generator, 1, buffer + tokens, D)
    d["diffusion_pos_embed_learned"] = random(generator, 1, tokens, D)
    linear("z_proj", D, c)
    norm("z_proj_ln", D)
    for stage in ("encoder_blocks", "decoder_blocks"):
        for i in range(2):
            norm(f"{stage}.{i}.norm1", D)
            linear(f"{stage}.{i}.attn.qkv", 3 * D, D)
            linear(f"{stage}.{i}.attn.proj", D, D)
            norm(f"{stage}.{i}.norm2", D)
            linear(f"{stage}.{i}.mlp.fc1", MLP * D, D)
            linear(f"{stage}.{i}.mlp.fc2", D, MLP * D)
    norm("encoder_norm", D)
    linear("decoder_embed", D, D)
    norm("decoder_norm", D)
    net = "diffloss.net"
    linear(f"{net}.time_embed.mlp.0", w, 256)
    linear(f"{net}.time_embed.mlp.2", w, w)
    linear(f"{net}.cond_embed", w, D)
    linear(f"{net}.input_proj", w, c)
    norm(f"{net}.res_blocks.0.in_ln", w)
    linear(f"{net}.res_blocks.0.mlp.0", w, w)
    linear(f"{net}.res_blocks.0.mlp.2", w, w)
    linear(f"{net}.res_blocks.0.adaLN_modulation.1", 3 * w, w)
    linear(f"{net}.final_layer.linear", 2 * c, w)
    linear(f"{net}.final_layer.adaLN_modulation.1", 2 * w, w)
    return d


def trained(weights):
    """The state of an optimiser after one step, as training scripts save it."""
    parameters = [torch.nn.Parameter(v.clone()) for v in list(weights.values())[1:4]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return optimizer.state_dict()


def pipeline(folder):
    """A pipeline that diffusers saved, and what its network answers."""
    torch.manual_seed(5)
    network = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=D // HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS,
        num_layers=DEPTH, sample_size=SIZE, patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 0.3)
        # One embedder, of which diffusers keeps a copy in every block.
        first = network.transformer_blocks[0].norm1.emb
        for block in network.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first.state_dict())
        x = torch.randn(3, CHANNELS, SIZE, SIZE)
        t, y = torch.tensor([0, 17, 981]), torch.tensor([0, 2, CLASSES])
        as_is = network(x, t, y).sample
        # The official code divides the exponents of the time's frequencies by 128, diffusers' class by 127.
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        official = network(x, t, y).sample
    DiTPipeline(network, None, DDIMScheduler(beta_schedule="linear", clip_sample=False)).save_pretrained(folder)
    save_file({"in.x": x, "in.t": t, "in.y": y, "out": official, "out.as_is": as_is}, folder / "answers.safetensors")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    weights = dit(generator)
    save_file(dict(weights), OUT / "dit.safetensors")
    torch.save(weights, OUT / "plain.pt")
    torch.save(
        {
            "model": {k: 2 * v for k, v in weights.items()},
            "ema": weights,
            "opt": trained(weights),
            "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4, image_size=256, ckpt=None, results=pathlib.Path("r")),
        },
        OUT / "training.pt",
    )
    # A view with strides, a parameter, and two tensors of one storage.
    odd = {k: v.clone() for k, v in weights.items()}
    name = "blocks.0.attn.proj.weight"
    odd[name] = odd[name].t().contiguous().t()
    name = "blocks.0.mlp.fc1.weight"
    odd[name] = torch.nn.Parameter(odd[name])
    both = torch.cat([odd["t_embedder.mlp.2.bias"], odd["t_embedder.mlp.0.bias"]])
    odd["t_embedder.mlp.2.bias"], odd["t_embedder.mlp.0.bias"] = both[:D], both[D:]
    torch.save(odd, OUT / "views.pt")
    masked = mar(generator)
    torch.save(
        {"model": {k: 2 * v for k, v in masked.items()}, "model_ema": masked, "epoch": 399,
         "args": argparse.Namespace(model="mar_large")},
        OUT / "mar.pth",
    )
    # As Stable Diffusion's training of an autoencoder leaves it: the loss has weights, too, and so has the average.
    kl = {"decoder.conv_in.weight": random(generator, 2, 1, 3, 3), "loss.logvar": torch.zeros(()),
          "model_ema.decay": torch.tensor(0.9999)}
    torch.save(
        {"epoch": 3, "global_step": 17, "state_dict": collections.OrderedDict(kl), "optimizer_states": [], "callbacks": {}},
        OUT / "lightning.ckpt",
    )
    pipeline(OUT / "pipeline")
    for file in OUT.rglob("*.*"):
        if file.is_file():
            file.chmod(0o644)


main()
