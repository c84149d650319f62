"""Plants copies of images in a pool and looks for them: recall and false alarms; or times that for pools of some sizes.

    python benchmarks/mining.py cifar10.zip                       10,000 images, half of them guarded
    python benchmarks/mining.py photographs.zip --leave-one-out   few images: each is looked for among all others
    python benchmarks/mining.py cifar10.zip --time 10000 100000 1000000

An archive holds images in folders of their classes. Half of its images, drawn by a hash of their names, are guarded;
copies of them are planted in the pool, which is the other half. A false alarm is a pool image that was not planted and
is taken for a copy. CIFAR-10 has real near-copies within classes (Barz and Denzler, "Do We Train on Test Data?", 2020),
so pairs of one class are counted apart, and --sheet draws them, to judge by eye. Other methods get the threshold at
which they take 1 in 1,000 of the pool for a copy of an image of another class. Methods that need more than
thumbnails are in copies.py.
"""

import argparse
import hashlib
import io
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from scipy.fft import dctn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine

from pipeline.core import copies, sheet
from pipeline.core.images import decode
from pipeline.core.progress import Progress, duration
from pipeline.core.thumbnails import SIDE, thumbnails


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


def ours(pool: np.ndarray, guarded: np.ndarray) -> Answer:
    found = copies.nearest(pool, guarded, 0.93)
    return found.similarity, found.which


def correlation(pool: np.ndarray, guarded: np.ndarray) -> Answer:
    """The best correlation of thumbnails over shifts of up to two of their pixels."""
    similarity, which = np.full(len(pool), -1, np.float32), np.full(len(pool), -1)
    targets = unit(guarded[:, 2:-2, 2:-2].reshape(len(guarded), -1))
    for down in range(5):
        for right in range(5):
            shifted = pool[:, down : down + SIDE - 4, right : right + SIDE - 4]
            improve(similarity, which, unit(shifted.reshape(len(pool), -1)), targets)
    return similarity, which


def perceptual_hash(pool: np.ndarray, guarded: np.ndarray) -> Answer:
    """pHash; also of the mirrored guarded image."""
    similarity, which = np.full(len(pool), -1, np.float32), np.full(len(pool), -1)
    for targets in (guarded, guarded[:, :, ::-1]):
        improve(similarity, which, hash_bits(pool), hash_bits(targets))
    return similarity, which


def hash_bits(thumbs: np.ndarray) -> np.ndarray:
    """pHash (Zauner, 2010): 64 signs about the median, as (N, 64) of length 1."""
    low = dctn(thumbs.astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(len(thumbs), -1)
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32) / 8


def unit(flat: np.ndarray) -> np.ndarray:
    flat = flat.astype(np.float32) - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)


def improve(similarity: np.ndarray, which: np.ndarray, queries: np.ndarray, targets: np.ndarray) -> None:
    """Take over, in place, what is more similar by this measure; the memory for a part of the products at a time."""
    for start in range(0, len(queries), 1024):
        products = queries[start : start + 1024] @ targets.T
        at, best = products.argmax(1), products.max(1)
        part = slice(start, start + len(best))
        better = best > similarity[part]
        similarity[part][better], which[part][better] = best[better], at[better]


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Answer]] = {
    "this project's": ours,
    "correlation of thumbnails, shifted": correlation,
    "pHash, 64 bits, mirrored too": perceptual_hash,
}


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


