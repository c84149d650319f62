"""A cache that grows: shards that are damaged are taken out, and it is finished; `shards` writes each of them."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np

from pipeline.core import atomic
from pipeline.core.softlabels import index, sealed, shards, store


def set_damaged_aside(folder: Path, description: store.Description, aside: Path) -> list[str]:
    """Move shards that do not hold out of a cache that is being written; give what was wrong with each."""
    wrong = []
    for path in store.shard_files(folder):
        try:
            shards.Shard(path, description.fingerprint, description.coding).verify()
        except ValueError as error:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(path, aside / path.name)
            wrong.append(str(error))
    return wrong


def unfinish(folder: Path) -> None:
    """Take away what makes a cache a finished one: shards are about to be added."""
    for name in ("cache.json", index.NAME):
        (folder / name).unlink(missing_ok=True)


def write_index(folder: Path, description: store.Description) -> None:
    """Write the index of the shards that are there, none of which may come or go as long as it is.

    Raises:
        ValueError: a shard is damaged, or of another description; it is named, and what mends it.
    """
    with store.saying_how_to_mend():
        found = [shards.Shard(path, description.fingerprint, description.coding) for path in store.shard_files(folder)]
        for shard in found:
            shard.keys()
        index.write(folder, description.fingerprint, found)


def finish(folder: Path, description: store.Description, wanted: np.ndarray) -> None:
    """Write the index and `cache.json`: the cache is whole.

    Args:
        wanted: (N,) keys that the cache must hold, all different; it may hold others.

    Raises:
        ValueError: one is missing.
    """
    write_index(folder, description)
    labels = store.SoftLabels(folder, description)
    if any(len(part) for part in labels.missing(wanted)):
        raise ValueError(f"{folder}: a view is missing; run `dvc repro cache`")
    size = sum(path.stat().st_size for path in (folder / index.NAME, *store.shard_files(folder)))
    content = {
        "format": store.FORMAT_VERSION,
        "fingerprint": description.fingerprint,
        **dataclasses.asdict(description),
        "wanted_views": len(wanted),
        "stored_views": len(labels),
        "shards": len(labels.shards),
        "bytes": size,
        "bytes_per_view": round(size / max(1, len(labels)), 2),
    }
    atomic.write_json(folder / "cache.json", {**content, "checksum": store.summary_checksum(content)})


def fingerprints(folder: Path) -> dict[Path, str]:
    """Say whose labels each shard in a folder holds; those that cannot be read are left out."""
    found = {}
    for path in store.shard_files(folder):
        try:
            name = str(sealed.read_header(path, shards.MAGIC)[0]["fingerprint"])
        except (ValueError, KeyError, TypeError):
            continue
        if re.fullmatch("[0-9a-f]{64}", name):  # else it is damaged
            found[path] = name
    return found
