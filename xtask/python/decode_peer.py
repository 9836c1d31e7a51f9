"""Photograph-like images with the pixels that Pillow decodes: python decode_peer.py FOLDER [--images N] [--largest SIDE]

Needs numpy and Pillow alone. FOLDER gets the files and pillow.npz with (H, W, 3) uint8 by file name, the test
`golden_decode_against_pillow` of tinyfusion-fid compares (TINYFUSION_DECODE=FOLDER for another than its own). A file's name says
its kind, up to the last `-`.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, features

# Name, mode of the image, format, how it is saved.
KINDS = [
    ("jpeg-444-q95", "RGB", "jpeg", {"quality": 95, "subsampling": 0}),
    ("jpeg-422-q90", "RGB", "jpeg", {"quality": 90, "subsampling": 1}),
    ("jpeg-420-q75", "RGB", "jpeg", {"quality": 75, "subsampling": 2}),
    ("jpeg-420-q30", "RGB", "jpeg", {"quality": 30, "subsampling": 2}),
    ("jpeg-420-progressive", "RGB", "jpeg", {"quality": 85, "subsampling": 2, "progressive": True}),
    ("jpeg-grey", "L", "jpeg", {"quality": 85}),
    ("png-rgb", "RGB", "png", {}),
    ("png-grey", "L", "png", {}),
    ("png-palette", "P", "png", {}),
    ("png-alpha", "RGBA", "png", {}),
    ("webp-lossless", "RGB", "webp", {"lossless": True}),
    ("webp-lossy", "RGB", "webp", {"quality": 80}),
]


def photograph(rng, height, width):
    """Noise of a natural spectrum (1/f), a gradient of light, and things with sharp and saturated edges: RGB uint8."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    grey, tints = [
        np.fft.ifft2(np.fft.fft2(rng.standard_normal((n, height, width))) * amplitude).real for n in (1, 3)
    ]
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    scene = grey[0] / grey.std().clip(1e-9) * 40 + rng.normal(0, 40) * x + rng.normal(0, 40) * y + 128
    scene = scene[..., None] + np.moveaxis(tints / tints.std().clip(1e-9), 0, -1) * 15
    for _ in range(4):
        cy, cx, radius = rng.random(3) * [y.max(), x.max(), 0.25]
        inside = np.hypot(y - cy, x - cx) < radius if rng.random() < 0.5 else (abs(y - cy) + abs(x - cx)) < radius
        scene[inside] = 0.3 * scene[inside] + 0.7 * rng.integers(0, 256, 3)
    return np.clip(scene + rng.normal(0, 2, scene.shape), 0, 255).round().astype(np.uint8)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20, help="of every kind")
    parser.add_argument("--largest", type=int, default=500)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(6)
    pixels = {}
    for kind, mode, ending, how in KINDS:
        for i in range(args.images):
            height, width = rng.integers(args.largest // 3, args.largest + 1, 2)
            image = Image.fromarray(photograph(rng, height, width))
            if mode == "P":
                image = image.quantize(64)
            elif mode == "RGBA":
                image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
            else:
                image = image.convert(mode)
            file = io.BytesIO()
            image.save(file, ending, **how)
            name = f"{kind}-{i}.{ending}"
            (args.folder / name).write_bytes(file.getvalue())
            pixels[name] = np.asarray(Image.open(file).convert("RGB"))
    np.savez_compressed(args.folder / "pillow.npz", **pixels)
    libraries = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp")}
    print(f"{len(pixels)} images by Pillow {Image.__version__}, {libraries}")


if __name__ == "__main__":
    main()
