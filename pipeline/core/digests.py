"""SHA-256 of values and files, in hex: what names things by their content."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def of_json(content: Any) -> str:
    """Digest of what JSON can hold; the order of a dict's keys makes no difference."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_array(values: np.ndarray) -> str:
    """Digest of an array's bytes, in C order; neither dtype nor shape enter."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def of_file(file: Path) -> str:
    """Digest of a file's bytes.

    Raises:
        ValueError: there is no such file.
    """
    try:
        with Path(file).open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; run `dvc checkout`, or the stage that makes it") from None
