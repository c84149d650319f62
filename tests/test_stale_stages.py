"""A stage that is run alone, after the images have changed, refuses what stages before it made of other images."""

import shutil
from pathlib import Path

import pytest
from cached_project import go

from pipeline import cache, distill, fixres, mine, prepare, score


def test_mined_images_that_have_left_the_pool_are_not_learned_from(cached_project):
    """They may be test images now."""
    moved = sorted(Path("photos/unlabelled").glob("square*.png"))[0]
    shutil.move(moved, Path("photos/test/square"))
    go(prepare)
    for stage in (cache, distill):
        with pytest.raises(ValueError, match=r"^data/mine: some of these are not in the present pool; run `dvc repro"):
            go(stage)


def test_a_teacher_of_other_classes_is_not_asked(cached_project):
    for split in ("train", "val", "test"):
        Path("photos", split, "square").rename(Path("photos", split, "a square"))
    go(prepare)
    for stage in (score, cache, distill):
        with pytest.raises(
            ValueError, match=r"^data/teacher: the network knows classes of other names.*repro teacher$"
        ):
            go(stage)


def test_a_student_of_other_classes_is_not_trained_further(cached_project):
    go(distill)
    shutil.copytree("data/distill", "data/finetune")
    for split in ("train", "val", "test"):
        Path("photos", split, "square").rename(Path("photos", split, "a square"))
    go(prepare)
    with pytest.raises(ValueError, match=r"^data/finetune: the network knows classes of other names.*repro finetune$"):
        go(fixres, **{"fixres.resolution": 16})


@pytest.mark.parametrize("left", [0, 50])
def test_what_is_cut_off_is_named_with_what_to_do(cached_project, left):
    for stage, file in ((mine, "data/score/ids.npy"), (distill, "data/mine/mined.parquet")):
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[:left])
        folder = file.rpartition("/")[0]
        with pytest.raises(ValueError, match=f"^{folder}.*; remove {folder}, and run `dvc checkout {folder}`"):
            go(stage)
        Path(file).write_bytes(content)
