"""Time to a test accuracy on a small CIFAR-10, same teacher, student and images: this project, timm and torchdistill.

this project   soft labels written once (counted apart and in), then distillation from them
timm           LogitDistillationTask, the teacher in the loop; timm's loader with random crops, flips, mixup and cutmix
torchdistill   DistillationBox with KDLoss, the teacher in the loop; torchvision's crops and flips, as its recipes have;
               `pip install --no-deps torchdistill`, else it is left out
All take the recipe's epochs, batches, AdamW, schedule and precision, and no hard labels: a tenth of the images has any.
They take turns, seed by seed, in one process; each epoch ends in a test, of which the time does not count. The peers
read the images from files, as their users do. DIR is what `benchmarks/ablations.py` fitted its teacher in: prepared
images and the teacher. Prints a Markdown table. Run: python benchmarks/time_to_accuracy.py DIR
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine
from seeds import cell
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.task import LogitDistillationTask

from pipeline import cache, recipes
from pipeline.core import networks, params, small_maps, teaching
from pipeline.core.data.batches import CleanViews, Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.labelling import Labelling
from pipeline.core.networks import Classifier
from pipeline.core.running import params_file
from pipeline.core.sections import Params
from pipeline.core.softlabels import SoftLabels, writing
from pipeline.core.train import distillation, engine, optimizers
from pipeline.core.train.order import TrainingOrder

try:
    from torchdistill.core.distillation import DistillationBox
except ImportError:
    DistillationBox = None

RECIPE, CPU = "cifar10_small", torch.device("cpu")


class Course(NamedTuple):
    """How a run went: seconds before its first step, and (seconds of training, test top-1) after each epoch."""

    before: float
    epochs: list[tuple[float, float]]


class Work(NamedTuple):
    """What all are given."""

    settings: Params
    images: ImageSet
    rows: np.ndarray  # (N,) to learn from
    folder: Path  # the same images as files, <class>/<id>.jpg
    teacher: Classifier
    card: dict
    test: Callable[[Classifier], float]  # top-1

    def student(self) -> Classifier:
        """The student before its first step."""
        return networks.build(self.settings.student.model, len(self.images.classes), self.settings.seed)

    def student_of_a_peer(self) -> Classifier:
        """The same first weights, with torch's convolutions."""
        student = self.student()
        small_maps.restore_convolutions(student)
        return student

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return self.settings.distill.epochs * (len(self.rows) // self.settings.distill.batch_size)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        recipe = self.settings.distill
        return optimizers.learning_rate(step, self.steps, recipe.warmup_epochs * self.steps / recipe.epochs, recipe.lr)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The recipe's precision."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.distill.precision == "bfloat16")


def ours(work: Work) -> Course:
    settings, images = work.settings, work.images
    spec = ViewSpec.of(settings.seed, settings.views)
    views, described = Views(images, spec), teaching.description(settings, work.card)
    labelling = Labelling(settings, Processes(CPU), work.teacher, described, views, work.rows)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        keys = cache.list_keys(labelling, Path("keys.npy"))
        cache.write_missing(labelling, keys, np.arange(len(keys)))
        writing.finish(cache.FOLDER, described, keys)
        before = time.perf_counter() - started
        answers = distillation.cached(SoftLabels(cache.FOLDER, described), images)
        recipe, course, paused = settings.distill, [], 0.0

        def test(classifier: Classifier) -> dict:
            nonlocal paused
            arrived = time.perf_counter()
            top1 = work.test(classifier)
            course.append((arrived - started - paused, top1))
            paused += time.perf_counter() - arrived
            return {}

        started = time.perf_counter()
        student = work.student()
        engine.Run(
            what="distill",
            classifier=student,
            part=student.network,
            views=views,
            order=TrainingOrder(work.rows, recipe.batch_size, settings.seed, settings.cache.replicas),
            loss=distillation.distillation_loss(recipe.loss, recipe.temperature, answers, images),
            recipe=recipe,
            processes=labelling.processes,
            validate=test,
            scratch=Path("scratch"),
            machine=settings.machine.model_copy(update={"checkpoint_seconds": 1e9}),
        ).train()
    return Course(before, course)


def timms(work: Work) -> Course:
    started, recipe, views = time.perf_counter(), work.settings.distill, work.settings.views
    student = work.student_of_a_peer()
    settings = student.network.pretrained_cfg  # what train.py normalises by
    mix = FastCollateMixup(
        views.mixup_alpha, views.cutmix_alpha, prob=views.mix_probability, label_smoothing=0.0, num_classes=10
    )
    loader = create_loader(
        create_dataset("", root=str(work.folder)),
        (3, views.resolution, views.resolution),
        recipe.batch_size,
        is_training=True,
        scale=tuple(views.crop_scale),
        ratio=tuple(views.crop_ratio),
        hflip=views.flip,
        color_jitter=0.0,
        interpolation="bicubic",
        mean=settings["mean"],
        std=settings["std"],
        num_workers=0,
        persistent_workers=False,
        collate_fn=mix,
        device=CPU,
    )
    network = student.network.to(memory_format=torch.channels_last)
    task = LogitDistillationTask(
        network, work.teacher.network, nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=0.0
    )
    task.train()
    optimizer = optimizers.optimizer_of(network, recipe)

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        pixels, targets = batch
        with work.autocast():
            loss = task(pixels.contiguous(memory_format=torch.channels_last), targets)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    tested = Classifier(network, settings["mean"], settings["std"])
    return in_loop(work, started, loader, step, optimizer, tested, task.train)


def torchdistills(work: Work) -> Course:
    started, recipe, views = time.perf_counter(), work.settings.distill, work.settings.views
    student = work.student_of_a_peer()
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(views.resolution, views.crop_scale, views.crop_ratio, v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(views.flip),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(networks.IMAGENET_MEAN, networks.IMAGENET_STD),
        ]
    )
    kd = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    box = DistillationBox(
        work.teacher.network,
        student.network,
        {"train": ImageFolder(work.folder, transform)},
        {
            "num_epochs": recipe.epochs,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": torch.utils.data.RandomSampler},
                "kwargs": {"batch_size": recipe.batch_size, "drop_last": True},
            },
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "AdamW", "kwargs": {"lr": recipe.lr, "weight_decay": recipe.weight_decay}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {
                    "sub_terms": {
                        "kd": {
                            "criterion": {"key": "KDLoss", "kwargs": {**kd, "temperature": 1.0, "alpha": 0.0}},
                            "weight": 1.0,
                        }
                    }
                },
            },
        },
        CPU,
        None,
        False,
        1,
    )
    student.network.to(memory_format=torch.channels_last)

    def step(batch: tuple[torch.Tensor, torch.Tensor, dict]) -> None:
        pixels, targets, extra = batch
        with work.autocast():
            loss = box.forward_process(pixels.contiguous(memory_format=torch.channels_last), targets, extra)
        box.post_forward_process(loss)

    def train() -> None:
        box.student_model.train()
        box.teacher_model.eval()

    train()
    tested = Classifier(student.network)  # it normalises as its training does, and not as timm says of the network
    return in_loop(work, started, box.train_data_loader, step, box.optimizer, tested, train)


