"""Which pool images each class takes by the teacher's answers, and the counts that say how evenly that went."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ROWS = 4096  # answers read at once: they may be many times the memory
NAMED = 8  # classes short of images that are named in a line


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How many images one class was offered and took.

    Attributes:
        name: of the class.
        mined: pool images taken.
        wanted: most that it may take.
        offered: pool images that it could have taken: no near-copies, with a score that is high enough.
        lowest_score: of the images taken; NaN where there is none.
    """

    name: str
    mined: int
    wanted: int
    offered: int
    lowest_score: float


def best_classes(
    logits: np.ndarray, count: int, done: Callable[[int], object] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
    """Give the most probable classes of each image, and their probabilities, the highest first.

    Args:
        logits: (N, C) float32; may be memory-mapped, and is read in parts.
        count: K, how many classes of each image; all where there are fewer.
        done: told how many more images have been read.

    Returns:
        Classes (N, K) int32 and probabilities (N, K) float32.
    """
    count = min(count, logits.shape[1])
    classes, best = np.zeros((len(logits), count), np.int32), np.zeros((len(logits), count), np.float32)
    for start in range(0, len(logits), ROWS):
        part = slice(start, start + ROWS)
        probabilities = torch.from_numpy(np.array(logits[part], np.float32)).softmax(1)
        values, places = probabilities.topk(count, dim=1)
        classes[part], best[part] = places.numpy(), values.numpy()
        done(len(values))
    return classes, best


def worth(probabilities: np.ndarray, log_likeness: np.ndarray) -> np.ndarray:
    """What images are worth to a class: the teacher's probability of it times the likeness, as a natural logarithm."""
    return np.log(np.maximum(probabilities, 1e-30)) + log_likeness  # float32 has probabilities of 0


def best_of_each_class(
    classes: np.ndarray, worth: np.ndarray, ids: np.ndarray, allowed: np.ndarray, per_class: int
) -> np.ndarray:
    """Say which images each class takes: its `per_class` best, equal ones by id.

    Args:
        classes: (N, K) classes that each image may serve.
        worth: (N, K) by which each class ranks them.
        ids: (N,) uint64.
        allowed: (N, K) bool; others are not taken.
        per_class: most images of a class.

    Returns:
        (N, K) bool: whether the image is taken for that class.
    """
    image, place = np.nonzero(allowed)
    of_class = classes[image, place]
    order = np.lexsort((ids[image], -worth[image, place], of_class))
    grouped = of_class[order]
    rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
    chosen = order[rank < per_class]
    taken = np.zeros(classes.shape, bool)
    taken[image[chosen], place[chosen]] = True
    return taken


def count_classes(
    names: tuple[str, ...],
    classes: np.ndarray,
    best: np.ndarray,
    allowed: np.ndarray,
    taken: np.ndarray,
    per_class: int,
) -> list[ClassCount]:
    """Count what each class was offered and took.

    Args:
        names: of the classes.
        classes: (N, K) classes that each image may serve.
        best: (N, K) its score in each.
        allowed, taken: (N, K) bool, what went into `best_of_each_class` and what came out.
        per_class: most images of a class.
    """
    offered, mined = (np.bincount(classes[which], minlength=len(names)) for which in (allowed, taken))
    lowest = np.full(len(names), np.inf, np.float32)
    np.minimum.at(lowest, classes[taken], best[taken])
    lowest = np.where(mined > 0, lowest, np.nan)
    return [
        ClassCount(name, int(mined[at]), per_class, int(offered[at]), float(lowest[at]))
        for at, name in enumerate(names)
    ]


def summary(counts: list[ClassCount], taken: np.ndarray, reasons: np.ndarray) -> dict[str, Any]:
    """Count what was taken, class by class, and what was refused, reason by reason.

    Args:
        counts: of each class.
        taken: (N, K) bool.
        reasons: (N - M,) str, of the images that no class took.
    """
    found, times = np.unique(reasons, return_counts=True)
    mined = np.array([each.mined for each in counts])
    return {
        "mined": int(taken.any(1).sum()),
        "refused": dict(zip(found.tolist(), times.tolist(), strict=True)),
        "classes_short": sum(each.mined < each.wanted for each in counts),
        "least_of_a_class": int(mined.min()),
        "median_of_a_class": float(np.median(mined)),
        "most_of_a_class": int(mined.max()),
        "wanted_per_class": counts[0].wanted,
        "per_class": {each.name: each.mined for each in counts},
    }


def say(counts: list[ClassCount], whole: dict[str, Any]) -> list[str]:
    """Say in a few lines what `summary` counted, and which classes are short."""
    refused = ", ".join(f"{count:,} {reason}" for reason, count in whole["refused"].items()) or "none"
    lines = [
        f"{whole['mined']:,} pool images taken; refused: {refused}",
        f"a class took {whole['least_of_a_class']:,} to {whole['most_of_a_class']:,} images, "
        f"half of them {whole['median_of_a_class']:,g} or more; wanted: {whole['wanted_per_class']:,}",
    ]
    short = sorted((each for each in counts if each.mined < each.wanted), key=lambda each: each.mined)
    if short:
        named = ", ".join(f"{each.name} ({each.mined:,})" for each in short[:NAMED])
        more = f" and {len(short) - NAMED:,} more" if len(short) > NAMED else ""
        lines.append(f"{len(short):,} of {len(counts):,} classes have fewer than wanted: {named}{more}")
    return lines
