"""What a recipe would cost: images, views, bytes and hours, worked out from settings alone.

Reads the recipe's file and params.yaml, no image and no network's weights. Hours are of the one machine or GPU that
the rate is of. A forward pass takes two operations a multiply-add, training three times that (the backward pass goes
to weights and to activations), fixres one pass, the last layer's own training aside. Operations/s come, in this
order, from --teacher-rate or --student-rate, from --tflops, from rates that the recipe names as measured, or from an
assumption of 28 TFLOP/s; the answer says which. A teacher is assumed to be fitted at the operations/s at which it
answers, unless the recipe has a `fit_rate`, and neither --teacher-rate nor --tflops is given.

28 TFLOP/s is what ResNet50_vd reaches where it trains at 1,078 images/s of 224 pixels: an RTX 3090 with mixed
precision and synthetic images, measured by timm's author (github.com/huggingface/pytorch-image-models,
results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv). Smaller images and batches reach less, newer GPUs more.

    python -m pipeline.plan imagenet_ssld
    python -m pipeline.plan imagenet_ssld --tflops 200
    python -m pipeline.plan cifar10 --teacher-rate 900 --student-rate 2500
"""

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, ValidationError
from torch import nn

import models
from pipeline import recipes
from pipeline.core import networks
from pipeline.core.network_checks import RESIZE_TEACHER, check_takes, embed_on_meta
from pipeline.core.running import commands, params_file
from pipeline.core.sections import Count, CountOrZero, Params, Positive, Section, nearest
from pipeline.core.softlabels.keys import KEY

TFLOPS = 28.0
SECONDS_AN_HOUR = 3600
THUMBNAIL = 32 * 32  # bytes
KEY_AND_COUNT = KEY.itemsize + 1  # bytes of a view in a shard, besides its record


class Counts(Section):
    """A recipe's `plan` section: how many images there are, and how fast they were handled."""

    labelled: Count
    unlabelled: CountOrZero
    withheld: CountOrZero
    val: CountOrZero
    test: CountOrZero
    classes: Annotated[int, Field(ge=2)]
    image_kb: Positive
    view_bytes: Positive
    teacher_rate: Positive | None = None  # images/s that the teacher answers, at its resolution
    fit_rate: Positive | None = None  # images/s that the teacher is fitted to, at the same
    student_rate: Positive | None = None  # images/s that the student trains on, at views.resolution
    measured_on: str = ""  # what these rates are of


class Rates(NamedTuple):
    """Speeds that are given as options, which go before the recipe's."""

    tflops: float | None = None  # 10^12 operations/s of both networks
    teacher: float | None = None  # images/s that it answers
    student: float | None = None  # images/s that it trains on


class Work(NamedTuple):
    """What a stage does."""

    stage: str
    what: str
    passes: int  # images
    steps: int  # of the optimizer; 0: none
    operations: float
    by: str  # whose rate holds: teacher, fit or student; the one for fitting a teacher is "fit"


class Speed(NamedTuple):
    """How fast a network runs."""

    operations: float  # a second
    where_from: str


@cache
def network(name: str, classes: int) -> nn.Module:
    """Build a network, without weights where its code is known to build it so."""
    with torch.device("cpu" if models.is_own(name) else "meta"):
        return models.build(name, classes)


