"""What the tests of prepare share: data sets written as files, and prepare run on them."""

import csv
import hashlib
import io
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
from made_images import encode, picture, png, rotated_jpeg, several
from PIL import Image
from pyarrow import feather

from pipeline import prepare as stage_prepare
from pipeline.core.data.dataset import ImageSet
from pipeline.core.intake.inputs import Inputs
from pipeline.core.sections import Prepare

SETTINGS = {  # section `prepare` of params.yaml, whatever the user's says
    "labelled_root": ".",
    "train": "train",
    "val": None,
    "test": None,
    "val_share": 0.1,
    "test_share": 0.1,
    "unlabelled_root": ".",
    "unlabelled": None,
    "images_per_class": None,
    "labels_per_class": None,
    "max_pixels": 1_000_000,
    "max_refused_share": 0.2,
    "jpeg_quality": None,
    "max_side": None,
    "shard_mb": 256,
}
SPLITS = {"val": "val", "test": "test", "unlabelled": "pool"}
NEVER = {"max_refused_share": 1.0}  # stop


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder; give the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepared(
    folder: Path, root: Path | str, seed: int = 0, **changes: object
) -> tuple[ImageSet, list[tuple[str, ...]]]:
    """Prepare into a new folder; give the images, and (file, source, reason) of what was refused."""
    given = SETTINGS | {"labelled_root": str(root), "unlabelled_root": str(root)} | changes
    # shard_mb may be less than 1 here, so that a few images fill several shards.
    settings = Prepare(**given | {"shard_mb": 1}).model_copy(update={"shard_mb": given["shard_mb"]})
    folder.mkdir(parents=True)
    scratch = folder.with_name(f"{folder.name} scratch")
    scratch.mkdir(exist_ok=True)
    stage_prepare.prepare(Inputs.of(settings).sources, folder, scratch, settings, seed, [])
    with (folder / "refused.csv").open() as file:
        rows = [(row["file"], row["source"], row["reason"]) for row in csv.DictReader(file)]
    return ImageSet(folder / "images"), rows


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    """Pack files into a zip archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_tar(path: Path, files: dict[str, bytes], before: str = "") -> Path:
    """Pack files into a tar archive, compressed where its name says so; `before` stands before every name."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(before + name)
            info.size, info.mtime = len(content), random.randrange(10**9)
            archive.addfile(info, io.BytesIO(content))
    return path


def good(count: int = 12, classes: str = "ab", start: int = 0) -> dict[str, bytes]:
    """`count` images a class in train."""
    return {f"train/{name}/{at:02d}.png": png(start + 1000 * ord(name) + at) for name in classes for at in range(count)}


def with_splits(count: int = 12) -> dict[str, bytes]:
    """The same with val, test and a pool of their own."""
    extra = {
        f"{part}/{name}/{at}.png": png(hash_of(part, name, at))
        for part in ("val", "test")
        for name in "ab"
        for at in range(3)
    }
    pool = {f"pool/deep/er/{at}.png": png(90_000 + at) for at in range(8)}
    return good(count) | extra | pool


def hash_of(*words: object) -> int:
    """A number that stands for some words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:4], "big")


ODD = {  # name: content that is unusual and still used
    "train/a/animated.gif": several("GIF", 20),
    "train/a/animated.webp": several("WEBP", 30),
    "train/a/animated.png": several("PNG", 40),
    "train/a/pages.tiff": several("TIFF", 50),
    "train/a/two eyes.jpg": several("MPO", 60),
    "train/a/cmyk.jpg": encode(picture(70).convert("CMYK"), "JPEG"),
    "train/a/deep.png": encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
    "train/a/palette.png": encode(picture(71).convert("P"), "PNG", transparency=3),
    "train/a/grey alpha.png": encode(picture(72).convert("LA"), "PNG"),
    "train/a/bits.png": encode(picture(73).convert("1"), "PNG"),
    "train/a/turned.jpg": rotated_jpeg(74),
    "train/a/truly a png.jpg": png(75),
    "train/a/no suffix": png(76),
    "train/a/ spaces, commas\nand lines.png": png(77),
    "train/a/ünïcode 图.png": png(78),
    "train/a/deeper/still.png": png(79),
    "pool/labels do not matter here.png": png(10),  # refused in train, where it stands under two labels
}


def in_several_shards(place: Path) -> Path:
    """Prepare a data set in several small shards below a folder; give the folder of its images."""
    prepared(place / "out", write(place / "in", with_splits()), **SPLITS, labels_per_class=5, shard_mb=0.02)
    return place / "out/images"


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path from there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read_manifest(folder: Path) -> pyarrow.Table:
    """The manifest of a data set, as anyone would read it."""
    return feather.read_table(folder / "manifest.arrow", memory_map=False)


def content_of(images: ImageSet) -> list[tuple]:
    """Id, label, withheld label and split of each image."""
    columns = (images.ids, images.labels, images.withheld, images.splits)
    return list(zip(*(column.tolist() for column in columns), strict=True))
