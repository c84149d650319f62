"""Shards: immutable files of soft labels, each whole or not there, with a checksum over everything in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import atomic

MAGIC = b"SSLDLAB1"  # the digit is the format's version
KEY = np.dtype([("id", "<u8"), ("partner", "<u8"), ("replica", "<u4"), ("unused", "<u4")])
ALIGNMENT = 64
CHECKSUM_BYTES = 16


def name_of(keys: np.ndarray) -> str:
    """Give the file name of the shard that holds exactly these keys in this order."""
    return f"labels-{hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()}.sl"


def write(folder: Path, fingerprint: str, keys: np.ndarray, records: np.ndarray) -> Path:
    """Write a shard; it appears whole, under the name that its keys give it.

    Raises:
        OSError: the disk is full or the folder cannot be written; shards written before stay.
    """
    assert len(keys) == len(records)
    assert keys.dtype == KEY
    header = json.dumps({"fingerprint": fingerprint, "count": len(keys), "record_bytes": records.dtype.itemsize})
    start = MAGIC + len(header).to_bytes(4, "little") + header.encode()
    start += bytes(-len(start) % ALIGNMENT)
    content = start + keys.tobytes() + records.tobytes()
    path = folder / name_of(keys)
    atomic.write_bytes(path, content + hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest())
    return path


class Shard:
    """A shard opened for reading; its records are checked when they are first touched.

    Raises:
        ValueError: the file is not a shard, is truncated, or is of another cache; it names the file.
    """

    def __init__(self, path: Path, fingerprint: str, record_type: np.dtype):
        self.path, self.record_type = path, record_type
        self._records: np.ndarray | None = None
        self._verified = False
        header = read_header(path)
        if header["fingerprint"] != fingerprint:
            raise ValueError(f"{path}: soft labels of another teacher or of other views; {_mend(path)}")
        self.count, keys_at = header["count"], header["bytes"]
        with path.open("rb") as file:
            file.seek(keys_at)
            keys = file.read(self.count * KEY.itemsize)
        self.records_at = keys_at + self.count * KEY.itemsize
        size = self.records_at + self.count * record_type.itemsize + CHECKSUM_BYTES
        if header["record_bytes"] != record_type.itemsize or path.stat().st_size != size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {size}; {_mend(path)}")
        self.keys = np.frombuffer(keys, KEY)
        if path.name != name_of(self.keys):
            raise ValueError(f"{path}: its keys are damaged; {_mend(path)}")

    @property
    def records(self) -> np.ndarray:
        """The records (count,), memory-mapped. Raises ValueError where the checksum does not hold."""
        if self._records is None:
            content = np.memmap(self.path, np.uint8, "r")
            if not self._verified:
                found = hashlib.blake2b(content[:-CHECKSUM_BYTES], digest_size=CHECKSUM_BYTES).digest()
                if found != content[-CHECKSUM_BYTES:].tobytes():
                    raise ValueError(f"{self.path}: its checksum does not hold; {_mend(self.path)}")
                self._verified = True
            self._records = content[self.records_at : -CHECKSUM_BYTES].view(self.record_type)
        return self._records

    def close(self) -> None:
        """Let go of the file; it is opened again when its records are asked for."""
        self._records = None


def read_header(path: Path) -> dict[str, Any]:
    """Read a shard's header: `fingerprint`, `count`, `record_bytes`, and the `bytes` up to the keys.

    Raises:
        ValueError: the file is not a shard in a version known here, or its header is damaged.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + 4)
        text = file.read(int.from_bytes(start[len(MAGIC) :], "little"))
    if start[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path}: not a shard of soft labels in a version known here; {_mend(path)}")
    try:
        header = {name: json.loads(text)[name] for name in ("fingerprint", "count", "record_bytes")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: its header is damaged; {_mend(path)}") from None
    length = len(start) + len(text)
    return {**header, "bytes": length + (-length % ALIGNMENT)}


def _mend(path: Path) -> str:
    return f"remove this file and run `dvc repro --force --single-item {path.parent.name}`: it alone is computed again"
