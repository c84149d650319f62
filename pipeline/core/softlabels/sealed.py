"""Sealed files: a magic word, a header, arrays, and a checksum over everything before it; immutable once written."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import atomic

ALIGNMENT = 64
CHECKSUM_BYTES = 16


def write(path: Path, magic: bytes, header: dict[str, Any], arrays: Iterable[np.ndarray]) -> None:
    """Write a sealed file; it appears whole.

    Args:
        arrays: one after another; they need not be in memory all at once.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there before stays.
    """
    text = json.dumps(header).encode()
    start = magic + len(text).to_bytes(4, "little") + text
    contents = (np.ascontiguousarray(array).view(np.uint8) for array in arrays)
    checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    with atomic.replacing(path) as beside, beside.open("wb") as file:
        for part in itertools.chain([start + bytes(-len(start) % ALIGNMENT)], contents):
            checksum.update(part)
            file.write(part)
        file.write(checksum.digest())


def read_header(path: Path, magic: bytes) -> tuple[dict[str, Any], int]:
    """Read a file's header and the number of bytes before its arrays; the checksum is not looked at.

    Raises:
        ValueError: the file is missing, or does not begin as such a file does.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(magic) + 4)
            text = file.read(int.from_bytes(start[len(magic) :], "little"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    if start[: len(magic)] != magic:
        raise ValueError(f"{path}: not a file of soft labels in a version known here")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its header is damaged") from None
    length = len(start) + len(text)
    return header, length + (-length % ALIGNMENT)


def read_checksum(path: Path) -> str:
    """Read the checksum that stands at a file's end, in hex; it is not compared with anything."""
    with path.open("rb") as file:
        file.seek(-CHECKSUM_BYTES, os.SEEK_END)
        return file.read().hex()


def open_checked(path: Path) -> np.ndarray:
    """Map a file into memory, as bytes without the checksum, once it has been found to hold.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (FileNotFoundError, ValueError):  # an empty file cannot be mapped
        raise ValueError(f"{path}: missing or empty") from None
    found = hashlib.blake2b(content[:-CHECKSUM_BYTES], digest_size=CHECKSUM_BYTES).digest()
    if found != content[-CHECKSUM_BYTES:].tobytes():
        raise ValueError(f"{path}: its checksum does not hold")
    return content[:-CHECKSUM_BYTES]
