"""Checkpoints of a training run: the last few, each whole or not there, a damaged one removed.

A file is named after its step and its content, `000000120-9f86d081884c7d65.pt`: 16 digits of the SHA-256 of its bytes,
so that damage is seen before anything is read.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.core import atomic, digests

DIGITS = 16


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of a step, and remove all but the last `keep`.

    Args:
        state: tensors, numbers, text, and dicts and lists of them.

    Raises:
        OSError: the disk is full or the folder cannot be written; the checkpoints before are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".checkpoint.part"
    try:
        torch.save(state, beside)
        atomic.flush(beside)
        os.replace(beside, folder / f"{step:09d}-{digests.of_file(beside)[:DIGITS]}.pt")
        atomic.flush(folder)
    except (RuntimeError, OSError) as error:  # torch.save says so of a full disk by the former
        free = f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
        raise OSError(f"{folder}: a checkpoint cannot be written; {free} ({str(error).splitlines()[0]})") from None
    finally:
        beside.unlink(missing_ok=True)
    keep_last(folder, keep)


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the last checkpoints."""
    for old in files(folder)[count:]:
        old.unlink()


def load(folder: Path) -> dict[str, Any] | None:
    """Read the last checkpoint that is whole, to the CPU; None without one. Damaged ones are removed, and named.

    Raises:
        OSError: one cannot be read, which says nothing about its bytes; all stay.
    """
    for file in files(folder):
        if digests.of_file(file)[:DIGITS] == file.stem.partition("-")[2]:
            # To the CPU: the GPU need not hold the state twice while it is loaded.
            return torch.load(file, map_location="cpu", weights_only=True)
        print(f"warning: {file}: damaged, removed", file=sys.stderr, flush=True)
        file.unlink()  # else it would be kept as the last one, in the place of a good one
    return None


def files(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, the last step first."""
    return sorted(folder.glob("*-*.pt"), reverse=True)
