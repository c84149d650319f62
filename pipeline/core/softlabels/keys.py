"""Keys: 64 bits that name a view. There may be more of them than memory holds, so they are gone through in parts."""

from collections.abc import Iterator

import numpy as np

KEY = np.dtype("<u8")
LOOKED_UP = 1 << 24  # keys at once, where there are many
SORTED = 1 << 26  # keys at once, where there are many: 3 GB


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
    for least, most in ranges(len(keys)):
        ordered = np.sort(np.concatenate([part[(part >= least) & (part <= most)] for _, part in parts(keys)]))
        doubles = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(doubles):
            places = np.concatenate([start + np.flatnonzero(part == doubles[0]) for start, part in parts(keys)])
            return int(places[0]), int(places[1])
    return None


def parts(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cut keys into parts of some millions, each with its first place."""
    for start in range(0, len(keys), LOOKED_UP):
        yield start, keys[start : start + LOOKED_UP]


def ranges(count: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Cut what 64 bits can say into ranges (least, most), each with few enough of so many keys: keys are hashes."""
    number = max(1, -(-count // SORTED))
    for part in range(number):
        yield np.uint64(2**64 * part // number), np.uint64(2**64 * (part + 1) // number - 1)
