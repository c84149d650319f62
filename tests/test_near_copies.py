"""Test images that are near-copies of labelled ones are found, whichever of the two is the copy, and named."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import encode, photo
from PIL import Image, ImageEnhance
from prepare_kit import prepared, write

from pipeline.core.data.dataset import ImageSet
from pipeline.core.evaluation import near_copies
from pipeline.core.tables import as_csv

CPU = torch.device("cpu")


def jpeg(seed: int) -> bytes:
    return encode(photo(seed), "JPEG", quality=30)


def mirrored(seed: int) -> bytes:
    return encode(photo(seed).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG")


def dark(seed: int) -> bytes:
    return encode(ImageEnhance.Brightness(photo(seed)).enhance(0.7), "PNG")


COPIES = {
    "test/cat/jpeg.jpg": jpeg(0),
    "test/cat/jpeg-dark.png": dark(0),  # of the same labelled image
    "test/dog/mirrored.png": mirrored(7),
    "test/dog/dark.png": dark(1),  # whose original is labelled as a cat
    "train/cat/of-test.png": mirrored(20),
    "train/cat/of-test-too.jpg": jpeg(20),
}
COPIED = {
    "test/cat/jpeg.jpg": {"train/cat/00.png"},
    "test/cat/jpeg-dark.png": {"train/cat/00.png"},
    "test/dog/mirrored.png": {"train/dog/07.png"},
    "test/dog/dark.png": {"train/cat/01.png"},
    "test/cat/20.png": {"train/cat/of-test.png", "train/cat/of-test-too.jpg"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 labelled and 6 test images that have nothing in common, and copies among them; others are no matter of it."""
    files = {f"train/{'cat' if seed < 6 else 'dog'}/{seed:02}.png": encode(photo(seed), "PNG") for seed in range(12)}
    files |= {f"test/{'cat' if seed < 23 else 'dog'}/{seed}.png": encode(photo(seed), "PNG") for seed in range(20, 26)}
    folder = tmp_path_factory.mktemp("near-copies")
    others = {"pool/copy.jpg": jpeg(24), "val/cat/copy.jpg": jpeg(25), "val/dog/copy.png": mirrored(11)}
    root = write(folder / "photos", {**files, **COPIES, **others})
    return prepared(folder / "data", root, val="val", test="test", unlabelled="pool")[0]


def named(images, pairs):
    return {images.source(pair.test): images.source(pair.labelled) for pair in pairs}


@pytest.mark.parametrize(("workers", "block"), [(0, 5), (1, 1000)])
def test_near_copies_are_found_and_no_others(images, workers, block, monkeypatch):
    monkeypatch.setattr(near_copies, "BLOCK", block)
    found = near_copies.find(images, 0.93, workers, CPU)
    pairs = named(images, found)
    assert pairs.keys() == COPIED.keys()
    assert all(labelled in COPIED[test] for test, labelled in pairs.items())
    similarities = [pair.similarity for pair in found]
    assert similarities == sorted(similarities, reverse=True)
    assert 0.93 <= similarities[-1] < similarities[0] <= 1


def test_the_threshold_decides(images):
    some = near_copies.find(images, 0.93, 0, CPU)
    assert some[-1].similarity + 2e-4 < some[-2].similarity
    assert near_copies.find(images, some[-1].similarity + 1e-4, 0, CPU) == some[:-1]
    assert near_copies.find(images, 1.1, 0, CPU) == []


def test_where_nothing_is_labelled_nothing_is_found(images, monkeypatch):
    none = lambda *splits: np.zeros(0, np.int64) if splits == ("labelled",) else ImageSet.rows(images, *splits)  # noqa: E731
    monkeypatch.setattr(images, "rows", none)
    assert near_copies.find(images, 0.93, 0, CPU) == []


def test_the_table_names_images_and_classes(images):
    found = near_copies.find(images, 0.93, 0, CPU)
    text = as_csv(near_copies.table(found, images), near_copies.COLUMNS)
    rows = {Path(row["source"]).name: row for row in csv.DictReader(io.StringIO(text))}
    assert [int(row["id"], 16) for row in rows.values()] == [int(images.ids[pair.test]) for pair in found]
    dark = rows["dark.png"]
    assert (dark["class"], dark["labelled_class"], dark["labelled_source"]) == ("dog", "cat", "train/cat/01.png")
    assert rows["mirrored.png"]["alignment"] == "mirrored"
    assert as_csv(near_copies.table([], images), near_copies.COLUMNS) == ",".join(near_copies.COLUMNS) + "\n"