def in_loop(
    work: Work,
    started: float,
    loader: Iterator,
    step: Callable,
    optimizer: torch.optim.Optimizer,
    tested: Classifier,
    train: Callable[[], object],
) -> Course:
    """Train with a peer's own step and loader, at the recipe's learning rates."""
    course, paused, number = [], 0.0, 0
    for _ in range(work.settings.distill.epochs):
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = work.rate(number)
            step(batch)
            number += 1
        arrived = time.perf_counter()
        course.append((arrived - started - paused, work.test(tested)))
        train()
        paused += time.perf_counter() - arrived
    return Course(0.0, course)


def tester(images: ImageSet, count: int, resolution: int) -> Callable[[Classifier], float]:
    """Make the function that gives top-1 on the first test images by id."""
    rows = images.rows("test")[:count]
    pixels = CleanViews(images, resolution, 1.0)[rows, np.zeros(len(rows), np.int64)].pixels
    labels = torch.from_numpy(images.labels[rows].astype(np.int64))

    def test(classifier: Classifier) -> float:
        classifier.eval()
        with torch.inference_mode():
            said = torch.cat([classifier(part).argmax(1) for part in pixels.split(250)])
        return (said == labels).float().mean().item()

    return test


def write_files(images: ImageSet, rows: np.ndarray, folder: Path) -> None:
    """Write the images as files; the folder's name is a class, as the peers ask for one, and is not learned from."""
    known = images.known_labels
    for row in rows.tolist():
        place = folder / str(known[row])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{images.ids[row]:016x}.jpg").write_bytes(images.encoded(row))


