"""The embedded example: counts, disjoint splits, and what is hidden among its unlabelled images."""

import csv
import io
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import digits
from pipeline.core.data.images import decode

SIZES = {"train": 130, "val": 14, "test": 30}  # all digits of the smallest class


def make(seed: int = 0, near_copies: int = 60, no_class: int = 130, **sizes: int) -> dict[str, bytes]:
    source = load_digits()
    return digits.example(source.images, source.target, SIZES | sizes, near_copies, no_class, seed)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return make()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decode(content)).astype(int)[..., 0]


def truth(files: dict[str, bytes]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(files["truth.csv"].decode())))


def test_counts_of_each_split_and_class(files):
    counts = Counter(tuple(name.split("/")[:2]) for name in files if name.count("/") == 2)
    assert counts == {(part, str(label)): size for part, size in SIZES.items() for label in range(10)}
    assert sum(name.startswith("unlabelled/") for name in files) == 190
    assert len(files) == 1740 + 190 + 1


def test_where_nothing_is_hidden_the_list_of_it_is_empty():
    assert make(near_copies=0, no_class=0)["truth.csv"] == b"file,kind,made_from\n"


def test_no_digit_is_in_two_splits_and_each_is_under_its_label(files):
    numbers = [int(name[-8:-4]) for name in files if name.count("/") == 2]
    assert len(numbers) == len(set(numbers))
    labels = load_digits().target
    assert all(int(name.split("/")[1]) == labels[int(name[-8:-4])] for name in files if name.count("/") == 2)
    assert len(set(files.values())) == len(files)  # and no two files are the same


def test_images_are_the_digits_enlarged(files):
    source = load_digits().images
    for name in list(files)[:50]:
        image = Image.open(io.BytesIO(files[name]))
        assert (image.mode, image.size) == ("L", (32, 32))
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(float)
        original = source[int(name[-8:-4])] * 255 / 16
        assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.95


def test_unlabelled_files_are_what_the_list_says(files):
    rows = truth(files)
    assert Counter(row["kind"] for row in rows) == {"jpeg": 20, "rescaled": 20, "shifted": 20, "no class": 130}
    assert {row["file"] for row in rows} == {name for name in files if name.startswith("unlabelled/")}
    for row in rows:
        made, origin = pixels(files[row["file"]]), pixels(files[row["made_from"]])
        assert row["made_from"].split("/")[0] == ("train" if row["kind"] == "no class" else "test")
        assert row["file"].endswith(".jpg") == (row["kind"] == "jpeg")
        assert (made != origin).any()
        if row["kind"] == "shifted":
            moved = [np.roll(origin, by, axis) for by in (1, -1) for axis in (0, 1)]
            inner = slice(1, -1)
            assert any((made[inner, inner] == one[inner, inner]).all() for one in moved)
        elif row["kind"] == "no class":
            tiles = [
                sorted(image[y : y + 8, x : x + 8].tobytes() for y in range(0, 32, 8) for x in range(0, 32, 8))
                for image in (made, origin)
            ]
            assert tiles[0] == tiles[1]
        else:
            assert np.abs(made - origin).mean() < 12


def test_numbers_of_unlabelled_files_do_not_tell_their_kind(files):
    kinds = [row["kind"] == "no class" for row in truth(files)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes > 40  # sorted by kind there would be 1; at random, about 82


def test_the_seed_decides_and_nothing_else_does(files):
    assert make() == files
    other = make(seed=1)
    assert set(other) != set(files)
    assert truth(other) != truth(files)


def test_smaller_sets_and_none_hidden():
    small = make(near_copies=0, no_class=0, train=3, val=1, test=1)
    assert len(small) == 51
    assert truth(small) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": 131}, r"train_per_class 131 \+ val_per_class 14 \+ test_per_class 30 = 175, but class 8 has 174"),
        ({"near_copies": 301}, "digits.near_copies: 301 of 300 test images"),
        ({"no_class": 1301}, "digits.no_class: 1301 of 1300 train images"),
    ],
)
def test_more_than_there_are(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)