def work(params: Params, counts: Counts) -> list[Work]:
    """List what the stages do that cost.

    Left out are evaluation and validation, next to nothing beside it, and mining's comparison of the pool with
    validation and test images, which `benchmarks/mining.py --time` measures.
    """
    teacher, student = (network(part.model, counts.classes) for part in (params.teacher, params.student))
    asks, answers = 2 * models.macs(teacher, params.teacher_sees), 2 * models.macs(student, params.views.resolution)
    larger, used = params.fixres.resolution, taught(params, counts)

    def train(stage: str, images: int, each: float, by: str = "student", what: str = "training") -> Work:
        recipe = getattr(params, stage)
        if getattr(recipe, "online", False):
            raise ValueError(f"{stage}.online is true: the teacher in the loop is not planned for")
        passes, batch = recipe.epochs * images, min(recipe.batch_size, images)
        return Work(stage, what, passes, recipe.epochs * (images // batch), passes * each, by)

    found = []
    if params.teacher.source == "fit":
        seen = counts.labelled + (counts.withheld if params.teacher.fit_on == "withheld" else 0)
        found.append(train("teacher", seen, 3 * asks, "fit"))
    scored, views = counts.unlabelled + counts.val + counts.test, soft_labels(params, counts)
    return [
        *found,
        Work("score", "teacher's answers", scored, 0, scored * asks, "teacher"),
        Work("cache", "teacher's answers", views, 0, views * asks, "teacher"),
        train("baseline", counts.labelled, 3 * answers),
        train("distill", used, 3 * answers),
        train("finetune", counts.labelled, 3 * answers),
        train("fixres", counts.labelled, 2 * models.macs(student, larger), what="of the last layer"),
    ]


def most_mined(params: Params, counts: Counts) -> int:
    """The most images that can be mined."""
    return min(counts.unlabelled, params.mine.per_class * counts.classes)


def taught(params: Params, counts: Counts) -> int:
    """The images with soft labels: the labelled and the mined ones."""
    return counts.labelled + most_mined(params, counts)


def soft_labels(params: Params, counts: Counts) -> int:
    """The views with soft labels."""
    return taught(params, counts) * params.cache.replicas


def speeds(params: Params, counts: Counts, given: Rates) -> dict[str, Speed]:
    """Give operations/s of the teacher asked and fitted and of the student, and where they come from.

    A teacher whose fitting has no rate of its own is fitted with as many operations/s as it is asked.
    """
    found, teacher = {}, (params.teacher.model, params.teacher_sees)
    student = (params.student.model, params.views.resolution)
    for role, (model, resolution), passes, verb, asked, measured in (
        ("teacher", teacher, 1, "answers", given.teacher, counts.teacher_rate),
        ("fit", teacher, 3, "is fitted to", None, counts.fit_rate),
        ("student", student, 3, "trains on", given.student, counts.student_rate),
    ):
        if role == "fit" and (given.teacher or given.tflops or not measured):
            found[role] = found["teacher"]
            continue
        if rate := asked or (None if given.tflops else measured):
            operations = rate * 2 * passes * models.macs(network(model, counts.classes), resolution)
            words = f"{model} {verb} {rate:,.0f} images/s of {resolution} pixels, {figure(operations / 1e12)} TFLOP/s "
            words += f"(--{role}-rate)" if asked else f"(measured: {counts.measured_on})"
        else:
            operations = 1e12 * (given.tflops or TFLOPS)
            origin = "--tflops" if given.tflops else "an assumption: no rate was measured; --help says where from"
            words = f"{model} reaches {figure(operations / 1e12)} TFLOP/s ({origin})"
        found[role] = Speed(operations, words)
    return found


def sizes(params: Params, counts: Counts) -> dict[str, float]:
    """Give the bytes of what stages write: name to bytes. Checkpoints are not counted."""
    teacher, student = (network(part.model, counts.classes) for part in (params.teacher, params.student))
    weights = [sum(p.numel() for p in it.parameters()) for it in (teacher, student)]
    scored = counts.unlabelled + counts.val + counts.test
    views = soft_labels(params, counts)
    index = KEY.itemsize + (4 if views < 2**32 else 8)  # a view's key and its position
    features = embed_on_meta(networks.Classifier(teacher), params.teacher_sees)[1].shape[1]
    each = 4 * counts.classes + 2 * features + THUMBNAIL  # logits float32, embeddings float16
    return {
        "data/prepare, the images once more": 1000 * counts.image_kb * (counts.labelled + scored),
        "data/score, logits, embeddings and thumbnails": scored * each,
        "data/cache, soft labels with keys and index": views * (counts.view_bytes + index),
        "networks: the teacher and four students": 4 * (weights[0] + 4 * weights[1]),
    }


def records(params: Params, counts: Counts) -> dict[str, float]:
    """Give the bytes of the same soft labels as records of several formats; keys and indices are not counted."""
    views = soft_labels(params, counts)
    kept = min(100, counts.classes)
    return {
        "this project's": views * (counts.view_bytes - KEY_AND_COUNT),
        f"TinyViT's, k = {kept}": views * (4 * kept + 4),
        f"FKD's marginal smoothing, k = {min(10, counts.classes)}": views * 4 * min(10, counts.classes),
        "all probabilities as float16": views * 2 * counts.classes,
    }


def figure(value: float) -> str:
    """Write a number with three digits that count, and no exponent."""
    rounded = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(rounded))) if rounded else 0
    return f"{rounded:,.{digits}f}"


def in_hours(value: float) -> str:
    """Write hours; what is less than a minute as so little."""
    return "< 0.01" if 0 < value < 0.01 else figure(value)