def reached(course: Course, target: float) -> float | None:
    """Seconds until a test top-1, those before the first step with them; None: never."""
    return next((course.before + seconds for seconds, top1 in course.epochs if top1 >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, help="holds data/prepare and data/teacher")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[0.6, 0.64, 0.66], help="test top-1 (default: 0.6 0.64 0.66)"
    )
    parser.add_argument("--epochs", type=int, help="of the schedule (default: the recipe's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--leave-out", nargs="+", default=[], choices=("timm", "torchdistill"), help="peers")
    parser.add_argument("--test", type=int, default=2000, help="test images (default: 2000)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changes = recipes.changes(RECIPE) | ({"distill.epochs": arguments.epochs} if arguments.epochs else {})
    data = params_file.changed(Path(), changes)
    images = ImageSet(arguments.project.resolve() / "data/prepare/images")
    teacher, card = networks.load(arguments.project / "data/teacher")
    rows = images.rows("labelled", "unlabelled")
    ways = {"this project": ours, "timm": timms} | ({"torchdistill": torchdistills} if DistillationBox else {})
    ways = {name: way for name, way in ways.items() if name not in arguments.leave_out}
    found: dict[str, list[Course]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_files(images, rows, Path(folder))
        for seed in arguments.seeds:
            settings = params.check(params.with_changes(data, {"seed": seed}))
            test = tester(images, arguments.test, settings.views.resolution)
            work = Work(settings, images, rows, Path(folder), teacher, card, test)
            for name, way in ways.items():
                torch.manual_seed(seed)
                (small_maps.replace_convolutions if way is ours else small_maps.restore_convolutions)(teacher)
                found[name].append(way(work))
                last = found[name][-1]
                print(
                    f"seed {seed}, {name}: {last.before:.1f} s before; {last.epochs[-1]}", file=sys.stderr, flush=True
                )
    print(
        f"{card['model']} to {settings.student.model}, {len(rows):,} images, {settings.distill.epochs} epochs, "
        f"{len(arguments.seeds)} seeds, {arguments.test:,} test images; {machine()}, one thread\n"
    )
    goals = "".join(f" to {target:.0%} top-1, s |" for target in arguments.targets)
    print(f"| | soft labels, s | and training{goals} all epochs, s | top-1 then |")
    print("|---" * (4 + len(arguments.targets)) + "|")
    for name, courses in found.items():
        words = [cell([course.before for course in courses]) if courses[0].before else "none"]
        for target in arguments.targets:
            times = [reached(course, target) for course in courses]
            missed = times.count(None)
            words += [f"missed by {missed}" if missed else cell([it for it in times if it])]
        words += [cell([course.before + course.epochs[-1][0] for course in courses])]
        words += [cell([course.epochs[-1][1] for course in courses])]
        print(f"| {name} | " + " | ".join(words) + " |")


if __name__ == "__main__":
    main()
