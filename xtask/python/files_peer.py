"""The Python side of `cargo xtask bench files`: python files_peer.py FOLDER TASK [--threads N] …

The tasks `write-…` make the files of the others once; their weights and values are random, which changes no time. The others speak
protocol.py. Nothing here is slower than a careful user would write it.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch

import protocol

# Depth, width and heads of the official networks, patches of 2.
SIZES = {"DiT-S/2": (12, 384, 6), "DiT-B/2": (12, 768, 12), "DiT-L/2": (24, 1024, 16), "DiT-XL/2": (28, 1152, 16)}
# Stable Diffusion's f8, as its config.json has it; the constructor's own defaults are a network of one stage.
SD = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=256,
)
LATENT = (4, 32, 32)


def write_checkpoint(folder, args):
    """The official network's state dict, as its authors saved it and as safetensors."""
    from safetensors.torch import save_file

    import dit

    depth, width, heads = SIZES[args.model]
    state = dit.DiT(hidden_size=width, depth=depth, num_heads=heads).state_dict()
    for tensor in state.values():
        # Everywhere: pages of zeros would be cheaper.
        tensor.normal_(std=0.02)
    torch.save(state, folder / "model.pt")
    save_file(state, folder / "model.safetensors")


def write_vae(folder, args):
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    AutoencoderKL(**SD).save_pretrained(folder / "vae")
    batch = {}
    for side in args.sizes:
        batch[f"image-{side}"] = torch.rand(1, 3, side, side) * 2 - 1
        batch[f"latent-{side}"] = torch.randn(1, 4, side // 8, side // 8)
    save_file(batch, folder / "batch.safetensors")


def write_npy(folder, args):
    """A latent and a label for every image, as fast-DiT's extract_features.py leaves them."""
    for kind in ("features", "labels"):
        (folder / f"imagenet256_{kind}").mkdir()
    latents = np.random.default_rng(0).standard_normal((256, 1, *LATENT), dtype=np.float32)
    for i in range(args.images):
        np.save(folder / f"imagenet256_features/{i}.npy", latents[i % 256])
        np.save(folder / f"imagenet256_labels/{i}.npy", np.array([i % 1000]))


def touched(state):
    """Reads a value of every page of memory and the last one, so that a mapped tensor is there and not a promise; their magnitudes' sum."""
    stride = 4096 // 4
    sums = [t.flatten()[::stride].abs().sum(dtype=torch.float64) + t.flatten()[-1].abs().double() for t in state.values()]
    return torch.stack(sums).sum().reshape(1)


def loading(read):
    held = []

    def step():
        state = read()
        # Giving the memory back is not part of loading.
        held.append(state)
        return touched(state)

    return step


def load_mmap(folder, args):
    return loading(lambda: torch.load(folder / "model.pt", weights_only=True, mmap=True))


def load_copy(folder, args):
    return loading(lambda: torch.load(folder / "model.pt", weights_only=True))


def load_checked(folder, args):
    """What ours does beside loading: the file's SHA-256, and a search for NaN and infinity."""

    def read():
        with open(folder / "model.pt", "rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
        state = torch.load(folder / "model.pt", weights_only=True, mmap=True)
        if not all(t.isfinite().all() for t in state.values()):
            raise SystemExit("model.pt has values that are not finite")
        return state

    return loading(read)


def load_safetensors(folder, args):
    from safetensors.torch import load_file

    return loading(lambda: load_file(folder / "model.safetensors"))


def autoencoder(folder, args, name):
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    x = load_file(folder / "batch.safetensors")[f"{name}-{args.size}"]
    if args.channels_last:
        vae, x = vae.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return vae, x


def encode(folder, args):
    vae, x = autoencoder(folder, args, "image")

    @torch.inference_mode()
    def step():
        return vae.encode(x).latent_dist.parameters  # (1, 8, H/8, W/8)

    return step


def decode(folder, args):
    vae, z = autoencoder(folder, args, "latent")

    @torch.inference_mode()
    def step():
        return vae.decode(z).sample  # (1, 3, H, W)

    return step


class Features(torch.utils.data.Dataset):
    """fast-DiT's CustomDataset."""

    def __init__(self, folder):
        self.features, self.labels = folder / "imagenet256_features", folder / "imagenet256_labels"
        self.names = sorted(os.listdir(self.features))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        return torch.from_numpy(np.load(self.features / name)), torch.from_numpy(np.load(self.labels / name))


def npy(folder, args):
    """fast-DiT's loop: batches by a DataLoader with a process for each thread."""
    loader = torch.utils.data.DataLoader(
        Features(folder), batch_size=args.batch, shuffle=True, num_workers=args.threads, drop_last=True, persistent_workers=True
    )

    def endless():
        while True:
            yield from loader

    batches = endless()

    def step():
        for _ in range(args.batches):
            x, y = next(batches)
            x.squeeze(1), y.squeeze(1)

    return step


WRITERS = {"write-checkpoint": write_checkpoint, "write-vae": write_vae, "write-npy": write_npy}
TASKS = {
    "load-mmap": load_mmap,
    "load-copy": load_copy,
    "load-checked": load_checked,
    "load-safetensors": load_safetensors,
    "encode": encode,
    "decode": decode,
    "npy": npy,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=[*WRITERS, *TASKS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=SIZES, default="DiT-XL/2", help="of the checkpoint")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="sides of the autoencoder's images")
    parser.add_argument("--size", type=int, default=256, help="side of the image in this task")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--images", type=int, default=8192, help="of the folder with a file for each")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=1, help="of a repetition")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.task in WRITERS:
        args.folder.mkdir(parents=True, exist_ok=True)
        WRITERS[args.task](args.folder, args)
        # Nothing is still on its way to the disk while others are timed.
        return os.sync()
    stream = protocol.answers()
    step = TASKS[args.task](args.folder, args)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
    if args.task in ("encode", "decode"):
        import diffusers

        versions["diffusers"] = diffusers.__version__
    protocol.converse(stream, step, versions, protocol.difference(args.folder / "ours.safetensors"))


if __name__ == "__main__":
    main()
