"""Memory of a student in training, by the number of images of its data set, the page cache left out.

Each data set is one small photograph, repeated with other bytes after its end, so that every copy has an id of its own,
half of them labelled, half of them pool, with a soft label each. A new process a data set opens it as stage `distill`
does, trains some steps on it, and says how much memory it holds then and held at most.
Prints a Markdown table. Run: python benchmarks/memory.py [--records 10000 100000 1000000]
"""

import argparse
import hashlib
import io
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from cache import MADE, made_cache
from machine import machine, own_memory
from turns import silence

from pipeline.core import networks, params
from pipeline.core.data.batches import Views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.intake import image_shards
from pipeline.core.softlabels import SoftLabels, make_keys
from pipeline.core.train import distillation, engine, training
from pipeline.core.train.order import TrainingOrder

ROOT = Path(__file__).parent.parent
SIDE = 32  # pixels
CLASSES = [f"class {number}" for number in range(MADE.num_classes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="numbers of images")
    parser.add_argument("--model", default="test_resnet", help="the student (default: test_resnet, timm's smallest)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    print(f"{arguments.model}, batch {arguments.batch_size}, {arguments.steps} steps; {machine()}\n")
    print("| images | MB after training | more than with the fewest | MB at most | more than with the fewest |")
    print("|---|---|---|---|---|")
    found: list[tuple[float, float]] = []
    context = multiprocessing.get_context("spawn")  # a process that holds nothing else
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder) / "images", count)
            write_labels(Path(folder) / "labels", ImageSet(Path(folder) / "images"))
            with context.Pool(1) as pool:
                found.append(pool.apply(train, (folder, arguments.model, arguments.batch_size, arguments.steps)))
        more = [now - first for now, first in zip(found[-1], found[0], strict=True)]
        after, most = found[-1]
        print(f"| {count:,} | {after:.0f} | {more[0]:.0f} | {most:.0f} | {more[1]:.0f} |", flush=True)


def write_images(folder: Path, count: int) -> None:
    """Write a data set of one photograph of 32 pixels, told apart by bytes after its end that no decoder reads."""
    folder.mkdir()
    encoded = io.BytesIO()
    Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(encoded, "JPEG")
    base = encoded.getvalue()
    number_of = {hashlib.sha256(base + str(number).encode()).hexdigest(): number for number in range(count)}
    samples = []
    for digest, number in number_of.items():
        split, label = ("labelled", number % len(CLASSES)) if number % 2 else ("unlabelled", -1)
        file = f"train/{max(label, 0):04d}/{number:08d}.jpg"
        samples.append(image_shards.Sample(digest, len(base) + len(str(number)), SIDE, SIDE, split, label, -1, file))
    give = lambda wanted: ((sample, base + str(number_of[sample.sha256]).encode()) for sample in wanted)  # noqa: E731
    image_shards.write(folder, samples, CLASSES, 256_000_000, give)


def write_labels(folder: Path, images: ImageSet) -> None:
    """Write a soft label of each image's first view."""
    made_cache(folder, len(images), keys=make_keys(images.ids, np.zeros(len(images), np.uint64), images.ids))


def train(folder: str, model: str, batch_size: int, steps: int) -> tuple[float, float]:
    """Train some steps; give the MB of this process that are not the page cache's: at the end, and the most."""
    torch.set_num_threads(1)
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], own_memory())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    images = ImageSet(Path(folder) / "images")
    with silence():
        made = make_run(images, SoftLabels(Path(folder) / "labels", MADE), model, batch_size, Path(folder))
        made.steps = steps
        made.train()
    after = own_memory()
    done.set()
    watcher.join()
    return after, max(most[0], after)


def make_run(images: ImageSet, labels: SoftLabels, model: str, batch_size: int, scratch: Path) -> engine.Run:
    """Make the run that stage `distill` would make, with its identities, on views without mixing partners."""
    settings = params.load(ROOT / "params.yaml")
    spec = ViewSpec.of(0, settings.views.model_copy(update={"mix_probability": 0.0}))
    rows = images.rows("labelled", "unlabelled")
    # `distill` computes both to name its run, and their memory counts
    assert images.digest
    assert len(np.sort(images.ids[rows]).tobytes())
    classifier = networks.build(model, len(images.classes), seed=0)
    processes = Processes(torch.device("cpu"))
    return engine.Run(
        what="benchmark",
        classifier=classifier,
        part=classifier.network,
        views=Views(images, spec),
        order=TrainingOrder(rows, batch_size, 0, 1),
        loss=distillation.distillation_loss({"ssld": 1.0}, 1.0, distillation.cached(labels, images), images),
        recipe=settings.distill.model_copy(update={"epochs": 1, "batch_size": batch_size}),
        processes=processes,
        validate=training.validator(settings, images, spec.resolution, processes),
        scratch=scratch,
        machine=settings.machine.model_copy(update={"checkpoint_seconds": 1e9}),
    )


if __name__ == "__main__":
    main()
