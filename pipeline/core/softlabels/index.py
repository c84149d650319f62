"""The index of a cache: the keys of all its shards, ascending, and where each one's record is."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.core.softlabels import keys, sealed
from pipeline.core.softlabels.shards import Shard

NAME, MAGIC = "index.sl", b"SSLDIDX3"  # the digit is the format's version


class Index:
    """The index of a folder's shards, mapped into memory.

    Attributes:
        shards: file names of the shards, in the order in which positions count their views, and each one's checksum.

    Raises:
        ValueError: the file is missing, damaged, or of another fingerprint; it is named.
    """

    def __init__(self, folder: Path, fingerprint: str):
        path = folder / NAME
        header, start = sealed.read_header(path, MAGIC)
        content = sealed.open_checked(path)
        if header["fingerprint"] != fingerprint:
            raise ValueError(f"{path}: of another teacher, of other views or of another coding")
        self.shards: dict[str, str] = header["shards"]
        positions_at = start + keys.KEY.itemsize * header["views"]
        self._keys = content[start:positions_at].view(keys.KEY)
        self._positions = content[positions_at:].view(header["positions"])

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Give the position (N,) int64 of each key: views of the shards before and place in its own; -1 for none."""
        if not len(self):
            return np.full(len(wanted), -1)
        order = np.argsort(wanted)  # neighbours are looked for in the same parts of memory
        ordered = wanted[order]
        at = np.minimum(np.searchsorted(self._keys, ordered), len(self) - 1)
        found = np.empty(len(wanted), np.int64)
        found[order] = np.where(self._keys[at] == ordered, self._positions[at].astype(np.int64), -1)
        return found


def write(folder: Path, fingerprint: str, shards: list[Shard]) -> None:
    """Write the index of a folder's shards.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    count = sum(shard.views for shard in shards)
    dtype = np.dtype("<u4" if count < 2**32 else "<u8")
    named = {shard.path.name: shard.checksum for shard in shards}
    header = {"fingerprint": fingerprint, "views": count, "positions": dtype.str, "shards": named}
    with tempfile.TemporaryFile(dir=folder) as beside:
        sealed.write(folder / NAME, MAGIC, header, _keys_and_positions(shards, dtype, beside))


def _keys_and_positions(shards: list[Shard], dtype: np.dtype, beside: IO[bytes]) -> Iterator[np.ndarray]:
    """Give all keys of some shards, ascending, then the position of each, some at a time.

    Args:
        dtype: of a position.
        beside: an empty file, for the positions meanwhile.
    """
    starts = np.cumsum([0] + [shard.views for shard in shards]).tolist()
    for least, most in keys.ranges(starts[-1]):
        some_keys, some_positions = [np.zeros(0, keys.KEY)], [np.zeros(0, dtype)]
        for start, shard in zip(starts[:-1], shards, strict=True):
            of_shard = shard.keys(checked=False)
            here = np.flatnonzero((of_shard >= least) & (of_shard <= most))
            some_keys.append(of_shard[here])
            some_positions.append((start + here).astype(dtype))
        in_range, positions = np.concatenate(some_keys), np.concatenate(some_positions)
        del some_keys, some_positions
        order = np.argsort(in_range, kind="stable")
        positions[order].tofile(beside)
        yield in_range[order]
    beside.seek(0)
    while len(positions := np.fromfile(beside, dtype, keys.LOOKED_UP)):
        yield positions
