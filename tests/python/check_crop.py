"""Compares `center_crop` with Pillow, as ADM and DiT call it, on images of odd sizes; prints how often bytes differ.

    pip install pillow==11.3.0 numpy==2.4.6
    cargo build --release --workspace --example crop
    python tests/python/check_crop.py target/release/examples/crop

Ends with an error where a byte differs by more than one level.
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import PIL
from PIL import Image

IMAGES = 200


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The steps of guided-diffusion's image_datasets.py: halve by boxes, resize by cubics, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def main() -> None:
    binary = sys.argv[1]
    rng = np.random.default_rng(0)
    images = different = values = changed = largest = 0
    for size in (64, 256):
        with tempfile.TemporaryDirectory() as folder:
            source, target = pathlib.Path(folder, "in"), pathlib.Path(folder, "out")
            source.mkdir()
            target.mkdir()
            for number in range(IMAGES // 2):
                width, height = (int(side) * 2 + 1 for side in rng.integers(size // 4, 2 * size, 2))
                # Noise over waves: edges of every sharpness, and both ends of the scale.
                y, x = np.mgrid[0:height, 0:width][..., None]
                waves = 127 + 110 * np.sin(x / rng.uniform(2, 40) + y / rng.uniform(2, 40) + np.arange(3))
                pixels = (waves + rng.normal(0, 30, waves.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(source / f"{number:03}.png")
            files = sorted(source.iterdir())
            subprocess.run([binary, str(size), target, *files], check=True)
            for file in files:
                theirs = np.asarray(center_crop(Image.open(file), size)).astype(int)
                ours = np.asarray(Image.open(target / file.name)).astype(int)
                off = np.abs(theirs - ours)
                images, different = images + 1, different + int(off.any())
                values, changed = values + off.size, changed + int((off > 0).sum())
                largest = max(largest, int(off.max()))
    print(
        f"Pillow {PIL.__version__}: {images} images of odd sizes, {different} of them not equal; "
        f"{changed} of {values} bytes differ, by {largest} at most"
    )
    if largest > 1:
        sys.exit("a byte differs by more than one level")


if __name__ == "__main__":
    main()