def report(params: Params, counts: Counts, given: Rates) -> str:
    """Say it all in lines for people."""
    tasks, speed = work(params, counts), speeds(params, counts, given)
    hours = {task.stage: task.operations / speed[task.by].operations / SECONDS_AN_HOUR for task in tasks}
    lines = [
        f"images   {counts.labelled:,} labelled, {counts.unlabelled:,} in the pool, of which at most "
        f"{most_mined(params, counts):,} are mined; {counts.val:,} validation, {counts.test:,} test; "
        f"{counts.classes:,} classes",
        f"views    {soft_labels(params, counts):,} with soft labels: {taught(params, counts):,} images, "
        f"{params.cache.replicas} of each",
        "",
        f"{'stage':<10}{'network':<24}{'':<19}{'images':>15}{'steps':>12}{'hours':>10}",
    ]
    for task in tasks:
        model = params.student.model if task.by == "student" else params.teacher.model
        steps = f"{task.steps:,}" if task.steps else ""
        lines.append(
            f"{task.stage:<10}{model:<24}{task.what:<19}{task.passes:>15,}{steps:>12}{in_hours(hours[task.stage]):>10}"
        )
    for role in ("teacher", "student"):
        total = sum(hours[task.stage] for task in tasks if (task.by == "student") == (role == "student"))
        lines.append(f"{role + ', in all':<80}{in_hours(total):>10}")
    size = sizes(params, counts)
    lines += ["", f"{'disk':<51}{'GB':>10}"]
    lines += [f"{name:<51}{figure(value / 1e9):>10}" for name, value in size.items()]
    lines += [f"{'in all, checkpoints not counted':<51}{figure(sum(size.values()) / 1e9):>10}"]
    lines += ["", f"{'soft labels, records alone, in several formats':<51}{'GB':>10}"]
    lines += [f"{name:<51}{figure(value / 1e9):>10}" for name, value in records(params, counts).items()]
    lines += ["(what each loses of the teacher's answer: python benchmarks/records.py)"]
    lines += ["", "Nothing was run. The hours are of one machine, kept busy, worked out from"]
    lines += dict.fromkeys(f"  {speed[task.by].where_from}" for task in tasks)
    lines += ["and multiply-adds: 2 operations each to answer, 6 to train, 2 for fixres. --help says more."]
    lines += ["The start of a stage, 10 to 20 s of each, comes on top, and so do mining, validation and evaluation."]
    return "\n".join(lines)


def read(name: str, root: Path = Path(".")) -> tuple[Params, Counts]:
    """Give a recipe's settings and counts.

    Raises:
        ValueError: no such recipe, or a wrong key or value in it.
    """
    params = params_file.check(root, recipes.changes(name, root))
    try:
        return params, Counts.model_validate(recipes.read(name, root).plan)
    except ValidationError as error:
        first = error.errors()[0]
        key, known = str(first["loc"][0]), list(Counts.model_fields)
        told = nearest(key, known) if first["type"] == "extra_forbidden" else f": {first['msg']}"
        raise ValueError(f"recipes/{name}.yaml: {recipes.PLAN}.{key}{told}") from None


def check_resolutions(params: Params, counts: Counts) -> None:
    """Make sure that the networks take what they are shown. Raises ValueError as `check_takes` does."""
    shown = params.views.resolution
    own = params.teacher.resolution
    teacher = networks.Classifier(network(params.teacher.model, counts.classes), resized_to=own)
    check_takes(teacher, params.teacher.model, shown, counts.classes, RESIZE_TEACHER)
    student = networks.Classifier(network(params.student.model, counts.classes))
    for resolution in {shown, params.fixres.resolution}:
        check_takes(student, params.student.model, resolution, counts.classes)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the recipe; `python -m pipeline.recipes` lists them")
    parser.add_argument("--tflops", type=float, help=f"10^12 operations/s of both networks (default: {TFLOPS:g})")
    parser.add_argument("--teacher-rate", type=float, metavar="N", help="images/s that the teacher answers, measured")
    parser.add_argument("--student-rate", type=float, metavar="N", help="images/s that the student trains on, measured")
    arguments = parser.parse_args()
    given = Rates(arguments.tflops, arguments.teacher_rate, arguments.student_rate)
    for option, rate in zip(("--tflops", "--teacher-rate", "--student-rate"), given, strict=True):
        if rate is not None and not 0 < rate < math.inf:
            parser.error(f"{option} is a number above 0")
    with commands.ending("plan"):
        params, counts = read(arguments.name)
        check_resolutions(params, counts)
        print(report(params, counts, given))


if __name__ == "__main__":
    main()
