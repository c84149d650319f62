"""Mining: which pool images the student learns from.

Near-copies of validation and test images are left out; of the rest, each class takes the images that the teacher is
surest of, down to a least score. Reads data/prepare and data/score. Writes data/mine: mined.parquet (id, class,
score), refused.parquet (id, reason, score, similarity, nearest) and summary.json. Run: python -m pipeline.mine
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import atomic, copies, stage
from pipeline.core.dataset import ImageSet
from pipeline.core.params import Params
from pipeline.core.progress import Progress

SCORE = Path("data/score")


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    pool, classes, best = scores(images, SCORE)
    similarity, nearest = find_copies(images, pool)
    copied = similarity >= params.mine.copy_similarity
    taken = best_of_each_class(classes, best, images.ids[pool], ~copied, params.mine.per_class, params.mine.min_score)
    reason = np.select([copied, best < params.mine.min_score], ["near-copy", "low score"], "class is full")
    with stage.only_writer("mine"), atomic.replacing_folder(Path("data/mine")) as folder:
        ids = images.ids[pool]
        _write(folder / "mined.parquet", taken, id=ids, **{"class": classes.astype(np.int32)}, score=best)
        guarded = np.where(nearest >= 0, images.ids[np.maximum(nearest, 0)], 0).astype(np.uint64)
        refused = {"reason": reason, "score": best, "similarity": similarity, "nearest": guarded}
        _write(folder / "refused.parquet", ~taken, id=ids, **refused)
        counts = summary(images.classes, classes[taken], reason[~taken], params.mine.per_class)
        atomic.write_json(folder / "summary.json", counts)
    short = sum(count < params.mine.per_class for count in counts["per_class"].values())
    print(
        f"mine: {taken.sum():,} of {len(pool):,} pool images taken; {counts['refused']}; {short} of "
        f"{len(images.classes)} classes have fewer than mine.per_class = {params.mine.per_class}"
    )


def scores(images: ImageSet, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the pool's rows (N,), the teacher's most probable class (N,) of each, and its probability (N,).

    Raises:
        ValueError: scoring has not been done, or was done for other images.
    """
    try:
        ids, logits = np.load(folder / "ids.npy"), np.load(folder / "logits.npy", mmap_mode="r")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no scores here; run `dvc repro score`, or `dvc pull`") from None
    rows = images.row_of(ids)
    classes, best = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), 4096):  # not all at once: they may be many times the memory
        part = np.asarray(logits[start : start + 4096])
        classes[start : start + 4096], best[start : start + 4096] = part.argmax(1), probabilities(part).max(1)
    in_pool = images.splits[rows] == "unlabelled"
    return rows[in_pool], classes[in_pool], best[in_pool]


def find_copies(images: ImageSet, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give for each pool image its similarity (N,) to the nearest validation or test image, and that one's row (N,)."""
    guarded = images.rows("val", "test")
    with Progress(len(pool) + len(guarded), "images", "mine: thumbnails") as progress:

        def thumbs(rows: np.ndarray) -> np.ndarray:
            parts = []
            for start in range(0, len(rows), 1024):
                part = rows[start : start + 1024]
                parts.append(copies.thumbnails(images.image(int(row)) for row in part))
                progress.update(len(part))
            return np.concatenate(parts) if parts else copies.thumbnails([])

        similarity, which = copies.nearest(thumbs(pool), thumbs(guarded))
    return similarity, np.where(which >= 0, guarded[which] if len(guarded) else -1, -1)


def best_of_each_class(
    classes: np.ndarray, best: np.ndarray, ids: np.ndarray, allowed: np.ndarray, per_class: int, min_score: float
) -> np.ndarray:
    """Say of each pool image whether it is taken: the `per_class` best of each class, equal ones by id.

    Args:
        classes: (N,) the most probable class of each image; it serves that one alone.
        best: (N,) that class's probability.
        ids: (N,) uint64.
        allowed: (N,) bool; others are not taken.
    """
    taken = np.zeros(len(classes), bool)
    order = np.lexsort((ids, -best))
    order = order[allowed[order] & (best[order] >= min_score)]
    for number in np.unique(classes):
        taken[order[classes[order] == number][:per_class]] = True
    return taken


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits (N, C)."""
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def summary(names: tuple[str, ...], taken: np.ndarray, reasons: np.ndarray, per_class: int) -> dict[str, Any]:
    """Count what was taken, class by class, and what was refused, reason by reason."""
    counts = np.bincount(taken, minlength=len(names)).tolist()
    found, times = np.unique(reasons, return_counts=True)
    return {
        "mined": len(taken),
        "refused": dict(zip(found.tolist(), times.tolist(), strict=True)),
        "per_class": dict(zip(names, counts, strict=True)),
        "wanted_per_class": per_class,
    }


def _write(path: Path, chosen: np.ndarray, **columns: np.ndarray) -> None:
    pq.write_table(pa.table({name: column[chosen] for name, column in columns.items()}), path)


if __name__ == "__main__":
    stage.main(run, __doc__)
