"""Holds what `tinyfusion` reads and writes against the libraries that it is for.

    pip install -r tests/python/requirements.txt
    cargo build --release -p tinyfusion-cli
    python tests/python/check_export.py target/release/tinyfusion           # seconds
    python tests/python/check_export.py target/release/tinyfusion --full    # DiT-XL/2 at its size: time and peak memory

Prints one line for each thing that was found, and fails at the first that is not so.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BINARY = pathlib.Path(sys.argv[1]).resolve()
GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "assets/golden"


def run(*words):
    subprocess.run([BINARY, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def say(what, value=""):
    print(f"{what:<100} {value}", flush=True)


def official(network):
    """diffusers divides the exponents of the time's frequencies by 127, the official code by 128."""
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return network


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


def same(what, a, b):
    assert a.keys() == b.keys(), (what, set(a) ^ set(b))
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), (what, name)
    say(what, f"bit for bit, {len(a)} tensors")


def close(what, value, limit=1e-5):
    assert value <= limit, (what, value)
    say(what, f"{value:.2e} of the largest")


@torch.no_grad()
def golden_dit(folder):
    """The official network's recorded answers against our export in diffusers."""
    with safe_open(GOLDEN / "dit_forward.safetensors", "pt") as f:
        model = json.loads(f.metadata()["config"])["model"]
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    weights = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
    own = folder / "golden"
    own.mkdir()
    save_file(weights, own / "model.safetensors")
    (own / "config.json").write_text(json.dumps({"architecture": "DiT", "model": model}))
    run("export", own, folder / "d", "--format", "diffusers")
    network = DiTTransformer2DModel.from_pretrained(folder / "d/transformer")
    x, t, y = tensors["in.x"], tensors["in.t"], tensors["in.y"]
    as_is = network(x, t, y).sample
    at_zero = network(x, torch.zeros_like(t), y).sample
    answer = official(network)(x, t, y).sample
    close("our export in diffusers (frequencies over 128) = the official network's recorded output", apart(answer, tensors["out.final"]))
    close("t = 0, diffusers as it is = frequencies over 128", apart(at_zero, network(x, torch.zeros_like(t), y).sample))
    say("(diffusers as it is, frequencies over 127, at t = 0, 417, 999: not the official network)", f"{apart(as_is, tensors['out.final']):.2e}")

    run("export", own, folder / "o", "--format", "original")
    for mmap in (False, True):
        same(f"torch.load(model.pt, weights_only=True, mmap={mmap})", torch.load(folder / "o/model.pt", weights_only=True, mmap=mmap), weights)
    run("export", own, folder / "s", "--format", "safetensors")
    same("safetensors.load_file(model.safetensors)", load_file(folder / "s/model.safetensors"), weights)
    run("export", own, folder / "b", "--format", "original", "--dtype", "bf16")
    same("torch.load of bf16", torch.load(folder / "b/model.pt", weights_only=True), {k: v.bfloat16() for k, v in weights.items()})

    run("cut", own, folder / "c", "--keep", "0,2")
    run("export", folder / "c", folder / "cd", "--format", "diffusers")
    cut = DiTTransformer2DModel.from_pretrained(folder / "cd/transformer")
    assert cut.config.num_layers == 2 and len(cut.transformer_blocks) == 2
    official(cut)
    network.transformer_blocks = torch.nn.ModuleList([network.transformer_blocks[0], network.transformer_blocks[2]])
    close("a cut model in diffusers = the dense one there without those blocks", apart(cut(x, t, y).sample, network(x, t, y).sample))

    vae = AutoencoderKL(block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(folder / "vae")
    run("export", folder / "c", folder / "p", "--format", "diffusers", "--vae", folder / "vae")
    for name, extra in (("p", {}), ("cd", {"vae": vae})):
        pipe = DiTPipeline.from_pretrained(folder / name, **extra)
        pipe.set_progress_bar_config(disable=True)
        # Its guidance takes class 1000 for the null class; this network has ten.
        images = pipe(class_labels=[1, 3], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
        assert images.shape[0] == 2
        say(f"DiTPipeline.from_pretrained({'with vae/' if not extra else 'vae given'}) draws", images.shape)


def from_diffusers(folder):
    """What diffusers saved, read and written again."""
    run("export", GOLDEN / "checkpoints/pipeline", folder / "again", "--format", "diffusers")
    name = "transformer/diffusion_pytorch_model.safetensors"
    same("diffusers' own weights → here → diffusers", load_file(folder / "again" / name), load_file(GOLDEN / "checkpoints/pipeline" / name))
    mar = f"{GOLDEN / 'checkpoints/mar.pth'}#model_ema,heads=2"
    run("export", mar, folder / "mar", "--format", "original")
    ours = torch.load(folder / "mar/checkpoint-last.pth", weights_only=True)
    theirs = torch.load(GOLDEN / "checkpoints/mar.pth", weights_only=False)["model_ema"]
    for root in ("model", "model_ema"):
        same(f"MAR: torch.load(checkpoint-last.pth)[{root!r}]", ours[root], theirs)


# In a process of its own: a child's peak begins with the memory of the one that it was forked from, which is torch's here.
MEASURE = """
import os, subprocess, sys, time
began = time.monotonic()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(status, usage.ru_maxrss * 1024, time.monotonic() - began)
"""


def peak(*words):
    """Peak memory and time of one command."""
    command = [sys.executable, "-c", MEASURE, str(BINARY), *map(str, words)]
    status, memory, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert status == "0", words
    return int(memory), float(seconds)


def full(folder):
    """DiT-XL/2 as diffusers and torch save it."""
    network = DiTTransformer2DModel(out_channels=8, norm_eps=1e-6)
    first = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    network.save_pretrained(folder / "xl", max_shard_size="20GB")
    network.save_pretrained(folder / "shards", max_shard_size="1GB")
    del network
    run("export", folder / "xl", folder / "o", "--format", "original")
    limit = 1.2
    for what, model, file in (
        ("diffusers, one file", folder / "xl", folder / "xl/diffusion_pytorch_model.safetensors"),
        ("diffusers, shards", folder / "shards", folder / "xl/diffusion_pytorch_model.safetensors"),
        ("model.pt", f"{folder / 'o/model.pt'}#family=dit", folder / "o/model.pt"),
    ):
        size = file.stat().st_size
        # Loads the model and writes it, one tensor at a time.
        memory, seconds = peak("export", model, folder / "out", "--format", "safetensors")
        written = folder / "out/model.safetensors"
        say(f"{what}: {size / 1e9:.2f} GB read and written again", f"{seconds:.1f} s, peak {memory / 1e9:.2f} GB = {memory / size:.3f} of its size")
        assert memory <= limit * size, what
        began = time.monotonic()
        subprocess.run([BINARY, "inspect", str(model)], check=True, stdout=subprocess.DEVNULL)
        say(f"{what}: inspect", f"{time.monotonic() - began:.2f} s")
        written.unlink()
        (folder / "out/README.md").unlink()
        (folder / "out").rmdir()
    began = time.monotonic()
    torch.load(folder / "o/model.pt", weights_only=True)
    say("model.pt: torch.load", f"{time.monotonic() - began:.1f} s")


with tempfile.TemporaryDirectory(dir=BINARY.parent) as name:
    place = pathlib.Path(name)
    if "--full" in sys.argv:
        full(place)
    else:
        golden_dit(place)
        from_diffusers(place)
