"""Writes prepared images: tar shards of encoded bytes, and the manifest that says what lies where.

Write, the same bytes for the same images whatever order they are given in:

    known/images-NNNNN.tar, manifest.arrow, classes.json   the images with a label, known to the student or withheld
    pool/images-NNNNN.tar                                  the others
    manifest.arrow, classes.json                           all images

`pipeline.core.data.dataset.ImageSet` reads the whole, or `known` alone.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.core.data.dataset import SCHEMA, TAR_BLOCK, id_of, shard_size, write_manifest


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

    @property
    def known(self) -> bool:
        """Whether it has a label, known to the student or withheld from it."""
        return self.label >= 0 or self.withheld >= 0


class Place(NamedTuple):
    """Where an image's bytes lie."""

    shard: str  # a path in the data set's folder
    offset: int


def write(
    folder: Path,
    samples: list[Sample],
    classes: list[str],
    shard_bytes: int,
    contents: Callable[[list[Sample]], Iterable[tuple[Sample, bytes]]],
) -> str:
    """Write a data set into an empty folder; return its digest.

    The place of each image follows from all images together, so `contents` may give them in the order in which their
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
    known, pool = ([sample for sample in samples if sample.known == wanted] for wanted in (True, False))
    places = _places("known", known, shard_bytes) | _places("pool", pool, shard_bytes)
    ends: dict[str, int] = {}
    for sample in samples:
        shard, offset = places[sample.sha256]
        ends[shard] = offset + sample.length
    for shard, end in ends.items():
        (folder / shard).parent.mkdir(exist_ok=True)
        with (folder / shard).open("wb") as file:
            file.truncate(shard_size(end))  # zeros: the padding is in place
    missing = set(places)
    for sample, encoded in contents(samples):
        if len(encoded) != sample.length or hashlib.sha256(encoded).hexdigest() != sample.sha256:
            raise ValueError(f"{sample.source}: the file changed while it was read; run prepare again")
        shard, offset = places[sample.sha256]
        with (folder / shard).open("r+b") as file:
            file.seek(offset - TAR_BLOCK)
            file.write(_header(sample) + encoded)
        missing.remove(sample.sha256)
    assert not missing, "contents gave fewer images than there are samples"
    in_known = {key: Place(shard.removeprefix("known/"), offset) for key, (shard, offset) in places.items()}
    write_manifest(folder / "known", _columns(known, in_known), classes)
    return write_manifest(folder, _columns(samples, places), classes)


def _places(part: str, samples: list[Sample], shard_bytes: int) -> dict[str, Place]:
    """Place the images of a part in its shards, by the SHA-256 of each."""
    laid = layout([sample.length for sample in samples], shard_bytes)
    return {
        sample.sha256: Place(f"{part}/images-{number:05d}.tar", offset)
        for sample, (number, offset) in zip(samples, laid, strict=True)
    }


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


def _columns(samples: list[Sample], places: dict[str, Place]) -> dict[str, list]:
    columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names if hasattr(Sample, name)}
    columns["shard"] = [places[sample.sha256].shard for sample in samples]
    columns["offset"] = [places[sample.sha256].offset for sample in samples]
    return columns
