"""Stage evaluate: asks every network about the test images, and writes what came of it as numbers, plots and a report.

Reads data/prepare (the test images), data/{teacher,baseline,distill,finetune,fixres} (network and history), and
data/mine/summary.json and data/cache/cache.json for the report.
Writes data/evaluate: top1.json (what `dvc metrics` shows), metrics.json (every score), speed.json (the only file that
is not the same each time, and is in the report), per_class.csv, confusion.csv, reliability.csv, errors.csv,
predictions.parquet, report.html.
Run: python -m pipeline.evaluate
"""

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from scipy.sparse import csr_array

import models
from pipeline.core import atomic, devices, networks, resume, stage
from pipeline.core.data import batches
from pipeline.core.data.dataset import ImageSet
from pipeline.core.evaluation import metrics, report
from pipeline.core.networks import Classifier
from pipeline.core.progress import Progress
from pipeline.core.sections import Params

NETWORKS, STUDENT = tuple(report.TITLES), report.STUDENT
DATA = Path("data")
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


def run(params: Params) -> None:
    """Evaluate the networks and write data/evaluate.

    Raises:
        ValueError: there is no test image, or a network is missing or knows other classes than the data.
    """
    settings = params.evaluate
    with resume.only_writer("evaluate"):
        images = ImageSet(DATA / "prepare")
        rows = images.rows("test")
        if len(rows) == 0:
            raise ValueError(
                f"{DATA / 'prepare'}: no test image; set prepare.test, or prepare.test_share above 0, in params.yaml"
            )
        for name in NETWORKS:  # before the work, not in the middle of it
            check_classes(name, networks.read_card(DATA / name), images.classes)
        device = devices.join(params.machine).device
        results = {}
        with Progress(len(NETWORKS) * len(rows), "images", "evaluate") as progress:
            for name in NETWORKS:
                classifier, card = networks.load(DATA / name, device)
                dataset = batches.Views(images, None, card["resolution"], params.views.test_crop)
                loaded = batches.load(
                    dataset, batches.in_order(rows, settings.batch_size), params.machine.workers, device
                )
                progress.note = name
                results[name] = examine(
                    classifier, card, loaded, images.labels, settings.speed_seconds, name == STUDENT, progress.update
                )
        with atomic.replacing_folder(DATA / "evaluate") as folder:
            write(folder, images, rows, results, params, device)
    student = metrics.summary(results[STUDENT].answers, results["teacher"].answers, settings.bins)
    print(f"evaluate: student top-1 {student['top1']:.4f}; see {DATA / 'evaluate' / 'report.html'}", flush=True)


def check_classes(name: str, card: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Raise a ValueError if a network does not know the data's classes, in the data's order."""
    if tuple(card["classes"]) == tuple(classes):
        return
    known = f"{len(card['classes'])} classes" if len(card["classes"]) != len(classes) else "classes of other names"
    raise ValueError(
        f"{DATA / name}: the network knows {known}, but {DATA / 'prepare'} has {len(classes)} classes; "
        f"make it anew from the present data: dvc repro {name}"
    )


@torch.no_grad()
def examine(
    classifier: Classifier,
    card: dict[str, Any],
    loaded: Iterable[batches.Batch],
    labels: np.ndarray,
    seconds: float,
    keep_logits: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluated:
    """Ask a network about images, and measure it.

    Args:
        classifier: in eval mode.
        card: its network.json.
        loaded: the test views.
        labels: of all images, by row.
        seconds: how long to measure the speed for.
        keep_logits: whether to return them too: for a large test split they are large.
        advance: told how many images have just been answered.
    """
    answers, logits, first = [], [], None
    for batch in loaded:
        pixels = batch.pixels.to(classifier.mean.device)
        first = pixels if first is None else first
        said = classifier(pixels).float().cpu().numpy()  # (B, C)
        try:
            answers.append(metrics.answers(said, labels[batch.rows]))
        except ValueError as error:
            raise ValueError(f"{card['model']}: {error}; train it again with a smaller lr") from None
        logits += [said] if keep_logits else []
        advance(len(batch.rows))
    assert first is not None
    return Evaluated(
        card=card,
        answers=metrics.Answers(*map(np.concatenate, zip(*answers, strict=True))),
        logits=np.concatenate(logits) if keep_logits else None,
        parameters=sum(p.numel() for p in classifier.parameters()),
        macs=models.macs(classifier, card["resolution"]),
        images_per_second=speed(classifier, first, seconds),
    )


def speed(classifier: torch.nn.Module, pixels: torch.Tensor, seconds: float) -> float:
    """Measure images/s for batches like `pixels`, by the median batch; the first one is warm-up and does not count."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        start = time.perf_counter()
        classifier(pixels).sum().item()  # reading a number waits for the GPU
        taken.append(time.perf_counter() - start)
    return len(pixels) / float(np.median(taken[1:]))


def write(
    folder: Path,
    images: ImageSet,
    rows: np.ndarray,
    results: dict[str, Evaluated],
    params: Params,
    device: torch.device,
) -> None:
    """Write every file of data/evaluate to `folder`."""
    labels, classes = images.labels[rows], images.classes
    figures, fast = numbers(results, params.evaluate.bins), speeds(results, device, params.evaluate.batch_size)
    atomic.write_json(folder / "metrics.json", {**figures, "test_images": len(rows)})
    atomic.write_json(folder / "top1.json", accuracies(figures))
    atomic.write_json(folder / "speed.json", fast)
    matrices = {
        name: metrics.confusion(labels, result.answers.predicted, len(classes)) for name, result in results.items()
    }
    diagrams = {
        name: metrics.reliability(answers.probability, answers.rank == 0, params.evaluate.bins)
        for name, answers in ((name, result.answers) for name, result in results.items())
    }
    write_csv(folder / "per_class.csv", per_class(classes, matrices))
    write_csv(folder / "reliability.csv", reliability_rows(diagrams))
    student = results[STUDENT].answers
    named = ((classes[label], classes[said]) for label, said in zip(labels, student.predicted, strict=True))
    write_csv(folder / "confusion.csv", [{"actual": actual, "predicted": predicted} for actual, predicted in named])
    errors = wrong(images, rows, results)
    write_csv(folder / "errors.csv", errors, columns=ERROR_COLUMNS)
    pyarrow.parquet.write_table(predictions(images.ids[rows], labels, results), folder / "predictions.parquet")
    page = report.render(
        classes=classes,
        networks={
            name: {
                **figures[name],
                "model": result.card["model"],
                "digest": result.card["digest"],
                "kept": result.card.get("kept"),
            }
            | {"speed": fast["images_per_second"][name], "history": report.read_history(DATA / name / "history.csv")}
            for name, result in results.items()
        },
        matrices=matrices,
        diagrams=diagrams,
        paired=metrics.paired(student.rank == 0, results["baseline"].answers.rank == 0),
        errors=errors,
        thumbnails=[report.thumbnail(images.image(row)) for row in images.row_of(shown_ids(errors))],
        data=report.read_data(DATA, images),
        speed=fast,
        params=params.model_dump(mode="json", by_alias=True),
    )
    atomic.write_bytes(folder / "report.html", page.encode("utf-8", "replace"))


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


def predictions(ids: np.ndarray, labels: np.ndarray, results: dict[str, Evaluated]) -> pyarrow.Table:
    """Give predictions.parquet: what each network says to each test image, and the student's logits."""
    columns: dict[str, Any] = {"id": ids.astype(np.uint64), "label": labels.astype(np.int32)}
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


def write_csv(path: Path, rows: list[dict[str, Any]], columns: Iterable[str] = ()) -> None:
    """Write rows as a table; `columns` names them where there may be no row."""
    with path.open("w", newline="", encoding="utf-8", errors="replace") as handle:
        writer = csv.DictWriter(handle, list(columns) or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    stage.main(run, __doc__)
