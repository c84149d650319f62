"""Shards: immutable files of some thousand soft labels, each whole or not there."""

import hashlib
from pathlib import Path

import numpy as np

from pipeline.core.softlabels import sealed
from pipeline.core.softlabels.keys import KEY
from pipeline.core.softlabels.records import Coding, Records

MAGIC = b"SSLDLAB2"  # the digit is the format's version
BLOCK = 32  # a reader keeps the place of every 32nd record


def name_of(keys: np.ndarray) -> str:
    """Give the file name of the shard that holds exactly these keys in this order."""
    return f"labels-{hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()}.sl"


def write(folder: Path, fingerprint: str, keys: np.ndarray, records: Records) -> Path:
    """Write a shard; it appears whole, under the name that its keys give it.

    Args:
        keys: (N,) uint64.
        records: N of them.

    Raises:
        OSError: the disk is full or the folder cannot be written; shards written before stay.
    """
    assert len(keys) == len(records.counts)
    path = folder / name_of(keys)
    header = {"fingerprint": fingerprint, "views": len(keys), "record_bytes": len(records.content)}
    sealed.write(path, MAGIC, header, [keys.astype(KEY), records.counts, records.content])
    return path


class Shard:
    """A shard, of which the header has been read.

    Attributes:
        views: how many records it holds.
        counts_at: where in the file the counts begin: each record's number of classes, a byte each.
        checksum: what the file says of its bytes, in hex.

    Raises:
        ValueError: the file is not a shard, is truncated, or is of another cache; it names the file.
    """

    def __init__(self, path: Path, fingerprint: str, coding: Coding):
        self.path, self.coding = path, coding
        header, self._keys_at = sealed.read_header(path, MAGIC)
        try:
            self.views, record_bytes = int(header["views"]), int(header["record_bytes"])
            found = header["fingerprint"]
        except (KeyError, TypeError, ValueError, OverflowError):  # the last of infinity
            raise ValueError(f"{path}: its header is damaged") from None
        if found != fingerprint:
            raise ValueError(f"{path}: soft labels of another teacher, of other views or of another coding")
        self.counts_at = self._keys_at + self.views * KEY.itemsize
        self._records_at = self.counts_at + self.views
        size = self._records_at + record_bytes + sealed.CHECKSUM_BYTES
        if path.stat().st_size != size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {size}")
        self.checksum = sealed.read_checksum(path)

    def keys(self, checked: bool = True) -> np.ndarray:
        """Read the keys (views,).

        Args:
            checked: compare them with the file's name, which takes many times as long as reading them.

        Raises:
            ValueError: the file's name is not theirs.
        """
        keys = np.fromfile(self.path, KEY, self.views, offset=self._keys_at)
        if checked and self.path.name != name_of(keys):
            raise ValueError(f"{self.path}: its keys are damaged")
        return keys

    def map(self) -> memoryview:
        """Map the file's bytes into memory; nothing is looked at, that is what `check` is for."""
        return np.memmap(self.path, np.uint8, "r").data

    def check(self) -> np.ndarray:
        """Check the file's bytes; say of every BLOCK-th record where in the file it begins, uint32.

        Raises:
            ValueError: the checksum does not hold, or the records are of another coding.
        """
        content = sealed.open_checked(self.path)
        sizes = self.coding.sizes[content[self.counts_at : self._records_at]]
        ends = self._records_at + np.cumsum(sizes)
        if len(content) != (ends[-1] if self.views else self._records_at):
            raise ValueError(f"{self.path}: its records are of another coding")
        return (ends - sizes)[::BLOCK].astype(np.uint32)

    def verify(self) -> None:
        """Check everything in the file. Raises ValueError where it does not hold; it names the file."""
        self.check()
        self.keys()
