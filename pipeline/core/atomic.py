"""Files that appear whole or not at all: written beside their place, flushed to the disk, then renamed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UMASK = os.umask(0o22)
os.umask(UMASK)  # which can be read in no other way


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file to; once the block has ended well, rename it over `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")  # always this name: what a killed run left is written over
    try:
        yield beside
        os.chmod(beside, 0o666 & ~UMASK)  # a library may have kept it from all others, as for a temporary file
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # of a write, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill; once the block has ended well, it takes the place of `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (path.with_name(f".{path.name}.{end}") for end in ("part", "old"))
    restore_folder(path)
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        _flush_all(beside)
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        flush(path.parent)
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        restore_folder(path)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Bring a folder back that a run was about to replace when it was killed, between the two renames."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file. Raises OSError as `replacing` does."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole UTF-8 file. Raises OSError as `replacing` does."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that a person can read and that is the same bytes for the same content."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that a stage has written into its folder.

    Raises:
        ValueError: it is not there, or damaged; it says what to do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; run `dvc repro {path.parent.name}`, or `dvc pull`") from None
    except ValueError:  # no JSON, or no text
        raise ValueError(f"{path}: damaged; remove it, and run `dvc checkout {path.parent}`, or `dvc repro`") from None


def new_array(file: Path, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.memmap:
    """Make a .npy file of zeros and map it, to be filled within `replacing`; its space on the disk is allocated first.

    Raises:
        OSError: the disk is full. (Who writes to a map without its space is killed then: SIGBUS.)
    """
    array = np.lib.format.open_memmap(file, "w+", dtype, shape)
    with file.open("r+b") as handle:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(handle.fileno(), 0, os.path.getsize(file))
    return array


def _flush_all(folder: Path) -> None:
    files = [folder, *folder.rglob("*")]
    if len(files) > 100:  # one by one, thousands of small files take seconds
        os.sync()
    else:
        for file in files:
            flush(file)


def flush(path: Path) -> None:
    """Make sure that a file or a folder's list of names is on the disk and not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
