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


def write(
    folder: Path,
    samples: list[Sample],
    classes: list[str],
    shard_bytes: int,
    contents: Callable[[list[Sample]], Iterable[tuple[Sample, bytes]]],
) -> tuple[str, str]:
    """Write a data set into an empty folder; return its digest, and that of the images with a label.

    The place of each image follows from the ids, lengths and labels of all, so `contents` may give them in the order in
    which their source is fastest to read.

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
    known = [sample for sample in samples if sample.known]
    pool = [sample for sample in samples if not sample.known]
    places = _places("known", known, shard_bytes) | _places("pool", pool, shard_bytes)
    ends: dict[str, int] = {}
    for sample in samples:
        shard, offset = places[sample.sha256]
        ends[shard] = offset + sample.length
    (folder / "known").mkdir()  # of no image, too
    for shard, end in ends.items():
        (folder / shard).parent.mkdir(exist_ok=True)
        with (folder / shard).open("wb") as file:
            file.truncate(shard_size(end))  # zeros: the padding is in place
    written = 0
    for sample, encoded in contents(samples):
        if len(encoded) != sample.length or hashlib.sha256(encoded).hexdigest() != sample.sha256:
            raise ValueError(f"{sample.source}: the file changed while it was read; run prepare again")
        shard, offset = places[sample.sha256]
        with (folder / shard).open("r+b") as file:
            file.seek(offset - TAR_BLOCK)
            file.write(_header(sample) + encoded)
        written += 1
    assert written == len(samples), "contents gave fewer images than there are samples"
    of_known = write_manifest(folder / "known", _columns(known, places, "known/"), classes)
    return write_manifest(folder, _columns(samples, places, ""), classes), of_known


def _places(part: str, samples: list[Sample], shard_bytes: int) -> dict[str, tuple[str, int]]:
    """Place the images of a part in its shards: (shard, offset of the image's bytes) by the SHA-256 of each."""
    laid = layout([sample.length for sample in samples], shard_bytes)
    names = [f"{part}/images-{number:05d}.tar" for number in range(laid[-1][0] + 1)] if laid else []
    return {sample.sha256: (names[number], offset) for sample, (number, offset) in zip(samples, laid, strict=True)}


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


def _columns(samples: list[Sample], places: dict[str, tuple[str, int]], inside: str) -> dict[str, list]:
    """The manifest's columns for a manifest that lies `inside` the data set's folder."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names if hasattr(Sample, name)}
    shards = [places[sample.sha256][0] for sample in samples]
    from_there = {shard: shard.removeprefix(inside) for shard in set(shards)}
    columns["shard"] = [from_there[shard] for shard in shards]
    columns["offset"] = [places[sample.sha256][1] for sample in samples]
    return columns
