"""A cache of soft labels: a folder of shards, an index of their keys, and a `cache.json` that says what they are."""

import contextlib
import dataclasses
import hashlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.softlabels import index, shards
from pipeline.core.softlabels.keys import parts
from pipeline.core.softlabels.records import Coding, Records, SparseLabels

FORMAT_VERSION = 2
# File handles that are left to others (worker processes, images' shards, CUDA); half of all, where those are few.
SPARE_FILES = 1000
MOST_MAPS = 60_000  # files mapped at once: Linux allows a process 65,530
MEND = "`dvc repro --force --single-item cache` computes what is damaged or missing, and no more"


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


class SoftLabels:
    """A cache, open for reading, by the index of its shards (`writing.write_index`).

    Args:
        folder: where it lies.
        description: what the answers must depend on.

    Raises:
        ValueError: a file is missing, damaged, or of another description; it is named, and what mends it.
    """

    def __init__(self, folder: Path, description: Description):
        self.folder, self.description, self.coding = Path(folder), description, description.coding
        self._fingerprint = description.fingerprint
        with saying_how_to_mend():
            self._index = self._open_index()
            files = [self.folder / name for name in self._index.shards]
            self.shards = [shards.Shard(file, self._fingerprint, self.coding) for file in files]
            for shard in self.shards:
                if shard.checksum != self._index.shards[shard.path.name]:
                    raise ValueError(f"{shard.path}: damaged, or another shard in its place")
        self._starts = np.cumsum([0] + [shard.views for shard in self.shards])
        self._counts_at = np.array([shard.counts_at for shard in self.shards], np.int64)
        self._blocks = np.cumsum([0] + [-(-shard.views // shards.BLOCK) for shard in self.shards])
        self._contents: list[memoryview | None] = [None] * len(self.shards)  # of those that are open
        self._open = np.zeros(len(self.shards), bool)
        self._checked = np.zeros(len(self.shards), bool)
        self._places = np.empty(self._blocks[-1], np.uint32)  # of each block's first record in its shard, once checked
        self._most_open = _allow_open_files(len(self.shards))

    def __len__(self) -> int:
        return len(self._index)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Give the position (N,) int64 of each key in the cache, -1 where it is not there."""
        return self._index.find(keys)

    def missing(self, keys: np.ndarray) -> Iterator[np.ndarray]:
        """Give the places, int64, ascending, of the keys that are not in the cache, in parts: they may be billions."""
        for start, part in parts(keys):
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
        """Read the records of some positions, in their order."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        if self._open[numbers].all():
            counts, pieces = self._pieces(positions, numbers)
        else:
            asked, counts, pieces = np.unique(numbers), np.empty(len(positions), np.uint8), [b""] * len(positions)
            for first in range(0, len(asked), self._most_open):
                some = asked[first : first + self._most_open]
                self._open_shards(some)
                here = np.flatnonzero((numbers >= some[0]) & (numbers <= some[-1]))
                counts[here], found = self._pieces(positions[here], numbers[here])
                for place, piece in zip(here.tolist(), found, strict=True):
                    pieces[place] = bytes(piece)  # what points into a shard would keep it open
        return Records(counts, np.frombuffer(b"".join(pieces), np.uint8))

    def _pieces(self, positions: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, list[memoryview]]:
        """Give counts (N,) and bytes of the records of some positions, in the open shards of these numbers.

        A record begins where its block does, plus the sizes of the records before it in the block. To keep a count and
        a place for each of a billion records would take gigabytes.
        """
        if not len(positions):
            return np.empty(0, np.uint8), []
        contents, shard_of = self._contents, numbers.tolist()
        block, before = np.divmod(positions - self._starts[numbers], shards.BLOCK)  # before: records, in the block
        count_at = self._counts_at[numbers] + block * shards.BLOCK + before
        ranges = zip(shard_of, (count_at - before).tolist(), (count_at + 1).tolist(), strict=True)
        counts = np.frombuffer(b"".join([contents[number][start:end] for number, start, end in ranges]), np.uint8)
        sizes, own = self.coding.sizes[counts], np.cumsum(before + 1) - 1  # own: a record's place among these counts
        ends = self._places[self._blocks[numbers] + block] + np.add.reduceat(sizes, own - before)
        ranges = zip(shard_of, (ends - sizes[own]).tolist(), ends.tolist(), strict=True)
        return counts[own], [contents[number][start:end] for number, start, end in ranges]

    def _open_shards(self, asked: np.ndarray) -> None:
        """Open shards; where a process may not have so many files open, close the others.

        Raises:
            ValueError: one is damaged.
        """
        if self._open.sum() + np.count_nonzero(~self._open[asked]) > self._most_open:
            self._contents = [None] * len(self.shards)
            self._open[:] = False
        for number in asked[~self._open[asked]].tolist():
            shard = self.shards[number]
            if not self._checked[number]:
                its = slice(self._blocks[number], self._blocks[number + 1])
                with saying_how_to_mend():
                    self._places[its] = shard.check()
                self._checked[number] = True
            self._contents[number] = shard.map()
            self._open[number] = True

    def verify(self) -> None:
        """Check every byte of every shard. Raises ValueError where one does not hold; it names the shard."""
        with saying_how_to_mend():
            for shard in self.shards:
                shard.verify()

    def _open_index(self) -> index.Index:
        opened = index.Index(self.folder, self._fingerprint)
        known, there = set(opened.shards), {file.name for file in shard_files(self.folder)}
        for name in sorted(known ^ there):
            raise ValueError(f"{self.folder / name}: {'missing' if name in known else 'not a shard of this cache'}")
        return opened


@contextlib.contextmanager
def saying_how_to_mend() -> Iterator[None]:
    """Add to the message of a ValueError about damage what mends it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {MEND}") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """Read `cache.json`.

    Raises:
        ValueError: there is no finished cache, or the file is damaged.
    """
    path = folder / "cache.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no finished cache of soft labels here; run `dvc repro cache`") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: damaged; {MEND}") from None
    if checksum != summary_checksum(content):
        raise ValueError(f"{path}: damaged; {MEND}")
    return content


def read_description(folder: Path) -> Description:
    """Read what a finished cache's answers depend on.

    Raises:
        ValueError: there is no finished cache, it is damaged, or of another version of the format.
    """
    content = read_summary(folder)
    if content["format"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: in version {content['format']} of the format, not {FORMAT_VERSION}; `dvc repro cache` asks the "
            "teacher about all views anew"
        )
    return Description(**{field.name: content[field.name] for field in dataclasses.fields(Description)})


def shard_files(folder: Path) -> list[Path]:
    """Give the shards in a folder."""
    return sorted(folder.glob("labels-*.sl"))


def summary_checksum(content: dict[str, Any]) -> str:
    """Give the checksum of what `cache.json` holds besides."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _allow_open_files(count: int) -> int:
    """Ask for so many file handles, and say how many may be used: a process on macOS has 256 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(count, MOST_MAPS) + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit of its own below an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return min(MOST_MAPS, count if soft == resource.RLIM_INFINITY else max(1, soft - min(SPARE_FILES, soft // 2)))


def _flat(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Turn {"a": {"b": 1}} into {"a.b": 1}."""
    flat = {}
    for key, value in content.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat
