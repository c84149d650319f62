"""A project whose student stands trained and evaluated, made in a second: what registering reads, and no more."""

import io
import json
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from PIL import Image

import models
from pipeline import prepare, register
from pipeline.core import networks
from pipeline.core import params as settings
from pipeline.core.data.batches import CleanViews, in_order
from pipeline.core.data.dataset import ImageSet
from pipeline.core.intake import image_shards
from pipeline.core.networks import Classifier
from pipeline.core.results import mlflow_store
from pipeline.core.softlabels.store import summary_checksum

ROOT = Path(__file__).parent.parent
CLASSES = ["cat", "dog", "owl"]
RESOLUTION = 32
NAME = "resnet50_vd_ssld"


def picture(number):
    """A PNG of 40 x 36 pixels whose colours depend on its number."""
    random = np.random.default_rng(number)
    flat = random.integers(0, 256, 3)
    pixels = np.clip(flat + random.integers(-40, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder, label, classes=CLASSES, count=24, first=0):
    """Write data/prepare of `count` test images, as many labelled ones, and two without a label.

    `label` gives each picture's class.
    """
    parts = [("test" if at < count else "labelled", label(at)) for at in range(2 * count)]
    parts += [("unlabelled", -1)] * 2
    encoded = [picture(number) for number in range(first, first + len(parts))]
    samples = [
        image_shards.Sample(sha256(one).hexdigest(), len(one), 40, 36, *part, -1, f"{at}.png")
        for at, (one, part) in enumerate(zip(encoded, parts, strict=True))
    ]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    content = dict(zip((sample.sha256 for sample in samples), encoded, strict=True))
    give = lambda wanted: ((sample, content[sample.sha256]) for sample in wanted)  # noqa: E731
    digests = image_shards.write(folder / "images", samples, classes, 1 << 20, give)
    (folder / "summary.json").write_text(json.dumps(prepare.summarise(samples, classes, {}, [], digests)))
    return ImageSet(folder / "images/known")


def make_network(pixels, spoilt=0):
    """A tiny network that divides the images evenly; `spoilt` rows of the batch are then led astray by its bias."""
    torch.manual_seed(0)
    classifier = Classifier(models.build("test_resnet", num_classes=3)).eval()
    head = classifier.network.get_classifier()
    with torch.no_grad():
        head.weight.mul_(20)
        head.bias.sub_(classifier(pixels).median(0).values)
        head.bias[0] += spoilt
    return classifier


def put_student(data, images, classifier):
    """Write data/fixres and data/evaluate for a network."""
    card_of = {"model": "test_resnet", "classes": list(images.classes), "resolution": RESOLUTION, "identities": {}}
    networks.save(data / "fixres", classifier, card_of)
    rows = images.rows("test")
    with torch.inference_mode():
        logits = classifier(CleanViews(images, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels).numpy()
    top1 = float((logits.argmax(1) == images.labels[rows]).mean())
    metrics = {"top1": top1, "top5": 1.0, "nll": 0.5, "ece": 0.1, "agreement": 0.9, "parameters": 372979, "macs": 1}
    folder = data / "evaluate"
    folder.mkdir(exist_ok=True)
    for name, content in {
        "metrics.json": dict.fromkeys(("teacher", "baseline", "student"), metrics),
        "speed.json": {"device": "cpu"},
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "report.html").write_text("<h1>report</h1>")
    lists = pyarrow.FixedSizeListArray.from_arrays(logits.reshape(-1), logits.shape[1])
    pyarrow.parquet.write_table(
        pyarrow.table({"id": images.ids[rows], "student_logits": lists}), folder / "predictions.parquet"
    )
    return top1


class Project:
    """A project as its own working folder."""

    def __init__(self, root, pixels):
        self.root, self.data, self.pixels = root, root / "data", pixels
        self.all_images = ImageSet(self.data / "prepare/images")
        self.images = ImageSet(self.data / "prepare/images/known")

    def register(self, if_missing=False, margin=0.0):
        content = yaml.safe_load((ROOT / "params.yaml").read_text())
        params = settings.check(settings.with_changes(content, {"register.margin": margin}))
        (register.run_if_missing if if_missing else register.run)(params)

    def student(self, spoilt):
        """Put a student there that is worse the more it is spoilt; give its top-1."""
        return put_student(self.data, self.images, make_network(self.pixels, spoilt))

    def versions(self):
        found = mlflow_store.connect().search_model_versions(f"name = '{NAME}'")
        return {int(version.version): version for version in found}

    def aliases(self):
        return {key: int(value) for key, value in mlflow_store.connect().get_registered_model(NAME).aliases.items()}


def make(root: Path) -> SimpleNamespace:
    """Write a project whose student is right on all test images and stands evaluated; nothing is registered."""
    data, replicas = root / "data", settings.load(ROOT / "params.yaml").cache.replicas
    images = write_images(data / "prepare", lambda at: 0)
    rows = images.rows("test", "labelled")
    pixels = CleanViews(images, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels
    good = make_network(pixels)
    with torch.inference_mode():
        said = dict(zip(images.ids[rows].tolist(), good(pixels).argmax(1).tolist(), strict=True))
    assert set(said.values()) == {0, 1, 2}
    numbers = {int(images.source(row).split(".")[0]): said[int(images.ids[row])] for row in rows}
    images = write_images(data / "prepare", numbers.__getitem__)
    labels = {"fingerprint": "c" * 64, "wanted_views": (24 + 5) * replicas}
    for folder, file, content in (
        ("teacher", "network.json", {"digest": "t" * 64}),
        ("cache", "cache.json", {**labels, "checksum": summary_checksum(labels)}),
    ):
        (data / folder).mkdir()
        (data / folder / file).write_text(json.dumps(content))
    lock = {"schema": "2.0", "stages": {"cache": {"outs": [{"path": "data/cache", "md5": "abc.dir"}]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert put_student(data, images, good) == 1.0
    return SimpleNamespace(root=root, images=images, pixels=pixels, labels=numbers)
