"""The prepared images: shards of encoded bytes and a manifest, read in any order by row number.

Read: a folder that `prepare` wrote: manifest.arrow (an Arrow file, which pyarrow.feather and pandas read: a row an
image, in ascending order of id; its schema's metadata hold the set's digest), classes.json (names; a label is an index
into them) and the shards that the manifest names (plain tar archives). The manifest is mapped into memory, where all
processes share it as part of the page cache. A sample's id is its content: the first 8 bytes of the SHA-256 of its
encoded bytes.

data/prepare/images is such a folder, of all images. Those that have a label, known to the student or withheld from it,
are a set of their own in its folder `known`, so that stages that read nothing else are not run again when images
without a label come or go.
"""

import hashlib
import json
import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core import atomic
from pipeline.core.data import images

SPLITS = ("labelled", "unlabelled", "val", "test")
SCHEMA = pa.schema(
    [
        ("id", pa.uint64()),
        ("sha256", pa.string()),
        ("label", pa.int32()),  # -1: none
        ("withheld", pa.int32()),  # a label that is known but kept from the student; -1: none
        ("split", pa.dictionary(pa.int8(), pa.string())),  # its values are SPLITS
        ("width", pa.int32()),  # of the upright image
        ("height", pa.int32()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),  # a path, from the manifest's folder
        ("offset", pa.int64()),  # of the encoded bytes in the shard
        ("length", pa.int64()),
        ("source", pa.string()),
    ]
)
IDENTITY = ("id", "sha256", "label", "withheld", "split", "width", "height")  # what the digest covers
MANIFEST = "manifest.arrow"
DIGEST_ROWS = 65_536  # rows that are made text of at a time
OPEN_SHARDS = 100  # each takes a file handle, and a process may have 256 of them on macOS
TAR_BLOCK, TAR_RECORD = 512, 10240
REMAKE = "make it again with `dvc repro prepare`, or fetch it with `dvc pull`"
ANEW = f"remove it, and {REMAKE}"  # DVC may not see that a file is damaged, and does not replace one that it sees


def sample_id(encoded: bytes) -> int:
    """Give the id of a sample from its encoded bytes; written as text, it is `format(id, "016x")`."""
    return id_of(hashlib.sha256(encoded).hexdigest())


def id_of(sha256: str) -> int:
    """Give the id of a sample from the SHA-256 of its encoded bytes, in hex."""
    return int(sha256[:16], 16)


