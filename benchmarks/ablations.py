"""The recipe cifar10_small, whole and without one ingredient at a time, over seeds: how much each gives.

    python benchmarks/ablations.py cifar10.zip                      three seeds
    python benchmarks/ablations.py cifar10.zip --ablated-seeds 0    three of the whole and of half of it, else one
    python benchmarks/ablations.py cifar10.zip --finished           the table of the runs that are done
    python benchmarks/ablations.py cifar10.zip -S distill.lr=0.001  with that setting in all of them

The archive holds CIFAR-10 as train/<class>/<name> and test/<class>/<name>. Of each class the first 1,000 training
images by name are used, the next 100 are for validation, and the first 500 test images for test; they go to another
archive, in --folder. The teacher is fitted once, with all 10,000 labels, and is a checkpoint to all runs: seeds draw
anew which tenth of the labels the student knows, its first weights, and the views. What the teacher saw holds no test
image. With other settings of its own (-S teacher.precision=float32), or where the code that fits it has changed, it is
fitted anew only where its weights, data/weights/teacher/cifar10_small.safetensors, are moved away first.

Each run is one of the flow in a workspace of its own (see seeds.py): what is done is not done again. The gap is that of
the same seed's whole run, from the baseline to the teacher in test top-1; in each row, all else is as in the recipe.
"""

import argparse
import contextlib
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine
from seeds import changed_settings, known, run, spread, table

from pipeline import prepare, recipes, teacher
from pipeline.core import atomic, params
from pipeline.core.running import params_file
from pipeline.core.sections import Params

RECIPE, STUDENT = "cifar10_small", "fixres"
TRAIN, VAL, TEST = 1000, 100, 500  # images a class
ALL_SEEDS = ("whole", "half", "online")  # rows that are compared over all seeds, whatever --ablated-seeds says
WEIGHTS = Path("data/weights/teacher") / f"{RECIPE}.safetensors"


class Row(NamedTuple):
    """A row of the table: what is taken away, the changed settings, and the stage whose network is the student."""

    without: str
    changes: dict
    student: str = STUDENT


