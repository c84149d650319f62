"""From encoded photographs to batches for training, images/s a core: this project, timm and torchvision.

All three get the same files from memory, crop, resize, flip and, in a second table, apply two RandAugment operations,
and leave a uint8 batch (B, 3, R, R), which each of them normalises on the device. A line more is this project's with
images that were encoded anew at preparation (prepare.max_side and jpeg_quality): what that saves in decoding, not what
it costs in accuracy. They take turns in one process of one thread; seconds are those of the processor, so that what
else the machine does matters less.
Reads an archive or a folder of images. Prints Markdown tables. Run: python benchmarks/input.py PHOTOS.zip
"""

import argparse
import hashlib
import io
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import machine
from timm.data import create_transform
from timm.data.loader import fast_collate
from torchvision.transforms import InterpolationMode, v2

from pipeline.core.data import images
from pipeline.core.data.batches import Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.intake import image_shards, reencoding

SCALE, RATIO, MAGNITUDE = (0.08, 1.0), (3 / 4, 4 / 3), 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a .zip file or a folder of JPEG files")
    parser.add_argument("--images", type=int, default=250, help="use so many of them")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=224, help="pixels a side")
    parser.add_argument("--max-side", type=int, default=400, help="of the images that are encoded anew, pixels")
    parser.add_argument("--jpeg-quality", type=int, default=90, help="of the same")
    parser.add_argument("--rounds", type=int, default=5, help="times that each reads all images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contents = read(arguments.photos, arguments.images)
    smaller = [reencoding.encode(each, arguments.max_side, arguments.jpeg_quality)[0] for each in contents]
    print(f"{len(contents)} photographs to {arguments.resolution} pixels; {machine()}; one core")
    share = sum(map(len, smaller)) / sum(map(len, contents))
    print(f"anew: at most {arguments.max_side} pixels, quality {arguments.jpeg_quality}, {share:.0%} of the bytes\n")
    for operations in (0, 2):
        with tempfile.TemporaryDirectory() as folder:
            ways = {
                "this project": ours(contents, Path(folder) / "as they were", arguments.resolution, operations),
                "this project, encoded anew": ours(smaller, Path(folder) / "anew", arguments.resolution, operations),
                "timm": timms(contents, arguments.resolution, operations),
                "torchvision": torchvisions(contents, arguments.resolution, operations),
            }
            rates = measure(ways, len(contents), arguments.batch_size, arguments.rounds)
        print(f"| RandAugment operations: {operations} | images/s, median | least | most | times timm's |")
        print("|---|---|---|---|---|")
        for name, values in rates.items():
            ratio = np.median(np.array(values) / np.array(rates["timm"]))  # of each round
            print(f"| {name} | {np.median(values):.0f} | {min(values):.0f} | {max(values):.0f} | {ratio:.2f} |")
        print()


def read(photos: Path, count: int) -> list[bytes]:
    """Read the first `count` JPEG files, in the order of their names, one of each content."""
    if photos.is_dir():
        found = (file.read_bytes() for file in sorted(photos.rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg"))
    else:
        archive = zipfile.ZipFile(photos)
        found = (archive.read(n) for n in sorted(archive.namelist()) if n.lower().endswith((".jpg", ".jpeg")))
    contents: dict[bytes, None] = {}
    for content in found:
        contents[content] = None
        if len(contents) == count:
            break
    return list(contents)


def ours(contents: list[bytes], folder: Path, resolution: int, operations: int) -> Callable[[int, slice], object]:
    """Batches as a training stage reads them: from shards, each image's bytes compared with its id."""
    folder.mkdir()
    by_digest = {hashlib.sha256(content).hexdigest(): content for content in contents}
    samples = [
        image_shards.Sample(digest, len(content), *images.decode(content).size, "unlabelled", -1, -1, f"{number}.jpg")
        for number, (digest, content) in enumerate(by_digest.items())
    ]
    give = lambda wanted: ((sample, by_digest[sample.sha256]) for sample in wanted)  # noqa: E731
    image_shards.write(folder, samples, ["none"], 10**9, give)
    spec = ViewSpec(0, resolution, SCALE, RATIO, 0.5, operations, MAGNITUDE, 0.0, 0.0, 0.0)
    views = Views(ImageSet(folder), spec)
    rows = np.arange(len(contents))
    return lambda number, part: views[rows[part], np.full(len(rows[part]), number)]


def timms(contents: list[bytes], resolution: int, operations: int) -> Callable[[int, slice], object]:
    """timm's transform and collate function, as its create_loader has them with its prefetcher on."""
    transform = create_transform(
        resolution,
        is_training=True,
        use_prefetcher=True,
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=None,
        auto_augment=f"rand-m{MAGNITUDE}-n{operations}-p1.0" if operations else None,  # p: each is applied, as here
        interpolation="random",
    )
    load = lambda content: transform(Image.open(io.BytesIO(content)).convert("RGB"))  # noqa: E731  as ImageDataset
    return lambda number, part: fast_collate([(load(content), 0) for content in contents[part]])


def torchvisions(contents: list[bytes], resolution: int, operations: int) -> Callable[[int, slice], object]:
    """torchvision's training preset of its references, up to the uint8 tensor."""
    augment = [v2.RandAugment(operations, MAGNITUDE, interpolation=InterpolationMode.BILINEAR)] if operations else []
    crop = v2.RandomResizedCrop(resolution, SCALE, RATIO, InterpolationMode.BILINEAR, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(0.5), *augment, v2.PILToTensor()])
    load = lambda content: transform(Image.open(io.BytesIO(content)).convert("RGB"))  # noqa: E731
    return lambda number, part: torch.stack([load(content) for content in contents[part]])


def measure(
    ways: dict[str, Callable[[int, slice], object]], count: int, batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Let each way read all images in turn, `rounds` times; give the images/s of each round."""
    parts = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, make in ways.items():
            started = time.process_time()
            for part in parts:
                make(number, part)
            if number:  # the first round warms up
                rates[name].append(count / (time.process_time() - started))
    return rates


if __name__ == "__main__":
    main()