def compare(
    images: list[Image.Image], classes: list[str], threshold: float, plant: int, sheet_file: Path | None
) -> None:
    """Half the images guarded, the other half the pool."""
    half_way = len(images) // 2
    guarded, pool = thumbnails(images[:half_way]), thumbnails(images[half_way:])
    planted = {kind: thumbnails(map(make, images[:plant])) for kind, make in KINDS.items()}
    of_guarded, of_pool = np.array(classes[:half_way]), np.array(classes[half_way:])
    print(f"{len(pool):,} pool images, {len(guarded):,} guarded, {plant:,} of them planted in each way\n")
    head = "| copies, recall | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS)
    alarms, recalls, alone = [], {kind: [] for kind in KINDS}, []
    for name, method in METHODS.items():
        similarity, which = method(pool, guarded)
        same = of_guarded[which] == of_pool
        if name == "this project's":
            limit = threshold
            if sheet_file:
                draw(sheet_file, images, half_way, similarity, which, threshold)
        else:  # as many false alarms, of pairs that cannot be real copies, as are allowed: 1 in 1,000
            others = np.sort(np.where(same, -1, similarity))
            limit = others[-max(1, len(others) // 1000) - 1] + 1e-6
        alarms.append(f"{((similarity >= limit) & ~same).sum()} and {((similarity >= limit) & same).sum()}")
        alone.append(f"{limit:.3f}")
        for kind, thumbs in planted.items():
            found, place = method(thumbs, guarded)
            recalls[kind].append(f"{((found >= limit) & (place == np.arange(plant))).mean():.3f}")
    print(head)
    for kind, cells in recalls.items():
        print(f"| {kind} | " + " | ".join(cells) + " |")
    print("| threshold | " + " | ".join(alone) + " |")
    print("| false alarms: pairs of two classes, and of one | " + " | ".join(alarms) + " |")


def leave_one_out(images: list[Image.Image], threshold: float) -> None:
    """Few images: all are guarded, and each is looked for among the others."""
    guarded = thumbnails(images)
    print(f"{len(images):,} images\n\n| copies | recall |\n|---|---|")
    for kind, make in KINDS.items():
        found, which = ours(thumbnails(map(make, images)), guarded)
        print(f"| {kind} | {((found >= threshold) & (which == np.arange(len(images)))).mean():.3f} |")
    parts = np.arange(len(images)) % 10
    highest = [ours(guarded[parts == part], guarded[parts != part])[0] for part in range(10)]
    alarms = sum((similarity >= threshold).sum() for similarity in highest)
    print(f"| false alarms | {alarms}; the most alike have {max(each.max() for each in highest):.3f} |")


def draw(
    file: Path, images: list[Image.Image], half_way: int, similarity: np.ndarray, which: np.ndarray, threshold: float
):
    """Draw the pool images that were not planted and are taken for copies."""
    order = np.argsort(-similarity)[: max(12, (similarity >= threshold).sum() + 12)]
    tiles = [sheet.Tile((half_way + at, int(which[at])), (f"{similarity[at]:.4f}",)) for at in order.tolist()]
    section = sheet.Section("Not planted", f"those from {threshold} on are taken for copies", [sheet.Line(tiles)])
    sheet.draw(images.__getitem__, "Pool images and the guarded ones they are most like", [section]).save(file)


def measure(images: list[Image.Image], sizes: list[int], guarded_count: int) -> None:
    """Time the search of pools of some sizes, memory-mapped as in mining, and extrapolate."""
    thumbs = thumbnails(images)
    guarded, rest = thumbs[:guarded_count], thumbs[guarded_count:]
    print("\n| pool | guarded | time | pairs a second | highest memory |\n|---|---|---|---|---|")
    rate = memory = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            file = Path(folder) / "pool.npy"
            pool = np.lib.format.open_memmap(file, "w+", np.uint8, (size, SIDE, SIDE))
            for start in range(0, size, len(rest)):  # the same images again and again: the time does not depend on it
                pool[start : start + len(rest)] = rest[: size - start]
            del pool
            started = time.monotonic()
            with Progress(size, "images", f"{size:,} pool images") as progress:
                copies.nearest(np.load(file, mmap_mode="r"), guarded, 0.93, done=progress.update)
            seconds = time.monotonic() - started
            rate = size * len(guarded) / seconds
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)
            print(f"| {size:,} | {len(guarded):,} | {seconds:.1f} s | {rate / 1e6:.1f} million | {memory:.1f} GB |")
    whole = 14e6 * 50e3
    more = 50e3 - len(guarded)  # guarded images beyond those of the last line
    bytes_each = 4 * (SIDE * SIDE + len(copies.ALIGNMENTS) * (copies.FREQUENCIES**2 - 1))
    print(
        f"| 14,000,000 | 50,000 | {duration(whole / rate)}, extrapolated | {rate / 1e6:.1f} million | "
        f"{memory + more * bytes_each / 2**30:.1f} GB, and 14 GB on the disk |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="a .zip of images, .../<class>/<name>")
    parser.add_argument("--images", type=int, default=10000, help="of the archive (default: 10000)")
    parser.add_argument("--plant", type=int, default=1000, help="copies of each kind (default: 1000)")
    parser.add_argument("--threshold", type=float, default=0.93, help="mine.copy_similarity (default: 0.93)")
    parser.add_argument("--leave-one-out", action="store_true", help="all images are guarded")
    parser.add_argument("--sheet", type=Path, help="draw the false alarms to this .png")
    parser.add_argument("--time", type=int, nargs="*", metavar="IMAGES", help="sizes of the pool to time instead")
    parser.add_argument("--guarded", type=int, default=1000, help="guarded images for --time (default: 1000)")
    arguments = parser.parse_args()
    images, classes = read(arguments.archive, arguments.images)
    print(f"\n{machine()}")
    if arguments.time is not None:
        measure(images, arguments.time, arguments.guarded)
    elif arguments.leave_one_out:
        leave_one_out(images, arguments.threshold)
    else:
        compare(images, classes, arguments.threshold, min(arguments.plant, len(images) // 2), arguments.sheet)


if __name__ == "__main__":
    main()