def rows(settings: Params) -> dict[str, Row]:
    """Give the runs and readings, by name."""
    used, labelled = TRAIN, settings.prepare.labels_per_class
    more = used // labelled
    half = {"cache.replicas": settings.cache.replicas // 2, "distill.epochs": settings.distill.epochs // 2}
    return {
        "whole": Row("nothing: the whole recipe", {}),
        "unlabelled": Row(
            "unlabelled images: labelled ones alone, as many views and steps",
            {
                "mine.min_score": 1.0,
                "cache.replicas": settings.cache.replicas * more,
                "distill.epochs": settings.distill.epochs * more,
            },
        ),
        "views": Row("views: one of each image, again and again", {"cache.replicas": 1}),
        "loss": Row("SSLD's loss: KL divergence", {"distill.loss": "kl", "finetune.loss": "kl"}),
        "mixup": Row("mixing", {"views.mix_probability": 0.0}),
        "half": Row("half of the views, and of the time", half),
        "online": Row(
            "the same, and the cache: the teacher at every step, on the same views",
            half | {"distill.online": True, "finetune.online": True},
        ),
        "fixres": Row("the larger resolution", {}, "finetune"),
        "finetune": Row("fine-tuning and the larger resolution", {}, "distill"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="CIFAR-10 as a .zip of images, <split>/<class>/<name>")
    parser.add_argument("--folder", type=Path, default=Path(".scratch/ablations"), help="for the smaller archive")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--ablated-seeds", type=int, nargs="*", help="of the other rows (default: the same)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="run these alone: whole, half, unlabelled, ...")
    parser.add_argument("-S", "--set-param", metavar="KEY=VALUE", action="append", default=[], help="a changed setting")
    parser.add_argument("--finished", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    small = arguments.folder.resolve() / f"{RECIPE}.zip"
    if not small.exists() and not arguments.finished:
        write_subset(arguments.archive, small)
    changes = recipes.changes(RECIPE) | {"prepare.labelled_root": str(small), "prepare.unlabelled_root": str(small)}
    changes |= changed_settings(arguments.set_param)
    settings = params.check(params_file.changed(Path(), changes))
    if not WEIGHTS.exists() and not arguments.finished:
        fit_teacher(settings, arguments.folder / "teacher")
    changes |= {"teacher.source": "checkpoint", "teacher.checkpoint": str(WEIGHTS)}
    others = arguments.seeds if arguments.ablated_seeds is None else arguments.ablated_seeds
    found: dict[str, dict[int, dict]] = {}
    for name, row in rows(settings).items():
        look = arguments.finished or (arguments.only and name not in arguments.only)
        for seed in arguments.seeds if look or name in ALL_SEEDS or not row.changes else others:
            wanted = changes | row.changes  # without registering: what lacks an ingredient is no candidate
            score = known(seed, wanted) if look else run(seed, wanted, "--stages", "evaluate")
            if score:
                found.setdefault(name, {})[seed] = score
    if "whole" not in found:
        sys.exit("ablations: no seed of the whole recipe is done, with which all else is compared; leave out --only")
    print(f"{settings.teacher.model} to {settings.student.model}; {machine()}\n")
    print(table(list(found["whole"].values())) + "\n")
    print(ablations(rows(settings), found))
    if "half" in found and "online" in found:
        print("\n" + difference(found["half"], found["online"]))


def ablations(rows: dict[str, Row], found: dict[str, dict[int, dict]]) -> str:
    """Write a row a run: mean and spread of top-1 over seeds, and the share of the gap that was recovered.

    Args:
        rows: what was run, by name.
        found: name to seed to metrics.
    """
    lines = ["| without | seeds | distilled | student | of the gap | the whole recipe, same seeds |", "|---" * 6 + "|"]
    for name, row in rows.items():
        scores = found.get(name, {})
        shared = [seed for seed in scores if seed in found["whole"]]
        if not shared:
            continue
        tops = [[scores[seed][stage]["top1"] for seed in shared] for stage in ("distill", row.student)]
        shares = [
            [recovered(found["whole"][seed], of[seed][stage]["top1"]) for seed in shared]
            for of, stage in ((scores, row.student), (found["whole"], STUDENT))
        ]
        cells = [*(over_seeds(values, ".4f") for values in tops), *(over_seeds(values, ".0%") for values in shares)]
        lines.append(f"| {row.without} | {len(shared)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recovered(whole: dict, top1: float) -> float:
    """The share of the gap from baseline to teacher that a student's top-1 makes up for."""
    baseline, best = whole["baseline"]["top1"], whole["teacher"]["top1"]
    return (top1 - baseline) / (best - baseline)


def difference(cached: dict[int, dict], online: dict[int, dict]) -> str:
    """Say how far the student of the stored answers is from that of the teacher in the loop, seed by seed."""
    seeds = [seed for seed in cached if seed in online]
    apart = [cached[seed][STUDENT]["top1"] - online[seed][STUDENT]["top1"] for seed in seeds]
    each = ", ".join(f"{value:+.4f}" for value in apart)
    return (
        f"cached less online, top-1 of the student, seed by seed: {each}; mean {np.mean(apart):+.4f}; spread over "
        f"seeds {spread([cached[seed][STUDENT]['top1'] for seed in seeds]):.4f} cached, "
        f"{spread([online[seed][STUDENT]['top1'] for seed in seeds]):.4f} online"
    )


def over_seeds(values: list[float], form: str) -> str:
    """Mean and spread; of one seed, its value."""
    return f"{np.mean(values):{form}}" + (f" ± {spread(values):{form}}" if len(values) > 1 else "")


def write_subset(archive: Path, small: Path) -> None:
    """Write the images that are used into an archive, as train, val and test."""
    small.parent.mkdir(parents=True, exist_ok=True)
    count: dict[tuple[str, str], int] = {}
    with zipfile.ZipFile(archive) as whole, atomic.replacing(small) as beside, zipfile.ZipFile(beside, "w") as out:
        for name in sorted(name for name in whole.namelist() if not name.endswith("/")):
            split, label, file = name.split("/")
            place = count[split, label] = count.get((split, label), 0) + 1
            if split == "train":
                split = "train" if place <= TRAIN else "val"
            if place <= (TEST if split == "test" else TRAIN + VAL):
                out.writestr(f"{split}/{label}/{file}", whole.read(name))


def fit_teacher(settings: Params, folder: Path) -> None:
    """Fit the teacher with all labels; its weights go to data/weights/teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}  # it is no run of the project's
    with contextlib.chdir(folder), mock.patch.dict(os.environ, own):
        if not Path("data/prepare").exists():
            prepare.run(settings)
        teacher.run(settings)
    with atomic.replacing(WEIGHTS) as beside:
        shutil.copyfile(folder / "data/teacher/weights.safetensors", beside)


if __name__ == "__main__":
    main()
