"""A small prepared data set for tests that need one: coloured shapes in four classes, made on the spot."""

import io
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from pipeline import prepare
from pipeline.core import params
from pipeline.core.data.dataset import ImageSet
from pipeline.core.sections import Params

CLASSES = ("circle", "cross", "line", "square")
ROOT = Path(__file__).parent.parent


def shape(name: str, seed: int, side: int = 16) -> Image.Image:
    """Draw one image of a class, anywhere, in any colour, on noise."""
    random = np.random.default_rng([CLASSES.index(name), seed])
    image = Image.fromarray(random.integers(0, 60, (side, side, 3), dtype=np.uint8))
    draw, colour = ImageDraw.Draw(image), tuple(int(c) for c in random.integers(120, 256, 3))
    x, y = (int(v) for v in random.integers(1, side // 3, 2))
    box = (x, y, x + side // 2, y + side // 2)
    if name == "circle":
        draw.ellipse(box, outline=colour, width=2)
    elif name == "square":
        draw.rectangle(box, outline=colour, width=2)
    elif name == "line":
        draw.line(box, fill=colour, width=2)
    else:
        draw.line(box, fill=colour, width=2)
        draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=2)
    return image


def write_folder(folder: Path, train: int, val: int, test: int, unlabelled: int) -> None:
    """Write so many images a class into train/, val/, test/ (a folder a class) and unlabelled/ (no labels)."""
    for name in CLASSES:
        first = 0
        for split, count in (("train", train), ("val", val), ("test", test), ("unlabelled", unlabelled)):
            place = folder / split / ("" if split == "unlabelled" else name)
            place.mkdir(parents=True, exist_ok=True)
            for seed in range(first, first + count):
                out = io.BytesIO()
                shape(name, seed).save(out, "PNG")
                (place / f"{name}{seed:04d}.png").write_bytes(out.getvalue())
            first += count


def small_settings() -> dict[str, object]:
    """What to change in params.yaml for a run on the shapes that takes seconds."""
    return {
        "machine.device": "cpu",
        "prepare.labelled_root": "photos",
        "prepare.unlabelled_root": "photos",
        "prepare.labels_per_class": 4,
        "views.resolution": 16,
        "teacher.model": "ResNet18_vd",
        "teacher.epochs": 2,
        "teacher.batch_size": 16,
        "student.model": "ResNet18_vd",
        "cache.replicas": 2,
        "cache.shard_views": 16,
        "mine.per_class": 8,
        "mine.min_score": 0.0,
        "mine.copy_similarity": 1.0,  # drawn shapes are very like each other
        "baseline.epochs": 2,
        "baseline.warmup_epochs": 1,
        "baseline.batch_size": 8,
        "distill.epochs": 2,
        "distill.batch_size": 8,
        "finetune.epochs": 1,
        "finetune.batch_size": 8,
        "fixres.epochs": 1,
        "fixres.batch_size": 8,
        "fixres.resolution": 20,
        "evaluate.speed_seconds": 0.05,
    }


def tiny(**changes: object) -> Params:
    """The project's settings with networks, epochs and images shrunken; `changes` as params.with_changes takes them."""
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    return params.check(params.with_changes(data, {**small_settings(), **changes}))


def prepared(folder: Path, monkeypatch) -> ImageSet:
    """Make folder/data/prepare of a few dozen shapes, and work in `folder` from now on."""
    monkeypatch.chdir(folder)
    write_folder(Path("photos"), train=10, val=4, test=5, unlabelled=3)
    prepare.run(tiny())
    return ImageSet(folder / "data/prepare/images")  # wherever a test works
