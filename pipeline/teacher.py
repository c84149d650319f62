"""The teacher: fitted here, or taken from timm or a checkpoint.

Reads data/prepare, and with `source: checkpoint` a file of weights. Writes data/teacher: weights.safetensors,
network.json, and history.csv, a line an epoch where it was fitted. Run: python -m pipeline.teacher
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

import models
from pipeline.core import atomic, devices, networks, stage, training, weights
from pipeline.core.batches import Views
from pipeline.core.dataset import ImageSet
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.sections import Params
from pipeline.core.views import ViewSpec

ENOUGH_TO_TRY = 100  # validation images with which a teacher that guesses is told from one that does not
CHANCE = 0.01  # the probability that one that guesses passes


def run(params: Params) -> None:
    images = ImageSet(Path("data/prepare"))
    processes = devices.join(params.machine)
    if params.teacher.source == "fit":
        fit(params, images, processes)
    elif processes.first():
        take(params, images, processes.device)


def fit(params: Params, images: ImageSet, processes: Processes) -> None:
    """Train the teacher on the labelled images, and on those whose labels are withheld from the student if allowed."""
    labels = images.known_labels if params.teacher.fit_on == "withheld" else images.labels
    rows = images.rows("labelled", "unlabelled")
    wanted = params.teacher
    classifier = networks.build(wanted.model, len(images.classes), params.seed, wanted.init, wanted.resolution)
    spec = ViewSpec.of(params.seed, params.views)
    task = training.Task(
        name="teacher",
        recipe=params.teacher,
        classifier=classifier,
        part=classifier.network,
        rows=rows[labels[rows] >= 0],
        views=Views(images, spec),
        loss=training.labelled_loss(images, labels, params.teacher.label_smoothing),
        resolution=params.views.resolution,
        card={"model": params.teacher.model, "source": "fit"},
        identities={"data": images.digest, "views": spec.digest, "start": networks.digest(classifier)},
    )
    training.train(task, params, processes)


def take(params: Params, images: ImageSet, device: torch.device) -> None:
    """Take a teacher as it is, and try it on the validation split.

    Raises:
        ValueError: it was made for another number of classes, does not take the views' resolution, guesses, or its file
            is missing, unsafe or of another network.
    """
    wanted, classes = params.teacher, len(images.classes)
    if wanted.source == "timm":
        network = models.build(wanted.model, num_classes=None, pretrained=True)
        if network.num_classes != classes:
            raise ValueError(
                f"teacher.model {wanted.model}: timm's weights know {network.num_classes} classes, the data has "
                f"{classes}: take a model made for these classes, or fit one here (teacher.source: fit)"
            )
    else:
        network = models.build(wanted.model, num_classes=classes)
        weights.load(network, Path(wanted.checkpoint), (wanted.model, classes))
    listed = networks.normalisation(network) or (None, None)
    mean, std = wanted.mean or listed[0], wanted.std or listed[1]
    if mean is None or std is None:
        raise ValueError(f"{wanted.model} does not say how its pixels are normalised: set teacher.mean and teacher.std")
    classifier = Classifier(network, mean, std, wanted.resolution)
    networks.check_takes(classifier, wanted.model, params.views.resolution, classes, networks.RESIZE_TEACHER)
    tried = try_out(classifier.to(device), params, images)
    card = {"model": wanted.model, "source": wanted.source, "classes": list(images.classes)}
    with stage.only_writer("teacher"), atomic.replacing_folder(Path("data/teacher")) as folder:
        networks.save(folder, classifier, {**card, "resolution": params.views.resolution})
        with (folder / "history.csv").open("w", newline="") as file:  # it was not trained here: no epoch
            csv.writer(file, lineterminator="\n").writerow(["epoch", "train_loss", "lr", "val_top1", "val_nll"])
    origin = wanted.checkpoint if wanted.source == "checkpoint" else "timm"
    print(f"teacher: {wanted.model} from {origin}{tried}")


def try_out(classifier: Classifier, params: Params, images: ImageSet) -> str:
    """Say how good a teacher is that was made elsewhere, in validation top-1; with too few images, what must be true.

    Raises:
        ValueError: it guesses, so its classes stand in another order, or its pixels were normalised otherwise; some of
            its classes have changed places; or what it answers is not finite, or is probabilities.
    """
    validate = training.validator(params, images, params.views.resolution, Processes(classifier.mean.device))
    passes: list[torch.Tensor] = []
    listening = classifier.register_forward_hook(lambda _, asked, logits: passes.append(logits.float().cpu()))
    found, rows, classes = validate(classifier), images.rows("val"), len(images.classes)
    listening.remove()
    order = ", ".join(f"'{name}'" for name in images.classes[:10])
    order += ", ... (all are in data/prepare/classes.json)" if classes > 10 else ""
    tried, top1 = len(rows), found.get("val_top1", 0.0)
    if not math.isfinite(found.get("val_nll", 0.0)):
        raise ValueError(f"{params.teacher.model}: its answers to validation images are not finite")
    if passes:
        check_answers(params.teacher.model, torch.cat(passes), images.labels[rows], images.classes, order)
    right = round(tried * top1)
    # Of few images it is seen only where it does worse than one that guesses, and than one that is right half the time.
    worse = right < tried / classes and binom.cdf(right, tried, 0.5) < CHANCE
    if tried < ENOUGH_TO_TRY and not worse:
        known = f": validation top-1 {top1:.4f}" if tried else ""
        return f"{known}; {tried} images are too few to see whether its classes are, as they must be, in order: {order}"
    if worse or right <= binom.isf(CHANCE, tried, 1 / classes):
        raise ValueError(
            f"{params.teacher.model} guesses: validation top-1 {top1:.4f} of {tried:,} images of {classes} "
            f"classes. Its classes must be these, in this order: {order}; and pixels must be normalised as it was "
            "trained with (teacher.mean, teacher.std)"
        )
    return f": validation top-1 {top1:.4f}"


def check_answers(model: str, logits: torch.Tensor, labels: np.ndarray, classes: Sequence[str], order: str) -> None:
    """Make sure that answers to validation images are logits of these classes.

    Args:
        model, order: for messages.
        logits: (N, C).
        labels: (N,).

    Raises:
        ValueError: they are probabilities, or some classes have changed places.
    """
    if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-3:
        raise ValueError(f"{model} answers with probabilities, not with logits: leave out the softmax at its end")
    if others := swapped(labels, logits.argmax(1).numpy(), classes):
        raise ValueError(
            f"{model} has classes in each other's place: {others}. Its classes must be these, in this order: {order}"
        )


def swapped(labels: np.ndarray, answers: np.ndarray, classes: Sequence[str]) -> str:
    """Name the classes whose images are mostly answered as another's, and that one's as theirs or as a third's.

    The best one-to-one assignment of answers to classes (Kuhn, "The Hungarian method for the assignment problem") is
    compared with the one that should be: of the images that the two tell apart, a sound teacher gets half right.

    Args:
        labels, answers: numbers of classes, (N,).
        classes: their names.

    Returns: "" where no such class can be told from chance.
    """
    counts = np.zeros((len(classes), len(classes)), int)  # images of a class, answers
    np.add.at(counts, (labels, answers), 1)
    own, best = np.arange(len(classes)), linear_sum_assignment(counts, maximize=True)[1]
    moved = np.flatnonzero((best != own) & (counts[own, best] > counts[own, own]))
    right, wrong = counts[moved, moved].sum(), counts[moved, best[moved]].sum()
    if binom.sf(wrong - 1, right + wrong, 0.5) * len(classes) ** 2 > CHANCE:  # so many pairs could have been found
        return ""
    told = [
        f"{counts[at, best[at]]} of {counts[at].sum()} images of '{classes[at]}' are to it '{classes[best[at]]}'"
        for at in moved
    ]
    return "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if len(told) > 5 else "")


if __name__ == "__main__":
    stage.main(run, __doc__, training=True)
