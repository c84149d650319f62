"""The finished student: its card, what evaluation recorded of it, and the digests that lead back to what made it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from pipeline.core import atomic, digests
from pipeline.core.data.dataset import ImageSet, open_known
from pipeline.core.params import parse
from pipeline.core.results import tracking
from pipeline.core.sections import Params

REMAKE = "run `dvc repro`"
STORED = ("prepare", "teacher", "cache")  # the stages whose outputs a version's tags name; dvc.lock names them all


@dataclass(frozen=True)
class Student:
    """The student as data/fixres and data/evaluate hold it."""

    images: ImageSet  # those with a label
    rows: np.ndarray  # (N,) the test images
    prepared: dict[str, Any]  # the summary of prepare
    card: dict[str, Any]  # network.json
    figures: dict[str, Any]  # metrics.json
    logits: np.ndarray  # (N, C) float32: what it answered to the test images when it was evaluated
    evaluated_on_gpu: bool

    @property
    def labels(self) -> np.ndarray:
        """The test images' classes (N,)."""
        return self.images.labels[self.rows]

    @property
    def test_digest(self) -> str:
        """Identifies the test split: its images and their classes' names."""
        names = [self.images.classes[label] for label in self.labels]
        return digests.of_json(sorted(zip(self.images.ids[self.rows].tolist(), names, strict=True)))

    @property
    def counts(self) -> dict[str, int]:
        """Images in each split."""
        return {split: of_split["images"] for split, of_split in self.prepared["splits"].items()}


def read(data: Path) -> Student:
    """Read the student.

    Raises:
        ValueError: something is missing, or the evaluation is of other images or classes. That it is of another
            student is seen when that one is asked, before a version is made.
    """
    (images, prepared), card = open_known(data), atomic.read_json(data / "fixres" / "network.json")
    figures, speed = (atomic.read_json(data / "evaluate" / name) for name in ("metrics.json", "speed.json"))
    table = pyarrow.parquet.read_table(data / "evaluate" / "predictions.parquet", columns=["id", "student_logits"])
    rows = images.rows("test")
    if not np.array_equal(table["id"].to_numpy(), images.ids[rows]):
        raise ValueError(f"{data / 'evaluate'}: made from other test images than {data / 'prepare'} holds; {REMAKE}")
    if list(card["classes"]) != list(images.classes):
        raise ValueError(f"{data / 'fixres'}: knows other classes than {data / 'prepare'} holds; {REMAKE}")
    logits = table["student_logits"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    return Student(images, rows, prepared, card, figures, logits, evaluated_on_gpu=speed["device"] != "cpu")


def describe(student: Student, name: str, test_crop: float) -> dict[str, Any]:
    """Say which student it is, and what it was tested on: what data/register/version.json holds.

    `key` is the same for the same weights, shown the same test images in the same way. The registry's version number
    is not here: it depends on what was registered before.

    Args:
        name: of the registered model.
        test_crop: share of the shorter side that test views keep.
    """
    network = {key: student.card[key] for key in ("model", "classes", "resolution", "mean", "std", "digest")}
    return {
        "name": name,
        "key": digests.of_json({**network, "crop": test_crop, "test": student.test_digest}),
        "weights": student.card["digest"],
        "data": student.prepared["digest"],
        "known": student.images.digest,
        "test": student.test_digest,
        "top1": student.figures["student"]["top1"],
    }


def count_mined(student: Student, params: Params, data: Path) -> int:
    """Count the images without labels whose soft labels the student learned from. Raises ValueError as `lineage`."""
    return _soft_labels(data)["wanted_views"] // params.cache.replicas - student.counts["labelled"]


def lineage(record: dict[str, Any], params: Params, data: Path) -> dict[str, str]:
    """Collect the tags that lead from a version back to data, teacher, labels, settings and commit.

    Args:
        record: what `describe` gave.
        data: the stages' outputs.

    Raises:
        ValueError: dvc.lock cannot be read; or what the teacher or the soft labels say of themselves.
    """
    settings = params.model_dump(mode="json", by_alias=True, exclude={"machine"})
    tags = {f"digest.{key}": record[key] for key in ("weights", "data", "known", "test")}
    tags |= {
        "digest.params": digests.of_json(settings),
        "digest.teacher": atomic.read_json(data / "teacher" / "network.json")["digest"],
        "digest.cache": _soft_labels(data)["fingerprint"],
    }
    try:
        lock = (parse(Path("dvc.lock").read_text(encoding="utf-8")) if Path("dvc.lock").exists() else None) or {}
    except ValueError:
        raise ValueError("dvc.lock: not YAML, as after a merge: resolve that, then run `dvc repro`") from None
    for name in STORED:
        # Under these names, DVC's cache and remotes keep what the stages wrote.
        outs = lock.get("stages", {}).get(name, {}).get("outs", [])
        tags |= {f"dvc.{out['path']}": out["md5"] for out in outs if "md5" in out}
    return tags | {key: value for key, value in tracking.git_tags().items() if key.startswith("git.")}


def _soft_labels(data: Path) -> dict[str, Any]:
    """What the cache of soft labels says of itself."""
    from pipeline.core import softlabels  # with torch, it takes seconds to load

    return softlabels.read_summary(data / "cache")
