"""What every training stage does around the one loop: open, resume, validate, track, and write the network.

A training stage writes to data/<stage>: the network (`weights.safetensors`, `network.json`) and `history.csv`, an
epoch a line; `images_seen` counts those of all epochs so far, an image anew each time. Its checkpoints are under
.scratch/<stage>, in a folder named after all that went in.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pipeline.core import atomic, devices, digests, networks, resume
from pipeline.core.data.batches import CLEAN_BATCH, Batch, CleanViews, Views, in_order, load
from pipeline.core.data.dataset import ImageSet
from pipeline.core.devices import Processes
from pipeline.core.network_checks import check_takes
from pipeline.core.networks import Classifier
from pipeline.core.results import tracking
from pipeline.core.sections import Params, TrainingRecipe
from pipeline.core.tables import as_csv
from pipeline.core.train import checkpoints, engine, losses
from pipeline.core.train.engine import Loss
from pipeline.core.train.order import EVERY_REPLICA, TrainingOrder

DATA = Path("data")
RUN_FILE = "mlflow-run"  # beside a checkpoint: names the MLflow run that a resumed training goes on in
WORTH_SAYING = 0.1  # share of the images that an epoch leaves out
GPU_PIXELS = 128 * 224**2  # of images that a GPU is asked about at once in validation


@dataclass(frozen=True)
class Task:
    """What distinguishes one training stage from another.

    Args:
        name: the stage's, and its recipe's in params.yaml.
        model: the network's name.
        classifier: with the weights to start from.
        rows: (N,) the samples to train on.
        views: what they look like; the network's test view has their resolution.
        loss: (network, batch) -> mean loss.
        identities: names and digests of what went in, besides the recipe, the images' set (of which there are two, all
            images and those with a label) and the weights to start from.
        part: the part of the network that is trained; None: all of it.
        replicas: stored views a sample; EVERY_REPLICA: a new one each epoch.
        before: the network that the stage started from, as the stage before left it; it is kept where the trained one
            is no better on the validation split. None: whatever comes out is kept.
        card: what the network's card says besides.
    """

    name: str
    model: str
    classifier: Classifier
    rows: np.ndarray
    views: Views | CleanViews
    loss: Loss
    identities: dict[str, str]
    part: nn.Module | None = None
    replicas: int = EVERY_REPLICA
    before: "Before | None" = None
    card: dict[str, Any] = field(default_factory=dict)


class Before(NamedTuple):
    """The network that a stage goes on from: the stage that made it, and its card."""

    stage: str
    classifier: Classifier
    card: dict[str, Any]

    @classmethod
    def of(cls, stage: str) -> Self:
        """Read a stage's network. Raises ValueError as `networks.load` does."""
        return cls(stage, *networks.load(DATA / stage))


def train(task: Task, params: Params, processes: Processes) -> None:
    """Train a stage's network, from its checkpoint where there is one, and write data/<stage>.

    Raises:
        ValueError: the network does not take the resolution, the one before knows other classes, or the loss is not
            finite any more.
    """
    images = task.views.images
    check_takes(task.classifier, task.model, task.views.resolution, len(images.classes))
    if task.before:
        networks.check_classes(DATA / task.before.stage, task.before.card, images.classes)
    recipe: TrainingRecipe = getattr(params, task.name)
    start = task.before.card["digest"] if task.before else networks.digest(task.classifier)
    identities = {"data": images.digest, **task.identities, "start": start}
    content = _content(task, recipe, identities, params)
    # Random weights may differ on another kind of processor: all take the first one's.
    devices.check_same(processes, {**content, "identities": identities | {"start": None}})
    folder = resume.SCRATCH / task.name / digests.of_json(content)[:16]
    if not processes.first():
        devices.wait_for_all(processes)  # until the first process has made sure that the checkpoint is this run's
        _run(task, recipe, params, processes, folder, lambda epoch, figures: None)
        return
    with resume.only_writer(task.name):
        if (folder / resume.ENDED).exists() and not checkpoints.files(folder):  # it is trained again, from its start
            (folder / RUN_FILE).unlink(missing_ok=True)
        resume.begin_run(folder)
        devices.wait_for_all(processes)
        described = {f"{task.name}.{key}": value for key, value in recipe.model_dump().items()}
        described |= {"seed": params.seed, "model": task.model, "images": len(task.rows)}
        with tracking.run(task.name, described, identities, folder / RUN_FILE) as tracked:
            history = _run(task, recipe, params, processes, folder, tracked.log).history
            kept = kept_before(task, history, params, processes.device)
            if kept:
                tracked.tag({f"kept.{key}": value for key, value in kept.items()})
        with atomic.replacing_folder(DATA / task.name) as out:
            if kept and task.before:
                networks.save(out, task.before.classifier, {**task.before.card, "kept": kept})
            else:
                card = {"model": task.model, "classes": list(images.classes), "resolution": task.views.resolution}
                networks.save(out, task.classifier, {**card, "kept": None, **task.card, "identities": identities})
            atomic.write_text(out / "history.csv", as_csv(history))
        checkpoints.keep_last(folder, 1)  # should DVC run the stage once more
        resume.end_run(folder)


