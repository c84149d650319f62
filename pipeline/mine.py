"""Mining: which pool images the student learns from.

Near-copies of validation and test images are left out; of the rest, each class takes the images that the teacher is
surest of and that are most like the validation images, down to a least score. Reads data/prepare/images and data/score.
Writes data/mine: mined.parquet (id, class, score, likeness; an image that serves several classes stands there several
times), refused.parquet (id, reason, class, score, likeness, similarity, nearest, alignment), classes.csv (what each
class was offered and took), summary.json, and sheet.png, which shows some images, mined and refused. A score is the
teacher's probability of the class; likeness is a natural logarithm, 0 where images are ranked by probability alone;
alignment says what of the two is alike ("inner part": the image is that of the nearest one; "its inner part": the
reverse). Run: python -m pipeline.mine
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import atomic, devices, resume, stage
from pipeline.core.data.dataset import ImageSet
from pipeline.core.mining import copies, ranking, sheet
from pipeline.core.mining.likeness import likeness
from pipeline.core.mining.ranking import ClassCount
from pipeline.core.progress import Progress
from pipeline.core.sections import Params
from pipeline.core.tables import as_csv

SCORE = Path("data/score")


def run(params: Params) -> None:
    images, settings = ImageSet(Path("data/prepare/images")), params.mine
    device = devices.join(params.machine).device
    ids, logits, embeddings, thumbs = scores(images, SCORE)
    count = len(images.rows("unlabelled"))
    pool = ids[:count]
    with Progress(count, "images", "mine: near-copies") as progress:
        found = copies.nearest(thumbs[:count], thumbs[count:], settings.copy_similarity, device, progress.update)
    with Progress(count, "images", "mine: scores") as progress:
        classes, best = ranking.best_classes(logits[:count], settings.classes_per_image, progress.update)
    copied = found.similarity >= settings.copy_similarity
    allowed = ~copied[:, None] & (best >= settings.min_score)
    log_likeness = np.zeros(count, np.float32)
    if settings.rank_by == "likeness" and count:
        validation = np.flatnonzero(np.isin(ids, images.ids[images.rows("val")]))
        with Progress(count, "images", "mine: likeness") as progress:
            log_likeness = likeness(embeddings[:count], embeddings[validation], pool, progress.update)
    worth = ranking.worth(best, log_likeness[:, None])
    taken = ranking.best_of_each_class(classes, worth, pool, allowed, settings.per_class)
    counts = ranking.count_classes(images.classes, classes, best, allowed, taken, settings.per_class)
    image, place = np.nonzero(taken)
    mined = {
        "id": pool[image],
        "class": classes[image, place],
        "score": best[image, place],
        "likeness": log_likeness[image],
    }
    reason = np.select([copied, best[:, 0] < settings.min_score], ["near-copy", "low score"], "class is full")
    judged = {
        "id": pool,
        "reason": reason,
        "class": classes[:, 0],
        "score": best[:, 0],
        "likeness": log_likeness,
        "similarity": found.similarity,
        "nearest": np.append(ids[count:], np.uint64(0))[found.which],  # 0: far from all
        "alignment": np.array([*(each.name for each in copies.ALIGNMENTS), "none"])[found.alignment],
    }
    refused = ~taken.any(1)
    whole = ranking.summary(counts, taken, reason[refused])
    with resume.only_writer("mine"), atomic.replacing_folder(Path("data/mine")) as folder:
        pq.write_table(pa.table(mined), folder / "mined.parquet")
        pq.write_table(pa.table({name: column[refused] for name, column in judged.items()}), folder / "refused.parquet")
        write_counts(folder / "classes.csv", counts)
        atomic.write_json(folder / "summary.json", whole)
        sheet.draw(images, mined, judged, refused, counts).save(folder / "sheet.png")
    for line in ranking.say(counts, whole):
        print(f"mine: {line}")
    if whole["refused"].get("low score", 0) > count / 2:
        print(
            "mine: warning: the teacher is too unsure of most pool images: data/teacher/history.csv says how good a "
            "fitted teacher is, stage teacher's output how good a taken one is; a lower mine.min_score (now "
            f"{settings.min_score:g}) takes more"
        )


def scores(images: ImageSet, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read ids (N,), logits (N, C), embeddings (N, D) and thumbnails (N, 32, 32), memory-mapped.

    The pool's images come first, then validation and test images, both in ascending order of ids.

    Raises:
        ValueError: scoring has not been done, or was done for other images, or a file is damaged.
    """
    columns = []
    for name in ("ids", "logits", "embeddings", "thumbnails"):
        file = folder / f"{name}.npy"
        try:
            columns.append(np.load(file, mmap_mode="r"))
        except FileNotFoundError:
            raise ValueError(f"{folder}: no scores here; run `dvc repro score`, or `dvc pull`") from None
        except (EOFError, ValueError) as error:
            raise ValueError(
                f"{file}: damaged ({error}); remove {folder}, and run `dvc checkout {folder}`, or `dvc repro`"
            ) from None
    ids, *others = columns
    wanted = np.concatenate([images.rows("unlabelled"), images.rows("val", "test")])
    if not np.array_equal(images.row_of(ids), wanted):
        raise ValueError(f"{folder}: the scores are of other images; run `dvc repro score`")
    return ids, *others


def write_counts(path: Path, counts: list[ClassCount]) -> None:
    """Write a row a class; a class that took nothing has no lowest score."""
    rows = [
        {
            "class": each.name,
            "mined": each.mined,
            "wanted": each.wanted,
            "missing": each.wanted - each.mined,
            "offered": each.offered,
            "lowest_score": f"{each.lowest_score:.4f}" if each.mined else "",
        }
        for each in counts
    ]
    atomic.write_text(path, as_csv(rows))


if __name__ == "__main__":
    stage.main(run, __doc__)
