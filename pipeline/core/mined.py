"""The list of mined images, as `mine` writes it and others read it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def read(folder: Path) -> np.ndarray:
    """Give the ids (M,) uint64 of the mined images, ascending, each once.

    Raises:
        ValueError: mining has not been done.
    """
    try:
        return np.unique(pq.read_table(folder / "mined.parquet", columns=["id"])["id"].to_numpy())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no mined.parquet here; run `dvc repro mine`, or `dvc pull`") from None
