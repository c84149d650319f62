"""Distillation: the teacher's answers about a batch, from the cache or the teacher itself, as a loss; and training."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core import devices, digests, networks
from pipeline.core.data.batches import Batch, Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.sections import HARD, Distill, Params
from pipeline.core.sharing import images_at_once
from pipeline.core.softlabels import SoftLabels, dense, make_keys
from pipeline.core.teaching import TEACHER, answer, description, open_labels, warn_of_top_k
from pipeline.core.train import losses, training
from pipeline.core.train.engine import Loss

Teacher = Callable[[Batch, float], Tensor]  # (batch, temperature) -> probabilities (B, C) on the batch's device


def cached(labels: SoftLabels, images: ImageSet) -> Teacher:
    """The teacher as its stored answers."""

    def teach(batch: Batch, temperature: float) -> Tensor:
        keys = make_keys(images.ids[batch.rows], batch.replicas, images.ids[batch.partner_rows])
        return dense(labels.read(keys), labels.description.num_classes, temperature, batch.pixels.device)

    return teach


def online(classifier: Classifier, precision: str) -> Teacher:
    """The teacher itself, asked at every step."""

    def teach(batch: Batch, temperature: float) -> Tensor:
        return torch.softmax(answer(classifier, batch.pixels, precision) / temperature, dim=1)

    return teach


def distillation_loss(weights: dict[str, float], temperature: float, teacher: Teacher, images: ImageSet) -> Loss:
    """Make a weighted sum of losses against the teacher's answers and against hard labels.

    Hard labels are taken at T = 1 and not smoothed. Their term is a mean over all views of the batch, in which a view
    counts as much as the share of it that has a label: a view without label counts 0.

    Args:
        weights: of names in `losses.DISTILLATION`, and of `HARD`.
        temperature: T, divides the logits of both.
    """
    soft, hard = {name: weight for name, weight in weights.items() if name != HARD}, weights.get(HARD, 0.0)
    targets = training.targets(images, images.labels, smoothing=0.0)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        logits = network(batch.pixels).float()
        total = losses.weighted(soft, logits, teacher(batch, temperature), temperature)
        return total + hard * losses.cross_entropy(logits, targets(batch)) if hard else total

    return loss


def open_teacher(params: Params, images: ImageSet, asked_online: bool, device: torch.device) -> tuple[Teacher, str]:
    """Give the teacher, and a digest that names its answers.

    Raises:
        ValueError: the cache is not there, not whole, or of another teacher or other views; or the teacher knows other
            classes than the data.
    """
    classifier, card = networks.load(TEACHER, device) if asked_online else (None, networks.read_card(TEACHER))
    networks.check_classes(TEACHER, card, images.classes)
    wanted = description(params, card)
    teacher = online(classifier, params.teacher.precision) if classifier else cached(open_labels(wanted), images)
    return teacher, wanted.fingerprint


def check_compares(name: str, recipe: Distill, images: int, world: int) -> None:
    """Make sure that a loss that compares images with each other has two to compare.

    Raises:
        ValueError: each process computes its share of a batch image by image, or a batch cannot be shared out.
    """
    batch = min(recipe.batch_size, images)
    compares = any(recipe.loss.get(loss) for loss in ("dist", "dist_intra"))
    if compares and images_at_once(recipe.batch_size, recipe.accumulate, world, images) == 1:
        raise ValueError(
            f"{name}.loss: dist_intra compares the images that a process has at a time, which is one where {world} "
            f"processes share a batch of {batch}, each in {recipe.accumulate} parts: raise {name}.batch_size, or lower "
            f"{name}.accumulate or machine.processes"
        )


def train(
    name: Literal["distill", "finetune"],
    params: Params,
    images: ImageSet,
    processes: Processes,
    *,
    model: str,
    classifier: Classifier,
    rows: np.ndarray,
    before: training.Before | None = None,
) -> None:
    """Train a student on soft labels and write data/<name>.

    Args:
        name: the stage's, and its section's in `params`.
        model, classifier, rows, before: see `training.Task`.
    """
    spec, recipe = ViewSpec.of(params.seed, params.views), getattr(params, name)
    check_compares(name, recipe, len(rows), processes.world)
    if recipe.online:
        devices.warn_of_slow(name, "teacher.precision", params.teacher.precision, processes)
    elif processes.first():
        warn_of_top_k(name, params, len(images.classes), (name,))
    teacher, answers = open_teacher(params, images, recipe.online, processes.device)
    task = training.Task(
        name=name,
        model=model,
        classifier=classifier,
        rows=rows,
        views=Views(images, spec),
        loss=distillation_loss(recipe.loss, recipe.temperature, teacher, images),
        identities={"images": digests.of_array(np.sort(images.ids[rows])), "soft labels": answers},
        replicas=params.cache.replicas,
        before=before,
    )
    training.train(task, params, processes)
