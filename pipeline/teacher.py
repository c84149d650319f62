"""The teacher: fitted here, or taken from timm or a checkpoint.

Reads data/prepare, and with `source: checkpoint` a file of weights. Writes data/teacher: weights.safetensors,
network.json, and with `source: fit` history.csv. Run: python -m pipeline.teacher
"""

import csv
from pathlib import Path

import models
from pipeline.core import atomic, devices, networks, stage, training
from pipeline.core.batches import Views
from pipeline.core.dataset import ImageSet
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.params import Params
from pipeline.core.views import ViewSpec


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    processes = devices.join(params.machine.device)
    if params.teacher.source == "fit":
        fit(params, images, processes)
    elif processes.first():
        take(params, images)


def fit(params: Params, images: ImageSet, processes: Processes) -> None:
    """Train the teacher on the labelled images, and on those whose labels are withheld from the student if allowed."""
    labels = images.known_labels if params.teacher.fit_on == "withheld" else images.labels
    rows = images.rows("labelled", "unlabelled")
    classifier = networks.build(params.teacher.model, len(images.classes), params.seed)
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
        identities={"data": images.digest, "views": spec.digest},
    )
    training.train(task, params, images, processes)


def take(params: Params, images: ImageSet) -> None:
    """Take a teacher as it is.

    Raises:
        ValueError: it was made for another number of classes, does not take the views' resolution, or its file is
            missing, unsafe or of another network.
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
        networks.load_weights(network, Path(wanted.checkpoint))
    classifier = Classifier(network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    networks.check_takes(classifier, wanted.model, params.views.resolution)
    card = {"model": wanted.model, "source": wanted.source, "classes": list(images.classes)}
    with stage.only_writer("teacher"), atomic.replacing_folder(Path("data/teacher")) as folder:
        networks.save(folder, classifier, {**card, "resolution": params.views.resolution})
        with (folder / "history.csv").open("w", newline="") as file:  # it was not trained here: no epoch
            csv.writer(file, lineterminator="\n").writerow(["epoch", "train_loss", "lr", "val_top1", "val_nll"])
    origin = wanted.checkpoint if wanted.source == "checkpoint" else "timm"
    order = ", ".join(images.classes[:10]) + (", ..." if classes > 10 else "")
    print(f"teacher: {wanted.model} from {origin}; its classes are taken to be, in this order, {order}")


if __name__ == "__main__":
    stage.main(run, __doc__, training=True)
