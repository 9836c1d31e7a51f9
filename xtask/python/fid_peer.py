"""The Python side of `cargo xtask bench fid`: python fid_peer.py FOLDER {prepare,network,frechet,precision-recall} [--threads N]

`prepare` writes the inputs of all tasks: weights and images that are formulas (the time does not depend on their values, the
comparison needs no download). The tasks speak protocol.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import protocol

FEATURES, IMAGES, SIDE, ROWS = 2048, 32, 256, 10_000


def mixed(text, count):
    """splitmix64 over 1..count, begun at FNV-1a of the text: the weights of the project's golden files."""
    start = 0xCBF29CE484222325
    for c in text.encode():
        start = ((start ^ c) * 0x100000001B3) % 2**64
    z = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.int64)


def weights():
    """As `weights(0)` in crates/fid/tests/suite/synthetic.rs."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Names and shapes come from torch-fidelity's own network, which insists on loading weights when it is made.
    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            pass

    load, torch.load = torch.load, lambda *args, **kwargs: {}
    try:
        shapes = {name: tuple(t.shape) for name, t in Empty("inception", ["2048"], "none").state_dict().items()}
    finally:
        torch.load = load
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            continue
        k = mixed(key, int(np.prod(shape)))
        unit = k.astype(np.float32) * np.float32(2**-24)
        sign = (2 * k - 2**24).astype(np.float32) * np.float32(2**-24)
        if key.endswith("conv.weight"):
            value = sign * np.float32(np.sqrt(6.0 / np.prod(shape[1:])))
        elif key.endswith(("bn.weight", "bn.running_var")):
            value = np.float32(0.8) + unit * np.float32(0.4)
        elif key.endswith(("bn.bias", "bn.running_mean")):
            value = sign * np.float32(0.1)
        elif key == "fc.weight":
            value = sign * np.float32(np.sqrt(4.0 / 2048))
        else:
            value = sign * np.float32(0.5)
        state[key] = torch.from_numpy(value.reshape(shape))
    return state


def rows(name, count, shift):
    """Correlated features above zero, as a network's are."""
    rng = np.random.default_rng(abs(shift) + len(name))
    low = rng.standard_normal((count, 256), dtype=np.float32)
    basis = np.random.default_rng(7).standard_normal((256, FEATURES), dtype=np.float32) / 16
    noise = rng.standard_normal((count, FEATURES), dtype=np.float32)
    return np.maximum(low @ basis + 0.3 * noise + 0.1 * shift, 0).astype(np.float32)


def prepare(folder):
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights(), folder / "weights.pth")
    pixels = mixed("images", IMAGES * SIDE * SIDE * 3) % 256
    np.savez(folder / "images.npz", arr_0=pixels.astype(np.uint8).reshape(IMAGES, SIDE, SIDE, 3))
    for name, shift in [("a", 0), ("b", 1)]:
        x = rows(name, 6000, shift)
        np.savez(folder / f"{name}.npz", mu=x.mean(0, dtype=np.float64), sigma=np.cov(x, rowvar=False))
    np.savez(folder / "reference.npz", arr_0=rows("reference", ROWS, 0))
    np.savez(folder / "samples.npz", arr_0=rows("samples", ROWS, 1))


def network(folder):
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(folder / "weights.pth")
    ).eval()
    images = torch.from_numpy(np.load(folder / "images.npz")["arr_0"]).permute(0, 3, 1, 2).contiguous()

    def step():
        with torch.no_grad():
            return net(images)[0].numpy()

    return step, {"images": IMAGES}


def frechet(folder):
    from scipy.linalg import sqrtm

    a, b = np.load(folder / "a.npz"), np.load(folder / "b.npz")
    a, b = {k: a[k] for k in a}, {k: b[k] for k in b}

    def step():
        root = sqrtm(a["sigma"] @ b["sigma"]).real
        mean = a["mu"] - b["mu"]
        return np.array([mean @ mean + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * np.trace(root)])

    return step, {}


def precision_recall(folder, k=3, block=10_000):
    """ADM's routine in blocks, in f32: squared distances, radii, who lies in whose."""
    reference, samples = (np.load(folder / f"{name}.npz")["arr_0"] for name in ["reference", "samples"])

    def squared(u, v):
        un, vn = np.square(u).sum(1)[:, None], np.square(v).sum(1)[None, :]
        return np.maximum(un - 2 * (u @ v.T) + vn, 0)

    def radii(x):
        out = np.empty(len(x), np.float32)
        for i in range(0, len(x), block):
            out[i : i + block] = np.partition(squared(x[i : i + block], x), k, axis=1)[:, k]
        return out

    def step():
        reference_radii, sample_radii = radii(reference), radii(samples)
        covered_samples = np.zeros(len(samples), bool)
        covered_reference = np.zeros(len(reference), bool)
        for i in range(0, len(reference), block):
            distances = squared(reference[i : i + block], samples)
            covered_samples |= (distances <= reference_radii[i : i + block, None]).any(0)
            covered_reference[i : i + block] = (distances <= sample_radii[None, :]).any(1)
        return np.array([covered_samples.mean(), covered_reference.mean()])

    return step, {}


TASKS = {"network": network, "frechet": frechet, "precision-recall": precision_recall}


def difference(file):
    """max |a - b| / max |a| between an array and the numbers that the binary left in `file`, where it is."""

    def of(output):
        if not file.exists():
            return None
        ours = np.array(json.loads(file.read_text()), dtype=np.float64).reshape(output.shape)
        return float(np.abs(output - ours).max() / np.abs(output).max())

    return of


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=["prepare", *TASKS])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.task == "prepare":
        return prepare(args.folder)
    stream = protocol.answers()
    versions = {"numpy": np.__version__}
    if args.task == "network":
        import torch
        import torch_fidelity

        torch.set_num_threads(args.threads)
        versions |= {"torch": torch.__version__, "torch-fidelity": torch_fidelity.__version__}
    if args.task == "frechet":
        import scipy

        versions["scipy"] = scipy.__version__
    step, _ = TASKS[args.task](args.folder)
    protocol.converse(stream, step, versions, difference(args.folder / f"ours-{args.task}.json"))


if __name__ == "__main__":
    main()
