"""A cache of soft labels: a folder of shards, an index of their keys, and a `cache.json` that says what they are."""

import dataclasses
import hashlib
import itertools
import json
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.core import atomic
from pipeline.core.softlabels import sealed, shards
from pipeline.core.softlabels.records import Coding, Records, SparseLabels

FORMAT_VERSION = 2
INDEX, INDEX_MAGIC = "index.sl", b"SSLDIDX2"
LOOKED_UP = 1 << 24  # keys at once, where there are many
SORTED = 1 << 26  # keys at once, where there are many: 3 GB
SPARE_FILES = 100  # file handles that are left to others


@dataclasses.dataclass(frozen=True)
class Description:
    """What a cache's answers depend on: labels of another description are refused.

    Args:
        teacher: what names the teacher (weights' digest, model, normalisation, precision).
        views: what names the views (`ViewSpec.description`).
        num_classes, top_k, min_probability, bits: see `Coding`.
    """

    teacher: dict[str, Any]
    views: dict[str, Any]
    num_classes: int
    top_k: int
    min_probability: float
    bits: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description, in hex."""
        content = {"format": FORMAT_VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def coding(self) -> Coding:
        """How distributions become records."""
        return Coding(self.num_classes, self.top_k, self.min_probability, self.bits)

    def difference(self, other: "Description") -> str:
        """Name the fields that differ, for people: "teacher.digest, views.flip"."""
        mine, others = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        return ", ".join(sorted(key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key)))


def make_keys(ids: np.ndarray, replicas: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """Make the keys (N,) uint64 of views: of samples' ids, replicas, and the ids mixed in (their own where none is).

    A key is a hash (the finaliser of SplitMix64, Steele et al., OOPSLA 2014, over the three numbers). Two of a cache of
    150 million views are the same with a probability of 1 in 1,600, two of 1.9 billion with 1 in 10: `find_double`
    tells, before the teacher is asked.
    """
    mixed = ids.astype(np.uint64)
    for part in (partners.astype(np.uint64), replicas.astype(np.uint64)):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + part
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def find_double(keys: np.ndarray) -> tuple[int, int] | None:
    """Find two of N keys that are the same: the places of the first two; None where all differ."""
    for least, most in _ranges(len(keys)):
        ordered = np.sort(np.concatenate([part[(part >= least) & (part <= most)] for _, part in _parts(keys)]))
        doubles = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(doubles):
            places = np.concatenate([start + np.flatnonzero(part == doubles[0]) for start, part in _parts(keys)])
            return int(places[0]), int(places[1])
    return None


class SoftLabels:
    """A cache, open for reading, by the index of its shards (`write_index`).

    Args:
        folder: where it lies.
        description: what the answers must depend on.

    Raises:
        ValueError: a file is missing, damaged, or of another description; it is named, and what mends it.
    """

    def __init__(self, folder: Path, description: Description):
        self.folder, self.description, self.coding = Path(folder), description, description.coding
        self._fingerprint = description.fingerprint
        try:
            names, self._keys, self._order = self._read_index()
            self.shards = [shards.Shard(self.folder / name, self._fingerprint, self.coding) for name in names]
        except ValueError as error:
            raise ValueError(f"{error}; {_mend(self.folder)}") from None
        self._starts = np.cumsum([0] + [shard.views for shard in self.shards])
        self._open: dict[int, None] = {}  # numbers of the open shards, the one read longest ago first
        self._most_open = _allow_open_files(len(self.shards))

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Give the position (N,) of each key in the cache, -1 where it is not there."""
        if not len(self):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return np.where(self._keys[at] == keys, self._order[at].astype(np.int64), -1)

    def missing(self, keys: np.ndarray) -> Iterator[np.ndarray]:
        """Give the places, int64, ascending, of the keys that are not in the cache, in parts: they may be billions."""
        for start, part in _parts(keys):
            yield start + np.flatnonzero(self.find(part) < 0)

    def read(self, keys: np.ndarray) -> SparseLabels:
        """Give the answers for N views.

        Raises:
            ValueError: a view is not in the cache, or a shard is damaged.
        """
        positions = self.find(keys)
        if (positions < 0).any():
            raise ValueError(
                f"{self.folder}: {(positions < 0).sum()} of {len(keys)} views are missing, the first at place "
                f"{int(np.argmin(positions))} of the batch; run `dvc repro cache`"
            )
        return self.coding.decode(self._gather(positions))

    def _gather(self, positions: np.ndarray) -> Records:
        order = np.argsort(positions)
        numbers = np.searchsorted(self._starts, positions[order], side="right") - 1
        counts, content = np.empty(len(positions), np.uint8), [b""] * len(positions)
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(positions)]
        for begin, end in itertools.pairwise(edges):
            number, here = int(numbers[begin]), order[begin:end]
            try:
                counts[here], pieces = self.shards[number].read(positions[here] - self._starts[number])
            except ValueError as error:
                raise ValueError(f"{error}; {_mend(self.folder)}") from None
            for place, piece in zip(here.tolist(), pieces, strict=True):
                content[place] = piece
            self._keep_few_open(number)
        return Records(counts, np.frombuffer(b"".join(content), np.uint8))

    def _keep_few_open(self, number: int) -> None:
        """Close the shard that was read longest ago, where a process may not have so many files open."""
        if len(self.shards) <= self._most_open:
            return
        self._open.pop(number, None)
        self._open[number] = None
        if len(self._open) > self._most_open:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self.shards[oldest].close()

    def verify(self) -> None:
        """Check every byte of every shard. Raises ValueError where one does not hold; it names the shard."""
        for shard in self.shards:
            try:
                shard.verify()
            except ValueError as error:
                raise ValueError(f"{error}; {_mend(self.folder)}") from None

    def _read_index(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        path = self.folder / INDEX
        header, start = sealed.read_header(path, INDEX_MAGIC)
        content = sealed.open_checked(path)
        if header["fingerprint"] != self._fingerprint:
            raise ValueError(f"{path}: of another teacher, of other views or of another coding")
        known, there = set(header["shards"]), {file.name for file in _shard_files(self.folder)}
        for name in sorted(known ^ there):
            raise ValueError(f"{self.folder / name}: {'missing' if name in known else 'not a shard of this cache'}")
        keys = content[start : start + 8 * header["views"]].view(np.uint64)
        order = content[start + 8 * header["views"] :].view(header["positions"])
        return header["shards"], keys, order


def set_damaged_aside(folder: Path, description: Description, aside: Path) -> list[str]:
    """Move shards that do not hold out of a cache that is being written; give what was wrong with each."""
    wrong = []
    for path in _shard_files(folder):
        try:
            shards.Shard(path, description.fingerprint, description.coding).verify()
        except ValueError as error:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(path, aside / path.name)
            wrong.append(str(error))
    return wrong


def unfinish(folder: Path) -> None:
    """Take away what makes a cache a finished one: shards are about to be added."""
    for name in ("cache.json", INDEX):
        (folder / name).unlink(missing_ok=True)


def write_index(folder: Path, description: Description) -> None:
    """Write the index of the shards that are there, none of which may come or go as long as it is.

    Raises:
        ValueError: a shard is damaged, or of another description; it is named, and what mends it.
    """
    try:
        found = [shards.Shard(path, description.fingerprint, description.coding) for path in _shard_files(folder)]
        count = sum(shard.views for shard in found)
        for shard in found:
            shard.keys()
        positions = np.dtype("<u4" if count < 2**32 else "<u8")
        header = {
            "fingerprint": description.fingerprint,
            "views": count,
            "positions": positions.str,
            "shards": [shard.path.name for shard in found],
        }
        with tempfile.TemporaryFile(dir=folder) as beside:
            sealed.write(folder / INDEX, INDEX_MAGIC, header, _keys_and_positions(found, positions, beside))
    except ValueError as error:
        raise ValueError(f"{error}; {_mend(folder)}") from None


def finish(folder: Path, description: Description, wanted: np.ndarray) -> None:
    """Write the index and `cache.json`: the cache is whole.

    Args:
        wanted: (N,) keys that the cache must hold, all different; it may hold others.

    Raises:
        ValueError: one is missing.
    """
    write_index(folder, description)
    labels = SoftLabels(folder, description)
    if any(len(part) for part in labels.missing(wanted)):
        raise ValueError(f"{folder}: a view is missing; run `dvc repro cache`")
    size = sum(path.stat().st_size for path in (folder / INDEX, *_shard_files(folder)))
    content = {
        "format": FORMAT_VERSION,
        "fingerprint": description.fingerprint,
        **dataclasses.asdict(description),
        "wanted_views": len(wanted),
        "stored_views": len(labels),
        "shards": len(labels.shards),
        "bytes": size,
        "bytes_per_view": round(size / max(1, len(labels)), 2),
    }
    atomic.write_json(folder / "cache.json", {**content, "checksum": _checksum(content)})


def read_summary(folder: Path) -> dict[str, Any]:
    """Read `cache.json`.

    Raises:
        ValueError: there is no finished cache, or the file is damaged.
    """
    path = folder / "cache.json"
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no finished cache of soft labels here; run `dvc repro cache`") from None
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: damaged; {_mend(folder)}") from None
    if checksum != _checksum(content):
        raise ValueError(f"{path}: damaged; {_mend(folder)}")
    return content


def read_description(folder: Path) -> Description:
    """Read what a finished cache's answers depend on.

    Raises:
        ValueError: there is no finished cache, it is damaged, or of another version of the format.
    """
    content = read_summary(folder)
    if content["format"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: in version {content['format']} of the format, not {FORMAT_VERSION}; {_mend(folder)}"
        )
    return Description(**{field.name: content[field.name] for field in dataclasses.fields(Description)})


def fingerprints(folder: Path) -> dict[Path, str]:
    """Say whose labels each shard in a folder holds; those that cannot be read are left out."""
    found = {}
    for path in _shard_files(folder):
        try:
            name = str(sealed.read_header(path, shards.MAGIC)[0]["fingerprint"])
        except (ValueError, KeyError, TypeError):
            continue
        if re.fullmatch("[0-9a-f]{64}", name):  # else it is damaged
            found[path] = name
    return found


def _keys_and_positions(found: list[shards.Shard], dtype: np.dtype, beside: IO[bytes]) -> Iterator[np.ndarray]:
    """Give all keys of some shards, ascending, then the position of each, some at a time.

    Args:
        dtype: of a position.
        beside: an empty file, for the positions meanwhile.
    """
    starts = np.cumsum([0] + [shard.views for shard in found]).tolist()
    for least, most in _ranges(starts[-1]):
        some_keys, some_positions = [np.zeros(0, shards.KEY)], [np.zeros(0, dtype)]
        for start, shard in zip(starts[:-1], found, strict=True):
            keys = shard.keys(checked=False)
            here = np.flatnonzero((keys >= least) & (keys <= most))
            some_keys.append(keys[here])
            some_positions.append((start + here).astype(dtype))
        keys, positions = np.concatenate(some_keys), np.concatenate(some_positions)
        del some_keys, some_positions
        order = np.argsort(keys, kind="stable")
        positions[order].tofile(beside)
        yield keys[order]
    beside.seek(0)
    while len(positions := np.fromfile(beside, dtype, LOOKED_UP)):
        yield positions


def _parts(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cut keys, which may be billions in a file, into parts, each with its first place."""
    for start in range(0, len(keys), LOOKED_UP):
        yield start, keys[start : start + LOOKED_UP]


def _ranges(count: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Cut what 64 bits can say into ranges (least, most), each with few enough of so many keys: keys are hashes."""
    parts = max(1, -(-count // SORTED))
    for part in range(parts):
        yield np.uint64(2**64 * part // parts), np.uint64(2**64 * (part + 1) // parts - 1)


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("labels-*.sl"))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _allow_open_files(count: int) -> int:
    """Ask for so many file handles, and say how many there are: a process on macOS may have 256 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return count if soft == resource.RLIM_INFINITY else max(1, soft - SPARE_FILES)


def _mend(folder: Path) -> str:
    return f"`dvc repro --force --single-item {folder.name}` computes what is damaged or missing, and no more"


def _flat(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Turn {"a": {"b": 1}} into {"a.b": 1}."""
    flat = {}
    for key, value in content.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat
