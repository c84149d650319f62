"""Stage evaluate: asks every network about the test images, and writes what came of it as numbers, plots and a report.

Reads data/prepare (the test images and the summary), data/{teacher,baseline,distill,finetune,fixres} (network and
history), and data/mine/summary.json and data/cache/cache.json for the report. Writes data/evaluate: top1.json (what
`dvc metrics` shows), metrics.json (every score), speed.json (measured, so that it and the report differ from run to
run), per_class.csv, confusion.csv, reliability.csv, errors.csv, near_copies.csv (test images and the labelled images
that show the same), predictions.parquet, report.html. Run: python -m pipeline.evaluate
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch

import models
from pipeline.core import atomic, devices, networks, resume, stage
from pipeline.core.data import batches
from pipeline.core.data.dataset import ImageSet, open_known
from pipeline.core.evaluation import metrics, near_copies, outcome, report
from pipeline.core.evaluation.outcome import NETWORKS, STUDENT
from pipeline.core.networks import Classifier
from pipeline.core.progress import Progress
from pipeline.core.sections import Params
from pipeline.core.tables import as_csv

DATA = Path("data")


def run(params: Params) -> None:
    """Evaluate the networks and write data/evaluate.

    Raises:
        ValueError: there is no test image, or a network is missing or knows other classes than the data.
    """
    settings = params.evaluate
    with resume.only_writer("evaluate"):
        images, prepared = open_known(DATA)
        rows = images.rows("test")
        if len(rows) == 0:
            raise ValueError(
                f"{DATA / 'prepare'}: no test image; set prepare.test, or prepare.test_share above 0, in params.yaml"
            )
        for name in NETWORKS:  # before the work, not in the middle of it
            networks.check_classes(DATA / name, networks.read_card(DATA / name), images.classes)
        device = devices.join(params.machine).device
        results = {}
        with Progress(len(NETWORKS) * len(rows), "images", "evaluate") as progress:
            for name in NETWORKS:
                classifier, card = networks.load(DATA / name, device)
                views = batches.CleanViews(images, card["resolution"], params.views.test_crop)
                said = batches.ask(classifier, views, rows, params.machine.workers, device, settings.batch_size)
                progress.note = name
                results[name] = examine(
                    classifier, card, said, images.labels, settings.speed_seconds, name == STUDENT, progress.update
                )
        pairs = near_copies.find(images, params.mine.copy_similarity, params.machine.workers, device)
        with atomic.replacing_folder(DATA / "evaluate") as folder:
            figures = write(folder, images, prepared, rows, results, pairs, params, device)
    if pairs:
        print(
            f"evaluate: warning: of the {len(rows):,} test images, {len(pairs):,} are near-copies of labelled images "
            f"(mine.copy_similarity: {params.mine.copy_similarity:g}), whose answers networks may have learned; the "
            "report has the top-1 on the others"
        )
    top1 = figures["student"]["top1"]
    print(f"evaluate: student top-1 {top1:.4f}; see {DATA / 'evaluate' / 'report.html'}", flush=True)


@torch.no_grad()
def examine(
    classifier: Classifier,
    card: dict[str, Any],
    said: Iterable[tuple[batches.Batch, torch.Tensor]],
    labels: np.ndarray,
    seconds: float,
    keep_logits: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> outcome.Evaluated:
    """Condense what a network says to images, and measure it.

    Args:
        classifier: in eval mode.
        card: its network.json.
        said: batches of test views, on the network's device, and its logits, as `batches.ask` gives them.
        labels: of all images, by row.
        seconds: how long to measure the speed for.
        keep_logits: whether to return them too: for a large test split they are large.
        advance: told how many images have just been answered.
    """
    answers, kept, first = [], [], None
    for batch, on_device in said:
        first = batch.pixels if first is None else first
        logits = on_device.cpu().numpy()  # (B, C)
        try:
            answers.append(metrics.answers(logits, labels[batch.rows]))
        except ValueError as error:
            raise ValueError(f"{card['model']}: {error}; train it again with a smaller lr") from None
        kept += [logits] if keep_logits else []
        advance(len(batch.rows))
    assert first is not None
    return outcome.Evaluated(
        card=card,
        answers=metrics.Answers(*map(np.concatenate, zip(*answers, strict=True))),
        logits=np.concatenate(kept) if keep_logits else None,
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
    prepared: dict[str, Any],
    rows: np.ndarray,
    results: dict[str, outcome.Evaluated],
    pairs: list[near_copies.Pair],
    params: Params,
    device: torch.device,
) -> dict[str, Any]:
    """Write every file of data/evaluate to `folder`; give what metrics.json holds.

    Args:
        images, prepared: as `open_known` gives them.
        rows: (N,) the test images.
        results: of each network.
        pairs: the test images that are near-copies of labelled images.
    """
    labels, classes = images.labels[rows], images.classes
    is_near_copy = np.isin(rows, [pair.test for pair in pairs])
    figures = outcome.numbers(results, params.evaluate.bins)
    fast = outcome.speeds(results, device, min(params.evaluate.batch_size, len(rows)))
    whole = {**figures, "test_images": len(rows), "near_copies": len(pairs)}
    atomic.write_json(folder / "metrics.json", whole)
    atomic.write_json(folder / "top1.json", outcome.accuracies(figures))
    atomic.write_json(folder / "speed.json", fast)
    matrices = {
        name: metrics.confusion(labels, result.answers.predicted, len(classes)) for name, result in results.items()
    }
    diagrams = {
        name: metrics.reliability(answers.probability, answers.rank == 0, params.evaluate.bins)
        for name, answers in ((name, result.answers) for name, result in results.items())
    }
    atomic.write_text(folder / "per_class.csv", as_csv(outcome.per_class(classes, matrices)))
    atomic.write_text(folder / "reliability.csv", as_csv(outcome.reliability_rows(diagrams)))
    student = results[STUDENT].answers
    named = [
        {"actual": classes[label], "predicted": classes[predicted]}
        for label, predicted in zip(labels, student.predicted, strict=True)
    ]
    atomic.write_text(folder / "confusion.csv", as_csv(named))
    errors = outcome.wrong(images, rows, results)
    atomic.write_text(folder / "errors.csv", as_csv(errors, outcome.ERROR_COLUMNS))
    shown = near_copies.table(pairs, images)
    atomic.write_text(folder / "near_copies.csv", as_csv(shown, near_copies.COLUMNS))
    said = outcome.predictions(images.ids[rows], labels, is_near_copy, results)
    pyarrow.parquet.write_table(said, folder / "predictions.parquet")
    page = report.render(
        classes=classes,
        networks={
            name: {
                **figures[name],
                "model": result.card["model"],
                "digest": result.card["digest"],
                "kept": result.card.get("kept"),
                "speed": fast["images_per_second"][name],
                "history": report.read_history(DATA / name / "history.csv"),
            }
            for name, result in results.items()
        },
        matrices=matrices,
        diagrams=diagrams,
        paired=metrics.paired(student.rank == 0, results["baseline"].answers.rank == 0),
        errors=errors,
        thumbnails=[report.thumbnail(images.image(row)) for row in images.row_of(outcome.shown_ids(errors))],
        near_copies=report.NearCopies(
            top1_without=outcome.top1(results, ~is_near_copy),
            pairs=shown,
            pictures=[
                (report.thumbnail(images.image(pair.test)), report.thumbnail(images.image(pair.labelled)))
                for pair in pairs[-report.MOST_NEAR_COPIES :]
            ],
        ),
        data=report.read_data(DATA, prepared),
        speed=fast,
        params=params.model_dump(mode="json", by_alias=True),
    )
    atomic.write_bytes(folder / "report.html", page.encode("utf-8", "replace"))
    return whole


if __name__ == "__main__":
    stage.main(run, __doc__)
