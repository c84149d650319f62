"""Plants copies of images in a pool and looks for them: recall and false alarms; or times that for pools of some sizes.

    python benchmarks/mining.py cifar10.zip                       10,000 images, half of them guarded
    python benchmarks/mining.py photographs.zip --leave-one-out   few images: each is looked for among all others
    python benchmarks/mining.py cifar10.zip --time 10000 100000 1000000

What is planted and counted is in planted.py; --sheet draws the false alarms, to judge by eye. Other methods get the
threshold at which they take 1 in 1,000 of the pool for a copy of an image of another class. Methods that need more
than thumbnails are in copies.py.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine
from planted import KINDS, Answer, Method, hash_bits, ours, read, search, show, unit

from pipeline.core.mining import contact_sheet, copies
from pipeline.core.mining.thumbnails import SIDE, thumbnails
from pipeline.core.progress import Progress, duration


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


def improve(similarity: np.ndarray, which: np.ndarray, queries: np.ndarray, targets: np.ndarray) -> None:
    """Take over, in place, what is more similar by this measure; the memory for a part of the products at a time."""
    for start in range(0, len(queries), 1024):
        products = queries[start : start + 1024] @ targets.T
        at, best = products.argmax(1), products.max(1)
        part = slice(start, start + len(best))
        better = best > similarity[part]
        similarity[part][better], which[part][better] = best[better], at[better]


OTHERS: dict[str, Callable[[np.ndarray, np.ndarray], Answer]] = {
    "correlation of thumbnails, shifted": correlation,
    "pHash, 64 bits, mirrored too": perceptual_hash,
}


def compare(
    images: list[Image.Image], classes: list[str], threshold: float, plant: int, sheet_file: Path | None
) -> None:
    """Half the images guarded, the other half the pool."""
    half_way = len(images) // 2
    guarded = thumbnails(images[:half_way])
    print(f"{len(images) - half_way:,} pool images, {half_way:,} guarded, {plant:,} of them planted in each way\n")
    own = search(images, classes, plant, lambda pool: ours(thumbnails(pool), guarded, threshold), threshold)
    others: dict[str, Method] = {
        name: lambda pool, method=method: method(thumbnails(pool), guarded) for name, method in OTHERS.items()
    }
    found = {name: search(images, classes, plant, method) for name, method in others.items()}
    show({"this project's": own, **found}, half_way)
    print("\n| the guarded image is the copy | recall of this project's |\n|---|---|")
    originals = thumbnails(images[:plant])
    for kind, make in KINDS.items():
        copied = np.concatenate([thumbnails(map(make, images[:plant])), guarded[plant:]])
        alike, which = ours(originals, copied, threshold)
        print(f"| {kind} | {((alike >= threshold) & (which == np.arange(plant))).mean():.3f} |")
    if sheet_file:
        draw(sheet_file, images, half_way, own.similarity, own.which, threshold)


def leave_one_out(images: list[Image.Image], threshold: float) -> None:
    """Few images: all are guarded; copies are looked for among all of them, each image among all others."""
    guarded = thumbnails(images)
    print(f"{len(images):,} images\n\n| copies | recall | where the guarded image is the copy |\n|---|---|---|")
    for kind, make in KINDS.items():
        copied = thumbnails(map(make, images))
        answers = ours(copied, guarded, threshold), ours(guarded, copied, threshold)
        recall = [((found >= threshold) & (which == np.arange(len(images)))).mean() for found, which in answers]
        print(f"| {kind} | {recall[0]:.3f} | {recall[1]:.3f} |")
    highest = np.array(
        [ours(guarded[[at]], np.delete(guarded, at, axis=0), threshold)[0][0] for at in range(len(images))]
    )
    print(f"| false alarms | {(highest >= threshold).sum()}; the most alike have {highest.max():.3f} |")


def draw(
    file: Path, images: list[Image.Image], half_way: int, similarity: np.ndarray, which: np.ndarray, threshold: float
) -> None:
    """Draw the pool images that were not planted and are taken for copies."""
    order = np.argsort(-similarity)[: (similarity >= threshold).sum() + 12]
    tiles = [contact_sheet.Tile((half_way + at, int(which[at])), (f"{similarity[at]:.4f}",)) for at in order.tolist()]
    section = contact_sheet.Part(
        "Not planted", f"those from {threshold} on are taken for copies", [contact_sheet.Line(tiles)]
    )
    contact_sheet.draw(images.__getitem__, "Pool images and the guarded ones they are most like", [section]).save(file)


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
    spans = {(each.guarded, each.mirrored) for each in copies.ALIGNMENTS}
    bytes_each = 4 * (SIDE * SIDE + len(spans) * (copies.FREQUENCIES**2 - 1))
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
