"""The prepared images: shards of encoded bytes and a manifest, read in any order by row number.

Read: a folder that `prepare` wrote: images-NNNNN.tar (plain tar archives), manifest.parquet (a row an image, in
ascending order of id), classes.json (names; a label is an index into them) and summary.json.
A sample's id is its content: the first 8 bytes of the SHA-256 of its encoded bytes.
"""

import hashlib
import json
import mmap
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core import images

SPLITS = ("labelled", "unlabelled", "val", "test")
SCHEMA = pa.schema(
    [
        ("id", pa.uint64()),
        ("sha256", pa.string()),
        ("label", pa.int32()),  # -1: none
        ("withheld", pa.int32()),  # a label that is known but kept from the student; -1: none
        ("split", pa.string()),
        ("width", pa.int32()),  # of the upright image
        ("height", pa.int32()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # of the encoded bytes in the shard
        ("length", pa.int64()),
        ("source", pa.string()),
    ]
)
IDENTITY = ("id", "sha256", "label", "withheld", "split", "width", "height")  # what the digest covers
OPEN_SHARDS = 100  # each takes a file handle, and a process may have 256 of them on macOS
TAR_BLOCK, TAR_RECORD = 512, 10240
REMAKE = "make it again with `dvc repro prepare`, or fetch it with `dvc pull`"


def sample_id(encoded: bytes) -> int:
    """Give the id of a sample from its encoded bytes; written as text, it is `format(id, "016x")`."""
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")


def rank(seed: int, purpose: str, sample: int) -> int:
    """Give a sample its place in a random order that depends on nothing but these three.

    Choosing the n lowest does not depend on the order of the files, and changes little when images are added.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{sample:016x}".encode()).digest()[:8], "big")


def shard_name(number: int) -> str:
    """Name a shard's file."""
    return f"images-{number:05d}.tar"


def shard_size(end: int) -> int:
    """Give the size of a tar archive whose last member's bytes end at `end`: padding, two empty blocks, padding."""
    blocks = -(-end // TAR_BLOCK) + 2
    return -(-blocks * TAR_BLOCK // TAR_RECORD) * TAR_RECORD


def digest(manifest: pa.Table, classes: tuple[str, ...]) -> str:
    """Identify a data set: its images, labels, splits and class names, not where the images came from or lie."""
    whole = hashlib.sha256(json.dumps(["ssld images 1", *classes]).encode())
    for name in IDENTITY:
        column = manifest[name]
        # Strings are of one length (sha256) or hashed with their separator (split).
        text = pa.types.is_string(column.type)
        whole.update("\n".join(column.to_pylist()).encode() if text else column.to_numpy().tobytes())
    return whole.hexdigest()


class ImageSet:
    """Images with their labels and splits; arrays by row, bytes and pixels on demand.

    Attributes:
        folder: where it lies.
        classes: class names; a label is an index into them.
        ids: (N,) uint64, ascending.
        labels: (N,) int32; -1 where the student may not know it.
        withheld: (N,) int32; the known label of an image of the pool, -1 where there is none.
        splits: (N,) str; one of SPLITS.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.classes, self._manifest = _read(self.folder)
        column = {name: self._manifest[name].to_numpy() for name in SCHEMA.names if name not in ("sha256", "source")}
        self.ids, self.labels, self.withheld = column["id"], column["label"], column["withheld"]
        self.splits = column["split"].astype(str) if len(self.ids) else np.zeros(0, "U10")
        self._sizes = np.stack([column["width"], column["height"]], axis=1)  # (N, 2)
        self._place = np.stack([column["shard"], column["offset"], column["length"]], axis=1)  # (N, 3)
        self._check_shards()
        self._maps: dict[int, mmap.mmap] = {}
        self._compared = bytearray(len(self.ids))  # 1: this process has seen that the bytes are what the id says

    @classmethod
    def open(cls, folder: Path) -> "ImageSet":
        """Open a folder that `prepare` wrote.

        Raises:
            ValueError: the folder, or a part of it, is missing or damaged.
        """
        return cls(folder)

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # another process maps the shards itself

    @cached_property
    def digest(self) -> str:
        """SHA-256 over images, labels, splits and class names."""
        return digest(self._manifest, self.classes)

    def rows(self, *splits: str) -> np.ndarray:
        """Give the row numbers (M,) int64 of some splits, ascending.

        Raises:
            ValueError: a split that there is not.
        """
        if unknown := set(splits) - set(SPLITS):
            raise ValueError(f"{', '.join(sorted(unknown))}: unknown split; there are {', '.join(SPLITS)}")
        return np.flatnonzero(np.isin(self.splits, splits))

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
        """Give an image's bytes as they were in its file; the first time, they are compared with its id.

        Raises:
            ValueError: the shard holds other bytes than `prepare` wrote.
        """
        shard, offset, length = (int(x) for x in self._place[row])
        content = self._map(shard)[offset : offset + length]
        if not self._compared[row] and sample_id(content) != self.ids[row]:
            raise ValueError(
                f"{self.folder / shard_name(shard)}: the image at byte {offset} ({self.source(row)}) is damaged; "
                "bring the file back with `dvc checkout --force prepare`"
            )
        self._compared[row] = 1
        return content

    def encoded_image(self, row: int) -> images.Encoded:
        """Give an image's bytes with its size. Raises ValueError as `encoded` does."""
        width, height = self._sizes[row].tolist()
        return images.Encoded(self.encoded(row), width, height)

    def image(self, row: int) -> Image.Image:
        """Decode an image to upright RGB."""
        return images.decode(self.encoded(row))

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            if len(self._maps) >= OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            with (self.folder / shard_name(shard)).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _check_shards(self) -> None:
        """Compare each shard's size with what the manifest says, so that a torn copy is found at once."""
        for shard in np.unique(self._place[:, 0]).tolist():
            of_shard = self._place[self._place[:, 0] == shard]
            path, wanted = self.folder / shard_name(shard), shard_size(int((of_shard[:, 1] + of_shard[:, 2]).max()))
            if not path.is_file():
                raise ValueError(f"{path}: missing; {REMAKE}")
            if path.stat().st_size != wanted:
                raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {wanted}; {REMAKE}")


def _read(folder: Path) -> tuple[tuple[str, ...], pa.Table]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {REMAKE}")
    for name in ("classes.json", "manifest.parquet"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; {REMAKE}")
    try:
        classes = tuple(json.loads((folder / "classes.json").read_text(encoding="utf-8")))
        manifest = pq.read_table(folder / "manifest.parquet")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{folder}: damaged ({' '.join(str(error).split())}); {REMAKE}") from None
    if manifest.schema != SCHEMA:
        wrong = sorted(set(SCHEMA.names) ^ set(manifest.schema.names)) or "their types"
        raise ValueError(f"{folder}/manifest.parquet: its columns are not this version's ({wrong}); {REMAKE}")
    return classes, manifest
