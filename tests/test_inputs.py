"""Sources that change while they are read: DVC would record what prepare has not seen."""

import re

import pytest
from images import tiny
from made_images import png
from prepare_kit import SETTINGS, as_zip, good, with_splits, write

from pipeline import prepare
from pipeline.core.intake.inputs import Inputs
from pipeline.core.sections import Prepare


def relabel(file):
    file.write_bytes(file.read_bytes().replace(b",a", b",b"))


def append(file):
    with file.open("ab") as end:
        end.write(b"more")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: write(root, {"train/a/late.png": png(500)}), "train/a/late.png"),
        (lambda root: write(root, {"train/c/late.png": png(500)}), "train/c/late.png"),
        (lambda root: append(root / "train/a/00.png"), "train/a/00.png"),
        (lambda root: (root / "train/a/00.png").unlink(), "train/a/00.png"),
        (lambda root: append(root / "pool.zip"), "pool.zip"),
        (lambda root: append(root / "other.csv"), None),
        (lambda root: relabel(root / "list.csv"), "train/a/00.png"),
        (lambda root: None, None),
    ],
)
def test_what_changes_while_it_is_read_is_named(tmp_path, change, named):
    """DVC notes the images once prepare has ended: those that came meanwhile would never be looked at."""
    listed = b"file,label\ntrain/a/00.png,a\ntrain/b/00.png,b\n"
    root = write(tmp_path / "in", with_splits() | {"other.csv": b"", "list.csv": listed})
    as_zip(root / "pool.zip", good(3, start=700))
    places = {"labelled_root": str(root), "unlabelled_root": str(root), "val": "list.csv", "unlabelled": "pool.zip"}
    given = SETTINGS | places
    inputs = Inputs.of(Prepare(**given))
    change(root)
    if named is None:
        inputs.check_unchanged()
        return
    with pytest.raises(ValueError, match=f"{re.escape(named)}: came, went or changed while prepare read, so"):
        inputs.check_unchanged()


def test_the_stage_looks_at_its_sources_again(tmp_path, monkeypatch):
    write(tmp_path / "in", good(4))
    monkeypatch.chdir(tmp_path)
    whole = prepare.prepare

    def slowly(*arguments):
        found = whole(*arguments)
        write(tmp_path / "in", {"train/a/late.png": png(500)})
        return found

    monkeypatch.setattr(prepare, "prepare", slowly)
    places = {"labelled_root": "in", "unlabelled_root": "in", "train": "train", "val": None, "test": None}
    changes = {f"prepare.{key}": value for key, value in (places | {"unlabelled": None}).items()}
    with pytest.raises(ValueError, match=r"late\.png: came, went or changed while prepare"):
        prepare.run(tiny(**changes))
    assert not (tmp_path / "data/prepare").exists()
    prepare.run(tiny(**changes))
    assert (tmp_path / "data/prepare").exists()
