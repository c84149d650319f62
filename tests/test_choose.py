"""Which images are chosen, for which split, and which labels the student may see."""

import hashlib

import pytest
from made_images import png
from prepare_kit import NEVER, SPLITS, good, prepared, with_splits, write

from pipeline.core.data.dataset import rank, sample_id
from pipeline.core.intake import choose
from pipeline.core.intake.sources import SourceFile


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
        assert splits.count("labelled") == 4
        assert set(splits) == {"labelled", "unlabelled", "val", "test"}
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
        assert min(len(one), len(other)) > 4
        assert len(one & other) < 0.8 * len(one), split


def found(count: int, name: str = "a") -> list[choose.Found]:
    """Files of a class, as they are found."""
    files = [SourceFile(f"{name}/{number}", name, 1, bytes) for number in range(count)]
    return [choose.Found("train", file, hashlib.sha256(file.name.encode()).hexdigest(), 1) for file in files]


def test_each_image_has_the_share_as_its_chance():
    parts = choose.split(found(5000), {"val": 0.2, "test": 0.1}, None, 0)
    counts = {part: len(images) for part, images in parts.items()}
    assert counts == {
        "test": pytest.approx(500, abs=90),  # four standard deviations
        "val": pytest.approx(1000, abs=120),
        "labelled": pytest.approx(3500, abs=130),
        "withheld": 0,
    }


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("count", "shares", "least"),
    [
        (3, (0.1, 0.1), (1, 1, 1)),
        (3, (0.45, 0.45), (1, 1, 1)),
        (3, (0.0, 0.9), (0, 1, 1)),
        (4, (0.9, 0.0), (1, 0, 1)),
        (2, (0.45, 0.45), (0, 0, 2)),
        (1, (0.45, 0.45), (0, 0, 1)),
    ],
)
def test_of_small_classes_no_part_is_left_without_an_image(count, shares, least, seed):
    parts = choose.split(found(count), dict(zip(("test", "val"), shares, strict=True)), None, seed)
    held = [len(parts[part]) for part in ("test", "val", "labelled")]
    assert sum(held) == count
    assert all(has >= wanted for has, wanted in zip(held, least, strict=True)), held
    assert all(has == 0 for has, share in zip(held, shares, strict=False) if share == 0)


def test_images_that_are_added_move_no_others_between_splits():
    before, after = (choose.split(found(count), {"val": 0.2, "test": 0.1}, None, 0) for count in (100, 130))
    for part in ("test", "val", "labelled"):
        assert set(before[part]) < set(after[part]), part


@pytest.mark.parametrize("seed", range(20))
def test_of_a_small_class_that_grows_no_image_becomes_one_of_test(seed):
    """Those of test, which are there for want of others, may go back."""
    before, after = (choose.split(found(count), {"val": 0.1, "test": 0.1}, 2, seed) for count in (5, 12))
    was_there = {image for images in before.values() for image in images}
    assert set(after["test"]) & was_there <= set(before["test"])


def test_a_pool_may_be_the_rest_of_the_labelled_images(tmp_path):
    images, refused = prepared(
        tmp_path / "out", write(tmp_path / "in", good(20)), images_per_class=10, unlabelled="train", **NEVER
    )
    assert len(images) == 40
    assert len(images.rows("unlabelled")) == 20
    assert {reason for _, _, reason in refused} == {"duplicate"}