def worth(figures: dict[str, float], resolution: int) -> dict[str, float]:
    """Give what tells which of two networks is better, first things first; more is better.

    Args:
        figures: a validator's.
        resolution: pixels a side, of which fewer cost less.
    """
    nll = figures["val_nll"]
    return {"top1": figures["val_top1"], "resolution": -resolution, "nll": -math.inf if math.isnan(nll) else -nll}


def kept_before(task: Task, history: engine.History, params: Params, device: torch.device) -> dict[str, Any] | None:
    """Say whether the network before is kept, since it is better on the validation split, as `worth` has it.

    Args:
        history: of the training; its last epoch says how good the trained network is.

    Returns:
        what the kept network's card says of that; None where the trained one is as good.
    """
    images, before = task.views.images, task.before
    if before is None or not len(images.rows("val")):
        return None
    side, side_before = task.views.resolution, before.card["resolution"]
    validate = validator(params, images, side_before, Processes(device))
    trained, had = worth(history[-1], side), worth(validate(before.classifier.to(device)), side_before)
    decides = next((key for key in trained if trained[key] != had[key]), None)
    if decides is None or trained[decides] > had[decides]:
        return None
    reason = {
        "top1": f"below the {had['top1']:.4f} of {before.stage}",
        "resolution": f"that of {before.stage}, which needs {side_before} pixels a side, not {side}",
        "nll": f"that of {before.stage}, whose NLL is lower",
    }
    stage = (before.card["kept"] or {}).get("stage", before.stage)  # whose network that is
    whose = before.stage if stage == before.stage else f"{before.stage}, which is {stage}'s,"
    said = f"{task.name}: validation top-1 {trained['top1']:.4f} is {reason[decides]}"
    print(f"{said}: the network of {whose} is kept")
    top1 = {"val_top1": round(had["top1"], 6), "instead_of": round(trained["top1"], 6)}
    return {"stage": stage, **top1, "because": decides}


def targets(images: ImageSet, labels: np.ndarray, smoothing: float) -> Callable[[Batch], torch.Tensor]:
    """Make the function that gives a batch's targets (B, C): smoothed hard labels, those of mixed views in proportion.

    Args:
        labels: (rows of the image set,) int: the class of each, -1 where there is none.
    """

    def wanted(batch: Batch) -> torch.Tensor:
        device = batch.pixels.device
        own, other = (devices.send(labels[rows].astype(np.int64), device) for rows in (batch.rows, batch.partner_rows))
        return losses.hard_targets(own, other, batch.shares, len(images.classes), smoothing)

    return wanted


def labelled_loss(images: ImageSet, labels: np.ndarray, smoothing: float) -> Loss:
    """Cross-entropy with hard labels; arguments as for `targets`."""
    wanted = targets(images, labels, smoothing)

    def loss(network: nn.Module, batch: Batch) -> torch.Tensor:
        logits = network(batch.pixels)
        # bfloat16 becomes float32; float64, of the golden losses, stays
        return losses.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted(batch))

    return loss


