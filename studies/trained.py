"""What the studies share: their command line, the images, and networks trained by the project's own engine.

A network that is trained is kept in PROJECT/.scratch/studies, named after its settings and images, with its figures of
each epoch: both studies take it from there, and a study that was stopped goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import narrow
from pipeline.core import atomic, devices, networks, params, resume, small_maps, weights
from pipeline.core.data import dataset
from pipeline.core.data.batches import CleanViews, Views, in_order, load
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.networks import Classifier
from pipeline.core.sections import Params, TrainingRecipe
from pipeline.core.train import engine, training
from pipeline.core.train.order import EVERY_REPLICA, TrainingOrder

HERE = Path(__file__).resolve().parent
BATCH = 128  # images a forward pass


@dataclass(frozen=True)
class Settings:
    """What the networks of a study have in common; the command line explains the fields."""

    resolution: int | None
    width: int
    images: int
    measured: int
    epochs: int
    batch_size: int
    lr: float
    precision: str


@dataclass(frozen=True)
class Data:
    """The images of a study.

    Attributes:
        rows: (N,) the samples to train on.
        labels: (rows of the image set,) int: the class of each, those withheld from the student too; -1: none.
        resolution: pixels a side.
        train, test: clean views (M, 3, R, R) uint8 of training and of test images, and their classes (M,).
    """

    images: ImageSet
    params: Params
    rows: np.ndarray
    labels: np.ndarray
    resolution: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def main(study: Callable[[argparse.Namespace, Settings, Data], None], parser: argparse.ArgumentParser) -> None:
    """Run a study as a program, in the project's folder; an error is one line.

    Args:
        study: given the arguments, the settings that all networks share, and the images.
        parser: with the study's own arguments.
    """
    group = parser.add_argument_group("what is trained")
    group.add_argument("--width", type=positive, default=16, help="channels of the first stage (default: 16)")
    group.add_argument("--images", type=positive, default=5000, help="training images, at most (default: 5000)")
    group.add_argument("--epochs", type=positive, default=12, help="passes over them (default: 12)")
    group.add_argument("--batch-size", type=positive, default=64, help="images a step (default: 64)")
    group.add_argument("--lr", type=float, default=0.1, help="highest learning rate of SGD (default: 0.1)")
    group.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    group.add_argument("--resolution", type=positive, help="pixels a side (default: views.resolution of the project)")
    parser.add_argument(
        "--measured",
        type=positive,
        default=1000,
        help="test images, and training images, to measure errors on, at most",
    )
    parser.add_argument("--project", type=Path, default=Path(), help="where `prepare` has run (default: here)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the plot and the table (default: studies/)")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = Path(sys.argv[0]).stem
    try:
        os.chdir(arguments.project)
        settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
        with resume.only_writer("studies"):
            study(arguments, settings, read(settings))
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: error: {' '.join(str(error).split())}")


def positive(text: str) -> int:
    """Read a whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def check(names: list[tuple[str, int]], settings: Settings) -> None:
    """Make sure that all networks can be built, before any is trained. Raises ValueError as narrow.build does."""
    for kind, depth in names:
        narrow.build(kind, depth, num_classes=2, width=settings.width)


def read(settings: Settings) -> Data:
    """Read the project's images and settings, and render the clean views.

    Raises:
        ValueError: the folder is no project, or its images are not prepared.
    """
    given = params.load()
    images = ImageSet(Path("data/prepare/images/known"))
    labels = images.known_labels
    rows = some(images, images.rows("labelled", "unlabelled"), settings.images)
    resolution = settings.resolution or given.views.resolution
    views = CleanViews(images, resolution, given.views.test_crop)

    def clean(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        batches = load(views, in_order(chosen, BATCH), 0, torch.device("cpu"))
        return torch.cat([batch.pixels for batch in batches]), torch.from_numpy(labels[chosen].astype(np.int64))

    train = clean(some(images, rows, settings.measured))
    test = clean(some(images, images.rows("test"), settings.measured))
    return Data(images, given, rows, labels, resolution, train, test)


def some(images: ImageSet, rows: np.ndarray, most: int) -> np.ndarray:
    """Choose at most so many rows, in an order that depends on the images alone."""
    ranked = sorted(rows.tolist(), key=lambda row: dataset.rank(0, "studies", int(images.ids[row])))
    return np.array(ranked[:most], np.int64)


@torch.inference_mode()
def error(classifier: torch.nn.Module, views: tuple[Tensor, Tensor]) -> float:
    """Give the share of clean views that a network, in eval mode, answers wrongly."""
    device = next(classifier.parameters()).device
    answers = [classifier(pixels.to(device)).argmax(1).cpu() for pixels in views[0].split(BATCH)]
    return (torch.cat(answers) != views[1]).float().mean().item()


def network(kind: str, depth: int, seed: int, settings: Settings, data: Data) -> tuple[Classifier, engine.History]:
    """Give a trained network in eval mode, and its loss and errors after each epoch; train it where that is not done.

    Raises:
        ValueError: there is no such network, a setting is wrong, or the loss is not finite any more.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(narrow.build(kind, depth, len(data.images.classes), settings.width))
    small_maps.replace_convolutions(classifier.network)  # torch's own write past their memory in narrow shortcuts
    name = f"{kind}-{depth}"
    recipe = recipe_of(settings)
    # what the papers had: crops and flips, no mixing, no further operations
    changes = {"mix_probability": 0.0, "randaugment_ops": 0, "resolution": data.resolution}
    spec = ViewSpec.of(seed, data.params.views.model_copy(update=changes))
    sizes = [settings.width, settings.images, settings.measured, data.params.views.test_crop]
    content = [name, seed, *sizes, recipe.model_dump(), data.images.digest, spec.digest]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    kept = resume.SCRATCH / "studies" / f"{name}-{digest[:16]}"
    checkpoints = kept.with_name(f"{kept.name}-run")
    if not kept.exists():
        run = engine.Run(
            what=name if seed == 0 else f"{name}, seed {seed}",
            classifier=classifier,
            part=classifier.network,
            views=Views(data.images, spec),
            order=TrainingOrder(data.rows, settings.batch_size, seed, EVERY_REPLICA),
            loss=training.labelled_loss(data.images, data.labels, smoothing=0.0),
            recipe=recipe,
            processes=devices.join(data.params.machine),
            validate=lambda trained: errors(trained, data),
            scratch=checkpoints,
            machine=data.params.machine,
        )
        run.train()
        with atomic.replacing_folder(kept) as folder:
            card = {"model": name, "classes": list(data.images.classes), "resolution": data.resolution}
            networks.save(folder, classifier, card)
            atomic.write_json(folder / "history.json", run.history)
    shutil.rmtree(checkpoints, ignore_errors=True)
    weights.load(classifier.network, kept / "weights.safetensors")
    classifier.to(devices.join(data.params.machine).device)
    return classifier.eval(), json.loads((kept / "history.json").read_text())


def errors(classifier: Classifier, data: Data) -> dict[str, float]:
    """Measure a network on training and on test images."""
    classifier.eval()
    return {"train_error": error(classifier, data.train), "test_error": error(classifier, data.test)}


def recipe_of(settings: Settings) -> TrainingRecipe:
    """The residual paper's optimizer and weight decay, with the engine's warm-up and cosine."""
    return TrainingRecipe(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        accumulate=1,
        optimizer="sgd",
        lr=settings.lr,
        warmup_epochs=min(1, settings.epochs / 4),
        weight_decay=0.0001,
        ema_decay=0.0,
        precision=settings.precision,
    )
