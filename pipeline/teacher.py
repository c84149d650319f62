"""The teacher: fitted here, or taken from timm or a checkpoint.

Reads data/prepare/images/known, and the file of weights that `teacher.checkpoint` or `teacher.init` names. Writes
data/teacher: weights.safetensors, network.json, and history.csv, a line an epoch where it was fitted.
Run: python -m pipeline.teacher
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

import models
from pipeline.core import atomic, devices, networks, resume, stage, weights
from pipeline.core.data.batches import Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.network_checks import RESIZE_TEACHER, check_takes
from pipeline.core.networks import Classifier
from pipeline.core.sections import Params
from pipeline.core.tables import as_csv
from pipeline.core.train import training

# Of the digits' views that it was fitted to a teacher got 1 % wrong, of others 2 %: it is asked about others.
OWN_SEEDS = 2**32  # added to the seed, which is less
ENOUGH_TO_TRY = 100  # validation images with which a teacher that guesses is told from one that does not
CHANCE = 0.01  # the probability that one that guesses passes


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    images = ImageSet(Path("data/prepare/images/known"))
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
    spec = ViewSpec.of(params.seed + OWN_SEEDS, params.views)
    task = training.Task(
        name="teacher",
        model=wanted.model,
        classifier=classifier,
        rows=rows[labels[rows] >= 0],
        views=Views(images, spec),
        loss=training.labelled_loss(images, labels, params.teacher.label_smoothing),
        identities={"views": spec.digest},
        card={"source": "fit"},
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
    check_takes(classifier, wanted.model, params.views.resolution, classes, RESIZE_TEACHER)
    tried = try_out(classifier.to(device), params, images)
    card = {"model": wanted.model, "source": wanted.source, "classes": list(images.classes)}
    with resume.only_writer("teacher"), atomic.replacing_folder(Path("data/teacher")) as folder:
        networks.save(folder, classifier, {**card, "resolution": params.views.resolution})
        columns = ("epoch", "images_seen", "train_loss", "lr", "val_top1", "val_nll")
        atomic.write_text(folder / "history.csv", as_csv([], columns))  # it was not trained here: no epoch
    origin = wanted.checkpoint if wanted.source == "checkpoint" else "timm"
    print(f"teacher: {wanted.model} from {origin}{tried}")


def try_out(classifier: Classifier, params: Params, images: ImageSet) -> str:
    """Say how good a teacher is that was made elsewhere, in validation top-1; with too few images, what must be true.

    Raises:
        ValueError: it guesses, so its classes stand in another order, or its pixels were normalised otherwise; some of
            its classes have changed places; or what it answers is not finite, or is probabilities.
    """
    validate = training.validator(params, images, params.views.resolution, Processes(classifier.mean.device))
    answers, alike = [], []  # of each pass: the likeliest classes, and whether its answers look like probabilities

    def listen(_: Classifier, asked: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        answers.append(logits.argmax(1).cpu().numpy())
        alike.append(bool((logits >= 0).all() and ((logits.float().sum(1) - 1).abs() < 1e-3).all()))

    listening = classifier.register_forward_hook(listen)
    found, rows, classes = validate(classifier), images.rows("val"), len(images.classes)
    listening.remove()
    said = np.concatenate(answers) if answers else np.empty(0, int)
    model, tried, top1 = params.teacher.model, len(rows), found.get("val_top1", 0.0)
    order = ", ".join(f"'{name}'" for name in images.classes[:10])
    order += ", ... (all are in data/prepare/images/classes.json)" if classes > 10 else ""
    if not math.isfinite(found.get("val_nll", 0.0)):
        raise ValueError(f"{model}: its answers to validation images are not finite")
    if alike and all(alike):
        raise ValueError(f"{model} answers with probabilities, not with logits: leave out the softmax at its end")
    right = round(tried * top1)
    # Of few images it is seen only where it does worse than one that guesses, and than one that is right half the time.
    worse = right < tried / classes and binom.cdf(right, tried, 0.5) < CHANCE
    enough = tried >= ENOUGH_TO_TRY
    if worse or (enough and right <= binom.isf(CHANCE, tried, 1 / classes)):
        raise ValueError(
            f"{model} guesses: validation top-1 {top1:.4f} of {tried:,} images of {classes} "
            f"classes. Its classes must be these, in this order: {order}; and pixels must be normalised as it was "
            "trained with (teacher.mean, teacher.std)"
        )
    if enough and (said == said[0]).all() and 0.5 ** (tried - right) < CHANCE:  # so, if it got half of those right
        raise ValueError(
            f"{model} guesses: to it, all {tried:,} validation images are '{images.classes[said[0]]}'. Its classes "
            f"must be these, in this order: {order}; and pixels must be normalised as it was trained with"
        )
    if others := swapped(images.labels[rows], said, images.classes):
        raise ValueError(
            f"{model} has classes in each other's place: {others}. Its classes must be these, in this order: {order}"
        )
    known = f": validation top-1 {top1:.4f}" if tried else ""
    if enough:
        return known
    return f"{known}; {tried} images are too few to see whether its classes are, as they must be, in order: {order}"


def swapped(labels: np.ndarray, answers: np.ndarray, classes: Sequence[str]) -> str:
    """Name the classes whose images are mostly answered as another class, in a cycle of such classes.

    Such cycles are those of the best one-to-one assignment of answers to classes (Kuhn, "The Hungarian method for the
    assignment problem"). Of a cycle's images that are answered as their class or as the next one, a sound teacher gets
    half right at least; CHANCE is shared out among all cycles of that length that could have been found.

    Args:
        labels, answers: numbers of classes, (N,).
        classes: their names.

    Returns: "" where no such cycle can be told from chance.
    """
    counts = np.zeros((len(classes), len(classes)), int)  # images of a class, answers
    np.add.at(counts, (labels, answers), 1)
    best, told, seen = linear_sum_assignment(counts, maximize=True)[1], [], set()
    for first in range(len(classes)):
        if first in seen:
            continue
        cycle = [first]
        while (following := int(best[cycle[-1]])) != first:
            cycle.append(following)
        seen |= {*cycle}
        own, other = counts[cycle, cycle], counts[cycle, best[cycle]]
        odds = binom.logsf(other.sum() - 1, (own + other).sum(), 0.5) + len(cycle) * math.log(len(classes))
        if (other > own).all() and odds < math.log(CHANCE):
            told += [
                f"{counts[at, to]} of {counts[at].sum()} images of '{classes[at]}' are to it '{classes[to]}'"
                for at, to in zip(cycle, best[cycle], strict=True)
            ]
    return "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if len(told) > 5 else "")


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
