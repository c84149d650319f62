"""A cache of soft labels: a folder of shards and a `cache.json` that says what they are answers to."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import atomic
from pipeline.core.softlabels import shards
from pipeline.core.softlabels.records import SparseLabels, record_type, unpack

FORMAT_VERSION = 1
OPEN_SHARDS = 100  # a process may have 256 files open on macOS


@dataclasses.dataclass(frozen=True)
class Description:
    """What a cache's answers depend on: labels of another description are refused.

    Args:
        teacher: what names the teacher (weights' digest, model, normalisation, precision).
        views: what names the views (`ViewSpec.description`).
        num_classes: classes the teacher knows.
        top_k: classes stored of each view; at most num_classes.
    """

    teacher: dict[str, Any]
    views: dict[str, Any]
    num_classes: int
    top_k: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description, in hex."""
        content = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def difference(self, other: "Description") -> str:
        """Name the fields that differ, for people: "teacher.digest, views.flip"."""
        mine, others = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        return ", ".join(sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key)))


def make_keys(ids: np.ndarray, replicas: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """Make keys (N,) of samples' ids, replicas, and the ids of the samples mixed in (their own where none is)."""
    keys = np.zeros(len(ids), shards.KEY)
    keys["id"], keys["replica"], keys["partner"] = ids, replicas, partners
    return keys


class SoftLabels:
    """A cache, open for reading and for adding shards.

    Args:
        folder: where it lies; it need not be there yet.
        description: what the answers must depend on.

    Raises:
        ValueError: a shard is damaged or of another description; it is named.
    """

    def __init__(self, folder: Path, description: Description):
        self.folder, self.description = Path(folder), description
        self.type = record_type(description.top_k, description.num_classes)
        fingerprint = description.fingerprint
        self.shards = [shards.Shard(path, fingerprint, self.type) for path in sorted(self.folder.glob("labels-*.sl"))]
        keys = [shard.keys for shard in self.shards]
        hashes = _hash(np.concatenate(keys)) if keys else np.zeros(0, np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._open: dict[int, None] = {}  # numbers of the open shards, the one read longest ago first
        self._starts = np.cumsum([0] + [shard.count for shard in self.shards])

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Give the position (N,) of each key in the cache, -1 where it is not there."""
        if not len(self):
            return np.full(len(keys), -1)
        wanted = _hash(keys)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        return np.where(self._hashes[at] == wanted, self._order[at], -1)

    def read(self, keys: np.ndarray) -> SparseLabels:
        """Give the answers for N views.

        Raises:
            ValueError: a view is not in the cache, or a shard is damaged.
        """
        positions = self.find(keys)
        if (positions < 0).any():
            missing = keys[positions < 0][0]
            raise ValueError(
                f"{self.folder}: no soft label for sample {missing['id']:016x}, replica {missing['replica']} "
                f"({(positions < 0).sum()} of {len(keys)} views are missing); run `dvc repro cache`"
            )
        of_shard = np.searchsorted(self._starts, positions, side="right") - 1
        records = np.empty(len(keys), self.type)
        for number in np.unique(of_shard):
            here = of_shard == number
            records[here] = self.shards[number].records[positions[here] - self._starts[number]]
            self._keep_few_open(number)
        return unpack(records)

    def _keep_few_open(self, number: int) -> None:
        """Close the shards that were read longest ago: each open one takes a file handle."""
        self._open.pop(number, None)
        self._open[number] = None
        if len(self._open) > OPEN_SHARDS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self.shards[oldest].close()

    def verify(self) -> None:
        """Check every shard's checksum. Raises ValueError where one does not hold; it names the shard."""
        for shard in self.shards:
            shard.records  # noqa: B018 - reading checks
            shard.close()

    def write_shard(self, keys: np.ndarray, records: np.ndarray) -> None:
        """Add a shard to the folder; it can be read by whoever opens the cache after this."""
        shards.write(self.folder, self.description.fingerprint, keys, records)


def describe(folder: Path, description: Description, views: int) -> None:
    """Write `cache.json`: the cache is whole, and holds the answers for so many views."""
    files = sorted(folder.glob("labels-*.sl"))
    atomic.write_json(
        folder / "cache.json",
        {
            "format": FORMAT_VERSION,
            "fingerprint": description.fingerprint,
            **dataclasses.asdict(description),
            "stored_views": views,
            "bytes_per_view": record_type(description.top_k, description.num_classes).itemsize,
            "shards": len(files),
            "bytes": sum(file.stat().st_size for file in files),
        },
    )


def read_description(folder: Path) -> Description:
    """Read what a whole cache's answers depend on.

    Raises:
        ValueError: there is no whole cache.
    """
    try:
        content = json.loads((folder / "cache.json").read_text())
        return Description(**{field.name: content[field.name] for field in dataclasses.fields(Description)})
    except FileNotFoundError:
        raise ValueError(f"{folder}: no finished cache of soft labels here; run `dvc repro cache`") from None
    except (ValueError, KeyError):
        raise ValueError(f"{folder / 'cache.json'}: damaged; run `dvc checkout`, or `dvc repro cache`") from None


def fingerprint_of(folder: Path) -> str | None:
    """Say whose labels the shards in a folder are; None where there is no shard."""
    first = next(iter(sorted(folder.glob("labels-*.sl"))), None)
    return first and shards.read_header(first)["fingerprint"]


def _hash(keys: np.ndarray) -> np.ndarray:
    """Mix each key into 64 bits (SplitMix64, Steele et al., OOPSLA 2014): one sorted array then finds any key."""
    mixed = keys["id"].astype(np.uint64)
    for part in (keys["partner"], keys["replica"].astype(np.uint64)):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + part
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
