"""Writes prepared images: tar shards of encoded bytes, and the manifest that says what lies where.

Write: images-NNNNN.tar, manifest.arrow and classes.json, the same bytes for the same images whatever order they are
given in. `pipeline.core.data.dataset.ImageSet` reads them.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from pipeline.core import atomic
from pipeline.core.data.dataset import SCHEMA, TAR_BLOCK, id_of, shard_name, shard_size, write_manifest


@dataclass(frozen=True, slots=True)
class Sample:
    """An image that goes into the data set."""

    sha256: str
    length: int  # of the encoded bytes
    width: int  # of the upright image
    height: int
    split: str  # one of dataset.SPLITS
    label: int  # -1: none that the student may know
    withheld: int  # the label that is kept from it; -1: none
    source: str  # the name of the file that it came from
    encoded_anew: bool = False  # as JPEG, whatever `source` is

    @property
    def id(self) -> int:
        """The first 8 bytes of its SHA-256."""
        return id_of(self.sha256)


def write(
    folder: Path,
    samples: list[Sample],
    classes: list[str],
    shard_bytes: int,
    contents: Callable[[list[Sample]], Iterable[tuple[Sample, bytes]]],
) -> pa.Table:
    """Write a data set into an empty folder; return the manifest.

    The place of each image follows from the manifest alone, so `contents` may give them in the order in which their
    source is fastest to read.

    Args:
        folder: where to write.
        samples: the images, in any order.
        classes: class names in label order.
        shard_bytes: a new shard is begun rather than exceed it.
        contents: gives each sample once, with its encoded bytes.

    Raises:
        ValueError: an image's bytes are no longer those that were examined.
    """
    samples = sorted(samples, key=lambda sample: sample.id)
    places = layout([sample.length for sample in samples], shard_bytes)
    ends: dict[int, int] = {}
    for sample, (shard, offset) in zip(samples, places, strict=True):
        ends[shard] = offset + sample.length
    for shard, end in ends.items():
        with (folder / shard_name(shard)).open("wb") as file:
            file.truncate(shard_size(end))  # zeros: the padding is in place
    where = {sample.sha256: place for sample, place in zip(samples, places, strict=True)}
    for sample, encoded in contents(samples):
        if len(encoded) != sample.length or hashlib.sha256(encoded).hexdigest() != sample.sha256:
            raise ValueError(f"{sample.source}: the file changed while it was read; run prepare again")
        shard, offset = where.pop(sample.sha256)
        with (folder / shard_name(shard)).open("r+b") as file:
            file.seek(offset - TAR_BLOCK)
            file.write(_header(sample) + encoded)
    assert not where, "contents gave fewer images than there are samples"
    manifest = write_manifest(folder, _columns(samples, places))
    atomic.write_json(folder / "classes.json", classes)
    return manifest


def layout(lengths: list[int], shard_bytes: int) -> list[tuple[int, int]]:
    """Place images one after another in tar archives: (shard, offset of the image's bytes) of each."""
    places, shard, end = [], 0, 0
    for length in lengths:
        start = -(-end // TAR_BLOCK) * TAR_BLOCK
        if end and start + TAR_BLOCK + length > shard_bytes:
            shard, start = shard + 1, 0
        places.append((shard, start + TAR_BLOCK))
        end = start + TAR_BLOCK + length
    return places


def _header(sample: Sample) -> bytes:
    """A tar header that holds nothing but the name and the length."""
    suffix = PurePosixPath(sample.source).suffix
    if not re.fullmatch(r"\.[A-Za-z0-9]{1,8}", suffix):
        suffix = ""
    if sample.encoded_anew and suffix.lower() not in (".jpg", ".jpeg", ".mpo"):
        suffix = ".jpg"
    info = tarfile.TarInfo(f"{sample.id:016x}{suffix}")
    info.size, info.mode = sample.length, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _columns(samples: list[Sample], places: list[tuple[int, int]]) -> dict[str, list]:
    columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names if hasattr(Sample, name)}
    columns["shard"] = [shard for shard, _ in places]
    columns["offset"] = [offset for _, offset in places]
    return columns