def batches_a_pass(device: torch.device, resolution: int) -> int:
    """How many batches of CLEAN_BATCH images a network is asked about at once in validation.

    On a GPU small images take longer to launch than to compute, so there are as many as have GPU_PIXELS together: a
    ResNet50_vd holds 1.5 GB of float32 for them, a ResNeXt101_32x16d_wsl 3.8 GB. It comes on top of what CUDA graphs of
    the training keep.
    """
    return 1 if device.type == "cpu" else max(1, GPU_PIXELS // (resolution**2 * CLEAN_BATCH))


def validator(
    params: Params, images: ImageSet, resolution: int, processes: Processes
) -> Callable[[Classifier], dict[str, float]]:
    """Make the function that gives top-1 and NLL on the validation split's clean views; processes share the batches."""
    rows, device = images.rows("val"), processes.device
    views = CleanViews(images, resolution, params.views.test_crop)
    batches = in_order(rows, CLEAN_BATCH)[processes.rank :: processes.world]
    rendered = load(views, batches, params.machine.workers, device, again=True)

    @torch.inference_mode()
    def validate(classifier: Classifier) -> dict[str, float]:
        if not len(rows):
            return {}
        classifier.eval()
        total = torch.zeros(2, dtype=torch.float64, device=device)  # right answers, and NLL
        coming, at_once = iter(rendered), batches_a_pass(device, classifier.resized_to or resolution)
        while some := list(itertools.islice(coming, at_once)):
            pixels = torch.cat([batch.pixels.to(device, non_blocking=True) for batch in some])
            logits = classifier(pixels).float()
            rows_of_pass = np.concatenate([batch.rows for batch in some])
            labels = devices.send(images.labels[rows_of_pass].astype(np.int64), device)
            total[0] += (logits.argmax(1) == labels).sum()
            total[1] += F.cross_entropy(logits, labels, reduction="sum")
        if processes.world > 1:
            dist.all_reduce(total)
        right, surprise = total.tolist()
        return {"val_top1": right / len(rows), "val_nll": surprise / len(rows)}

    return validate


def _run(
    task: Task,
    recipe: TrainingRecipe,
    params: Params,
    processes: Processes,
    folder: Path,
    on_epoch: Callable[[int, dict[str, float]], None],
) -> engine.Run:
    devices.warn_of_slow(task.name, f"{task.name}.precision", recipe.precision, processes)
    order = TrainingOrder(
        task.rows,
        recipe.batch_size,
        params.seed,
        task.replicas,
        processes.rank,
        processes.world,
        recipe.accumulate,
    )
    if order.batch_size < recipe.batch_size and processes.first():
        print(f"{task.name}: its batch_size, {recipe.batch_size:,}, is more than its {order.batch_size:,} images")
    left_out = len(task.rows) - order.steps_per_epoch * order.batch_size
    if left_out > WORTH_SAYING * len(task.rows) and processes.first():
        print(
            f"{task.name}: each epoch leaves out {left_out:,} of its {len(task.rows):,} images, not always the same: "
            f"they do not fill a batch of {order.batch_size:,}"
        )
    run = engine.Run(
        what=task.name,
        classifier=task.classifier,
        part=task.part or task.classifier.network,
        views=task.views,
        order=order,
        loss=task.loss,
        recipe=recipe,
        processes=processes,
        validate=validator(params, task.views.images, task.views.resolution, processes),
        scratch=folder,
        machine=params.machine,
        on_epoch=on_epoch,
    )
    run.train()
    return run


def _content(task: Task, recipe: TrainingRecipe, identities: dict[str, str], params: Params) -> dict[str, Any]:
    """Give all that a run's result depends on: it is named after that, and goes on from no other run's checkpoint."""
    return {
        "seed": params.seed,
        "model": task.model,
        "recipe": recipe.model_dump(),
        "identities": identities,
        "replicas": task.replicas,
        "test view": [task.views.resolution, params.views.test_crop],
        "packages": resume.package_versions(),
        "code": resume.code_digest(),
    }