def rank(seed: int, purpose: str, sample: int) -> int:
    """Give a sample its place in a random order that depends on nothing but these three.

    Choosing the n lowest does not depend on the order of the files, and changes little when images are added.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{sample:016x}".encode()).digest()[:8], "big")


def shard_size(end: int) -> int:
    """Give the size of a tar archive whose last member's bytes end at `end`: padding, two empty blocks, padding."""
    blocks = -(-end // TAR_BLOCK) + 2
    return -(-blocks * TAR_BLOCK // TAR_RECORD) * TAR_RECORD


def digest(manifest: pa.Table, classes: tuple[str, ...]) -> str:
    """Identify a data set: its images, labels, splits and class names, not where the images came from or lie."""
    whole = hashlib.sha256(json.dumps(["ssld images 1", *classes]).encode())
    for name in IDENTITY:
        column = manifest[name]
        if pa.types.is_integer(column.type):
            for chunk in column.chunks:
                whole.update(chunk.to_numpy())
            continue
        # Strings are of one length (sha256) or hashed with their separator (split).
        for start in range(0, len(column), DIGEST_ROWS):
            text = "\n".join(column[start : start + DIGEST_ROWS].to_pylist())
            whole.update(("\n" * (start > 0) + text).encode())
    return whole.hexdigest()


class ImageSet:
    """Images with their labels and splits; arrays by row, bytes and pixels on demand.

    Attributes:
        folder: where it lies.
        classes: class names; a label is an index into them.
        ids: (N,) uint64, ascending. Like the arrays below, it is the manifest's file in memory, and cannot be written.
        labels: (N,) int32; -1 where the student may not know it.
        withheld: (N,) int32; the known label of an image of the pool, -1 where there is none.

    Raises:
        ValueError: the folder, or a part of it, is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.classes, self._manifest = _read(self.folder)
        column = {
            field.name: self._manifest[field.name].to_numpy(zero_copy_only=True)
            for field in SCHEMA
            if pa.types.is_integer(field.type)
        }
        self.ids, self.labels, self.withheld = column["id"], column["label"], column["withheld"]
        self._split = self._manifest["split"].indices.to_numpy()  # (N,) int8, an index into SPLITS
        self._sizes = column["width"], column["height"]
        shard = self._manifest["shard"]
        self._shards: list[str] = shard.dictionary.to_pylist()
        self._place = shard.indices.to_numpy(), column["offset"], column["length"]  # (N,) each; int32 of _shards
        self._check_labels()
        self._check_shards()
        self._maps: dict[int, mmap.mmap] = {}
        self._compared = bytearray(len(self.ids))  # 1: this process has seen that the bytes are what the id says

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)  # another process maps the files itself

    @cached_property
    def digest(self) -> str:
        """SHA-256 over images, labels, splits and class names.

        Raises:
            ValueError: it is another than the one that `prepare` noted in the manifest.
        """
        found = digest(pa.Table.from_batches([self._manifest]), self.classes)
        if found.encode() != self._manifest.schema.metadata[b"digest"]:
            raise ValueError(f"{self.folder}: {MANIFEST} or classes.json is damaged; {ANEW}")
        return found

    @property
    def known_labels(self) -> np.ndarray:
        """The label of each image (N,) int32, those withheld from the student too; -1 where there is none."""
        return np.where(self.labels >= 0, self.labels, self.withheld)

    @property
    def splits(self) -> np.ndarray:
        """The split of each image, (N,) str, one of SPLITS: made anew, 40 bytes an image; `rows` needs none of it."""
        return np.array(SPLITS)[self._split]

    def rows(self, *splits: str) -> np.ndarray:
        """Give the row numbers (M,) int64 of some splits, ascending.

        Raises:
            ValueError: a split that there is not.
        """
        if unknown := set(splits) - set(SPLITS):
            raise ValueError(f"{', '.join(sorted(unknown))}: unknown split; there are {', '.join(SPLITS)}")
        return np.flatnonzero(np.array([split in splits for split in SPLITS])[self._split])

    def row_of(self, ids: np.ndarray) -> np.ndarray:
        """Give the row numbers (M,) int64 of ids.

        Raises:
            ValueError: an id that is not in the set.
        """
        ids = np.asarray(ids, np.uint64)
        rows = np.searchsorted(self.ids, ids)
        known = rows < len(self)
        known[known] = self.ids[rows[known]] == ids[known]
        if not known.all():
            raise ValueError(
                f"{self.folder}: no image has the id {ids[~known][0]:016x} ({(~known).sum()} of {ids.size} ids are "
                "unknown); what names them was made from other images: run `dvc repro`"
            )
        return rows

    def source(self, row: int) -> str:
        """Name the file that an image came from."""
        return self._manifest["source"][int(row)].as_py()

    def encoded(self, row: int) -> bytes:
        """Give an image's bytes as they are stored; the first time, they are compared with its id.

        Raises:
            ValueError: the shard holds other bytes than `prepare` wrote.
        """
        shard, offset, length = (int(column[row]) for column in self._place)
        content = self._map(shard)[offset : offset + length]
        if not self._compared[row] and sample_id(content) != self.ids[row]:
            raise ValueError(
                f"{self.folder / self._shards[shard]}: the image at byte {offset} ({self.source(row)}) is damaged; "
                "remove the file, and bring it back with `dvc checkout prepare`"
            )
        self._compared[row] = 1
        return content

    def encoded_image(self, row: int) -> images.Encoded:
        """Give an image's bytes with its size. Raises ValueError as `encoded` does."""
        width, height = self._sizes
        return images.Encoded(self.encoded(row), int(width[row]), int(height[row]))

    def image(self, row: int) -> Image.Image:
        """Decode an image to upright RGB."""
        return images.decode(self.encoded(row))

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            if len(self._maps) >= OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            with (self.folder / self._shards[shard]).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _check_labels(self) -> None:
        for labels in (self.labels, self.withheld):
            if len(labels) and not -1 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(f"{self.folder}: a label is of none of its {len(self.classes)} classes; {ANEW}")

    def _check_shards(self) -> None:
        """Compare each shard's size with what the manifest says, so that a torn copy is found at once."""
        shards, offsets, lengths = self._place
        if not 0 <= shards.min() <= shards.max() < len(self._shards):
            raise ValueError(f"{self.folder / MANIFEST}: an image is in none of its {len(self._shards)} shards; {ANEW}")
        last = np.zeros(len(self._shards), np.int64)  # the row that stands last in each shard
        last[shards] = np.arange(len(self))
        for name, row in zip(self._shards, last.tolist(), strict=True):
            path, wanted = self.folder / name, shard_size(int(offsets[row] + lengths[row]))
            if not path.is_file():
                raise ValueError(f"{path}: missing; {REMAKE}")
            if path.stat().st_size != wanted:
                raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {wanted}; {ANEW}")


def open_known(data: Path) -> tuple[ImageSet, dict[str, Any]]:
    """Open the images with a label, and what `prepare` says of all images in its summary.json.

    Args:
        data: where stages write.

    Raises:
        ValueError: one of the two is missing or damaged, or they do not belong together.
    """
    images, summary = ImageSet(data / "prepare/images/known"), data / "prepare/summary.json"
    prepared = atomic.read_json(summary)
    if prepared.get("known_digest") != images.digest:
        raise ValueError(f"{summary}: tells of other images than {images.folder} holds; {ANEW}")
    return images, prepared


def write_manifest(folder: Path, columns: dict[str, list], classes: list[str]) -> str:
    """Write the manifest of a data set, rows in ascending order of id, and its class names; give its digest.

    Args:
        folder: where to write.
        columns: those of SCHEMA; a split as one of SPLITS.
        classes: class names in label order.

    Raises:
        ValueError: there are too many images.
    """
    split = _named(columns["split"], SPLITS, pa.int8())
    shard = _named(columns["shard"], sorted({*columns["shard"]}), pa.int32())
    manifest = pa.table({**columns, "split": split, "shard": shard}, schema=SCHEMA)
    if parted := [field.name for field in SCHEMA if manifest[field.name].num_chunks > 1]:
        raise ValueError(
            f"{folder / MANIFEST}: more than 2 GiB of names or hashes ({', '.join(parted)}); "
            "a data set holds at most 33 million images: prepare fewer"
        )
    identity = digest(manifest, tuple(classes))
    manifest = manifest.replace_schema_metadata({"digest": identity})
    with pa.OSFile(str(folder / MANIFEST), "wb") as file, pa.ipc.new_file(file, manifest.schema) as writer:
        writer.write_table(manifest)
    atomic.write_json(folder / "classes.json", classes)
    return identity


def _named(values: Sequence[str], names: Sequence[str], kind: pa.DataType) -> pa.DictionaryArray:
    """Make an Arrow array of values that are all among some names; it holds their numbers, of type `kind`."""
    number_of = {name: number for number, name in enumerate(names)}
    codes = pa.array([number_of[value] for value in values], kind)
    return pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))


def _read(folder: Path) -> tuple[tuple[str, ...], pa.RecordBatch]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {REMAKE}")
    for name in ("classes.json", MANIFEST):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; {REMAKE}")
    try:
        classes = tuple(json.loads((folder / "classes.json").read_text(encoding="utf-8")))
        file = pa.ipc.open_file(pa.memory_map(str(folder / MANIFEST)))
        batches = file.num_record_batches
        has_digest = b"digest" in (file.schema.metadata or {})
        manifest = file.get_batch(0) if batches == 1 and has_digest and file.schema == SCHEMA else None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{folder}: damaged ({' '.join(str(error).split())}); {ANEW}") from None
    if batches != 1:
        raise ValueError(f"{folder / MANIFEST}: {batches} record batches instead of one; {ANEW}")
    if manifest is None or manifest["split"].dictionary.to_pylist() != list(SPLITS):
        wrong = sorted(set(SCHEMA.names) ^ set(file.schema.names)) or "their types"
        raise ValueError(f"{folder / MANIFEST}: its columns are not this version's ({wrong}); {REMAKE}")
    return classes, manifest
