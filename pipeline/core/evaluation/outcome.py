"""What networks' answers to the test images become: numbers and rows, as data/evaluate's files hold them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from scipy.sparse import csr_array

from pipeline.core.data.dataset import ImageSet
from pipeline.core.evaluation import metrics, report

NETWORKS, STUDENT = tuple(report.TITLES), report.STUDENT
DIGITS = 6  # decimals that are kept of a number: the last bits of a float depend on the machine
MOST_THUMBNAILS = 24


@dataclass(frozen=True)
class Evaluated:
    """A network's answers to N test images, and what it costs to ask."""

    card: dict[str, Any]
    answers: metrics.Answers
    logits: np.ndarray | None  # (N, C) float32, of the student only
    parameters: int
    macs: int
    images_per_second: float


def numbers(results: dict[str, Evaluated], bins: int) -> dict[str, dict[str, float | int]]:
    """Give what metrics.json says of networks: a dict of numbers each, and `student`, which is the last stage's."""
    figures = {}
    for name, result in results.items():
        found = metrics.summary(result.answers, results["teacher"].answers, bins)
        figures[name] = {key: round(value, DIGITS) for key, value in found.items()} | {
            "parameters": result.parameters,
            "macs": result.macs,
            "resolution": result.card.get("resized_to") or result.card["resolution"],
        }
    return {**figures, "student": figures[STUDENT]}


def accuracies(figures: dict[str, dict[str, float | int]]) -> dict[str, float]:
    """Give top1.json's content: each network's top-1, and the share of the gap that was closed, where there is one."""
    top1 = {name: figures[name]["top1"] for name in NETWORKS}
    gap = metrics.gap_recovered(top1[STUDENT], top1["baseline"], top1["teacher"])
    return top1 if gap is None else {**top1, "gap_recovered": round(gap, DIGITS)}


def speeds(results: dict[str, Evaluated], device: torch.device, batch_size: int) -> dict[str, Any]:
    """Give speed.json's content; what is the same network at the same resolution has one speed, its highest."""
    kinds = {
        name: (one.card["model"], one.card["resolution"], one.card.get("resized_to")) for name, one in results.items()
    }
    highest: dict[tuple, float] = {}
    for name, one in results.items():  # whatever else the machine does only slows it
        highest[kinds[name]] = max(one.images_per_second, highest.get(kinds[name], 0.0))
    images_per_second = {name: round(highest[kind], 1) for name, kind in kinds.items()}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "images_per_second": {**images_per_second, "student": images_per_second[STUDENT]},
    }


def per_class(classes: tuple[str, ...], matrices: dict[str, csr_array]) -> list[dict[str, Any]]:
    """Give per_class.csv's rows: each class' test images and each network's accuracy on them."""
    accuracy = {name: metrics.class_accuracy(matrix) for name, matrix in matrices.items()}
    images = matrices[STUDENT].sum(axis=1)
    return [
        {"class": name, "images": int(images[label])}
        | {network: tidy(values[label]) for network, values in accuracy.items()}
        for label, name in enumerate(classes)
    ]


def reliability_rows(diagrams: dict[str, metrics.Reliability]) -> list[dict[str, Any]]:
    """Give reliability.csv's rows: a row for each network's bin that is not empty."""
    return [
        {"network": name, "bin": at, "confidence": tidy(confidence), "accuracy": tidy(accuracy), "count": int(count)}
        for name, diagram in diagrams.items()
        for at, (confidence, accuracy, count) in enumerate(zip(*diagram, strict=True))
        if count
    ]


ERROR_COLUMNS = ("id", "source", "actual", "student", "student_probability", "teacher", "teacher_probability")


def wrong(images: ImageSet, rows: np.ndarray, results: dict[str, Evaluated]) -> list[dict[str, Any]]:
    """Give errors.csv's rows: the test images that the student answers wrong, the surest wrong answer first."""
    answers = {"student": results[STUDENT].answers, "teacher": results["teacher"].answers}
    places = np.flatnonzero(answers["student"].rank > 0)
    order = np.lexsort((images.ids[rows[places]], -answers["student"].probability[places].round(DIGITS)))
    return [
        {
            "id": format(int(images.ids[rows[at]]), "016x"),
            "source": images.source(rows[at]),
            "actual": images.classes[images.labels[rows[at]]],
        }
        | {name: images.classes[said.predicted[at]] for name, said in answers.items()}
        | {f"{name}_probability": tidy(said.probability[at]) for name, said in answers.items()}
        for at in places[order]
    ]


def shown_ids(errors: list[dict[str, Any]]) -> np.ndarray:
    """Give the ids of the errors that the report shows a picture of."""
    return np.array([int(error["id"], 16) for error in errors[:MOST_THUMBNAILS]], np.uint64)


def top1(results: dict[str, Evaluated], among: np.ndarray) -> dict[str, float | None]:
    """Give each network's top-1 on some of the N test images alone, None where these are none.

    Args:
        among: (N,) bool.
    """
    right = {name: one.answers.rank[among] == 0 for name, one in results.items()}
    return {name: float(each.mean()) if len(each) else None for name, each in right.items()}


def predictions(
    ids: np.ndarray, labels: np.ndarray, near_copy: np.ndarray, results: dict[str, Evaluated]
) -> pyarrow.Table:
    """Give predictions.parquet: what each network says to each test image, and the student's logits.

    Args:
        ids, labels: (N,) of the test images.
        near_copy: (N,) bool, whether it is a near-copy of a labelled image.
    """
    columns: dict[str, Any] = {"id": ids.astype(np.uint64), "label": labels.astype(np.int32), "near_copy": near_copy}
    for name, result in results.items():
        columns[name] = result.answers.predicted.astype(np.int32)
        columns[f"{name}_probability"] = result.answers.probability.astype(np.float32)
    logits = results[STUDENT].logits
    assert logits is not None
    columns["student_logits"] = pyarrow.FixedSizeListArray.from_arrays(logits.reshape(-1), logits.shape[1])
    return pyarrow.table(columns)


def tidy(value: float) -> float | None:
    """Round for a table; nothing (an empty cell) for a value that is not there."""
    return None if np.isnan(value) else round(float(value), DIGITS)
