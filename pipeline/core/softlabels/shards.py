"""Shards: immutable files of some thousand soft labels, each whole or not there."""

import hashlib
from pathlib import Path

import numpy as np

from pipeline.core.softlabels import sealed
from pipeline.core.softlabels.records import Coding, Records

MAGIC = b"SSLDLAB2"  # the digit is the format's version
KEY = np.dtype("<u8")


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
    """A shard opened for reading; its content is checked when it is first touched.

    Raises:
        ValueError: the file is not a shard, is truncated, or is of another cache; it names the file.
    """

    def __init__(self, path: Path, fingerprint: str, coding: Coding):
        self.path, self.coding = path, coding
        header, self._keys_at = sealed.read_header(path, MAGIC)
        try:
            self.views, record_bytes = int(header["views"]), int(header["record_bytes"])
            found = header["fingerprint"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: its header is damaged") from None
        if found != fingerprint:
            raise ValueError(f"{path}: soft labels of another teacher, of other views or of another coding")
        self._records_at = self._keys_at + self.views * (KEY.itemsize + 1)
        size = self._records_at + record_bytes + sealed.CHECKSUM_BYTES
        if path.stat().st_size != size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {size}")
        self._content: np.ndarray | None = None
        self._starts: np.ndarray | None = None  # (views + 1,) uint32: where each record begins; kept once it is known

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

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, list[memoryview]]:
        """Give the records at positions (n,) in the shard: how many classes each has, and the bytes of each.

        Raises:
            ValueError: the checksum does not hold.
        """
        if self._content is None:
            self._open()
        counts = self._content[self._records_at - self.views :][positions]
        begin, end = self._starts[positions].tolist(), self._starts[positions + 1].tolist()
        content = self._content.data
        return counts, [content[first:last] for first, last in zip(begin, end, strict=True)]

    def _open(self) -> None:
        if self._starts is not None:  # it was checked before, and closed since
            self._content = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
            return
        content = sealed.open_checked(self.path)
        sizes = self.coding.sizes[content[self._records_at - self.views : self._records_at]]
        starts = self._records_at + np.concatenate([[0], np.cumsum(sizes)])
        if starts[-1] != len(content):
            raise ValueError(f"{self.path}: its records are of another coding")
        self._content, self._starts = content, starts.astype(np.uint32)

    def verify(self) -> None:
        """Check everything in the file. Raises ValueError where it does not hold; it names the file."""
        self._starts = None
        self._open()
        self.keys()
        self.close()

    def close(self) -> None:
        """Let go of the file; it is opened again when its records are asked for."""
        self._content = None
