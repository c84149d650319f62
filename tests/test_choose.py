"""Which images are chosen, for which split, and which labels the student may see."""

import numpy as np
import pytest
from made_images import png
from prepare_kit import NEVER, SPLITS, good, prepared, with_splits, write

from pipeline.core.data.dataset import rank, sample_id


def test_withheld_labels_are_known_and_not_shown(tmp_path):
    images, _ = prepared(tmp_path / "out", write(tmp_path / "in", with_splits()), **SPLITS, labels_per_class=5)
    assert images.classes == ("a", "b")
    assert len(images.rows("labelled")) == 10
    assert len(images.rows("unlabelled")) == 14 + 8
    pool = images.rows("unlabelled")
    assert (images.labels[pool] == -1).all()
    for row in range(len(images)):
        part, name = images.source(row).split("/")[:2]
        known = -1 if part == "pool" else "ab".index(name)
        assert max(images.labels[row], images.withheld[row]) == known
        assert images.withheld[row] == -1 or images.splits[row] == "unlabelled"


def test_images_are_chosen_by_content_and_bad_ones_make_room_for_the_next(tmp_path):
    files = good(20)
    for at in range(0, 20, 3):
        files[f"train/a/{at:02d}.png"] = files[f"train/a/{at:02d}.png"][:800]
    root = write(tmp_path / "in", files)
    images, refused = prepared(tmp_path / "out", root, images_per_class=10, labels_per_class=4, seed=5, **NEVER)
    for name in "ab":
        fine = [content for file, content in files.items() if file.startswith(f"train/{name}") and len(content) > 800]
        ids = sorted((sample_id(content) for content in fine), key=lambda one: rank(5, "images", one))[:10]
        used = [row for row in range(len(images)) if images.source(row).startswith(f"train/{name}")]
        assert set(images.ids[used].tolist()) == set(ids)
        splits = images.splits[used].tolist()
        assert [splits.count(split) for split in ("labelled", "unlabelled", "val", "test")] == [4, 4, 1, 1]
    assert {reason for _, _, reason in refused} == {"truncated"}


def test_choices_hardly_change_when_images_are_added(tmp_path):
    before, _ = prepared(tmp_path / "1", write(tmp_path / "a", good(40)), images_per_class=30, labels_per_class=10)
    after, _ = prepared(
        tmp_path / "2",
        write(tmp_path / "b", good(40) | {"train/a/new.png": png(1)}),
        images_per_class=30,
        labels_per_class=10,
    )
    for split in ("labelled", "val", "test"):
        of = [set(images.ids[images.rows(split)].tolist()) for images in (before, after)]
        assert len(of[0] - of[1]) <= 2, split
    other, _ = prepared(tmp_path / "3", tmp_path / "a", images_per_class=30, labels_per_class=10, seed=1)
    assert set(other.ids.tolist()) != set(before.ids.tolist())  # the seed decides


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_another_seed_draws_other_images_for_each_split(tmp_path, share):
    root = write(tmp_path / "in", with_splits() | good(40))
    shares = {"val_share": share, "test_share": share} if share else SPLITS
    sets = [prepared(tmp_path / str(seed), root, labels_per_class=10, seed=seed, **shares)[0] for seed in (0, 1)]
    for split in ("labelled", "val", "test") if share else ("labelled",):
        one, other = (set(images.ids[images.rows(split)].tolist()) for images in sets)
        assert len(one) == len(other) > 4
        assert len(one & other) < 0.8 * len(one), split


def test_shares_are_taken_of_each_class(tmp_path):
    files = good(40, "ab") | good(5, "c") | good(2, "d")
    images, _ = prepared(tmp_path / "out", write(tmp_path / "in", files), val_share=0.2, test_share=0.1)
    counts = {
        split: np.bincount(images.labels[images.rows(split)], minlength=4).tolist()
        for split in ("labelled", "val", "test")
    }
    assert counts == {"labelled": [28, 28, 3, 2], "val": [8, 8, 1, 0], "test": [4, 4, 1, 0]}


def test_a_pool_may_be_the_rest_of_the_labelled_images(tmp_path):
    images, refused = prepared(
        tmp_path / "out", write(tmp_path / "in", good(20)), images_per_class=10, unlabelled="train", **NEVER
    )
    assert len(images) == 40
    assert len(images.rows("unlabelled")) == 20
    assert {reason for _, _, reason in refused} == {"duplicate"}
