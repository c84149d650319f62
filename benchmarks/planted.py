"""Copies of images planted in a pool, and how well a method finds them: what mining.py and copies.py share.

An archive holds images in folders of their classes. Half of its images, drawn by a hash of their names, are guarded;
copies of them are planted in the pool, which is the other half. A false alarm is a pool image that was not planted and
is taken for a copy. CIFAR-10 has real near-copies within classes (Barz and Denzler, "Do We Train on Test Data?", 2020),
so pairs of one class are counted apart.
"""

import hashlib
import io
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from scipy.fft import dctn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline.core.data.images import decode
from pipeline.core.mining import copies
from pipeline.core.progress import Progress


def jpeg(image: Image.Image) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=30)
    return decode(out.getvalue())


def half(image: Image.Image) -> Image.Image:
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


def crop(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share), round(image.height * share)
    return image.crop((x, y, image.width - x, image.height - y))


def caption(image: Image.Image, share: float, covers: bool) -> Image.Image:
    """Put a bar with blocks like words over the lower edge, or below it."""
    height = max(2, round(image.height * share))
    page = Image.new("RGB", (image.width, image.height + (0 if covers else height)), "black")
    page.paste(image)
    pen, top = ImageDraw.Draw(page), page.height - height
    pen.rectangle((0, top, page.width, page.height), fill="black")
    for word in range(6):
        left = page.width * (0.05 + 0.15 * word)
        pen.rectangle((left, top + height * 0.35, left + page.width * 0.1, top + height * 0.65), fill="white")
    return page


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 30": jpeg,
    "half size and back": half,
    "10 % cropped at each border": lambda image: crop(image, 0.1),
    "10 % cropped, 5 % at each border": lambda image: crop(image, 0.05),
    "20 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "20 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "caption over 15 %": lambda image: caption(image, 0.15, covers=True),
    "caption added, 15 %": lambda image: caption(image, 0.15, covers=False),
}
Answer = tuple[np.ndarray, np.ndarray]  # similarity (N,) and which guarded image (N,)
Method = Callable[[list[Image.Image]], Answer]  # of N pool images


def ours(pool: np.ndarray, guarded: np.ndarray, threshold: float = 0.93) -> Answer:
    """This project's search among thumbnails (N, 32, 32) and (G, 32, 32)."""
    found = copies.nearest(pool, guarded, threshold)
    return found.similarity, found.which


def hash_bits(thumbs: np.ndarray) -> np.ndarray:
    """pHash (Zauner, 2010): 64 signs about the median, as (N, 64) of length 1."""
    low = dctn(thumbs.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(len(thumbs), -1)
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32) / 8


def unit(flat: np.ndarray) -> np.ndarray:
    flat = flat.astype(np.float32) - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)


def read(archive: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    """Read so many images and their classes, in an order that a hash of their names gives."""
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))]
        names = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
        found = []
        with Progress(len(names), "images", "read") as progress:
            for name in names:
                found.append(decode(source.read(name)))
                progress.update()
        return found, [name.split("/")[-2] for name in names]


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        threshold: similarity from which on it takes a pool image for a copy.
        alarms: false ones, of pairs of two classes and of one.
        recall: share of each kind of copies that it takes for a copy of the right image.
        similarity, which: its answer about the pool, before anything was planted.
        seconds: that this answer took.
    """

    threshold: float
    alarms: tuple[int, int]
    recall: dict[str, float]
    similarity: np.ndarray
    which: np.ndarray
    seconds: float


def search(
    images: list[Image.Image], classes: list[str], plant: int, method: Method, threshold: float | None = None
) -> Found:
    """Look for copies of the first half of the images in the second half, and among `plant` copies of each kind.

    Args:
        threshold: None for that at which the method takes at most 1 in 1,000 of the pool (one, of a smaller pool) for
            a copy of an image of another class, which no real copy is.
    """
    half_way = len(images) // 2
    began = time.monotonic()
    similarity, which = method(images[half_way:])
    seconds = time.monotonic() - began
    same = np.array(classes[:half_way])[which] == np.array(classes[half_way:])
    if threshold is None:
        others = np.sort(np.where(same, -1, similarity))
        step = 1 if similarity.dtype.kind == "i" else 1e-6
        threshold = others[-max(1, len(others) // 1000) - 1] + step
    taken = similarity >= threshold
    recall = {}
    for kind, make in KINDS.items():
        alike, place = method([make(image) for image in images[:plant]])
        recall[kind] = float(((alike >= threshold) & (place == np.arange(plant))).mean())
    alarms = int((taken & ~same).sum()), int((taken & same).sum())
    return Found(float(threshold), alarms, recall, similarity, which, seconds)


def show(found: dict[str, Found], guarded: int) -> None:
    """Print a Markdown table, a column a method; pairs are of a pool image and one of `guarded` images."""
    cells = {
        "threshold": [f"{each.threshold:.4g}" for each in found.values()],
        "false alarms: pairs of two classes, and of one": ["{} and {}".format(*each.alarms) for each in found.values()],
        "million pairs a second, describing the pool included": [
            f"{len(each.similarity) * guarded / each.seconds / 1e6:.3f}" for each in found.values()
        ],
        **{kind: [f"{each.recall[kind]:.3f}" for each in found.values()] for kind in KINDS},
    }
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} |")
