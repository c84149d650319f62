"""Files that are whole or not there."""

import errno
import os
import sys

import numpy as np
import pytest

from pipeline.core import atomic


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    path = tmp_path / "sub" / "file.json"
    with atomic.replacing(path) as beside:
        beside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("count", [3, 150])
def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path, count):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic.replacing_folder(path) as beside:
        (beside / "half").write_text("half")
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["old"]
    (tmp_path / ".out.part").mkdir()  # as a killed run leaves it
    (tmp_path / ".out.part" / "rest").write_text("rest")
    with atomic.replacing_folder(path) as beside:
        for number in range(count):
            (beside / f"{number}").write_text("new")
    assert len(list(path.iterdir())) == count
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_between_the_two_renames_leaves_the_old_folder(tmp_path, monkeypatch):
    path, rename = tmp_path / "out", os.replace
    path.mkdir()
    (path / "old").write_text("old")

    def interrupted(source, target):
        rename(source, target)
        if source == path:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic.replacing_folder(path) as beside:
        (beside / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_was_killed_between_the_two_renames_has_lost_nothing(tmp_path):
    path, old = tmp_path / "out", tmp_path / ".out.old"
    old.mkdir()
    (old / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic.replacing_folder(path):
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_files_name_and_what_was_there_stays(tmp_path):
    file = tmp_path / "labels.sl"
    file.write_text("before")
    with pytest.raises(OSError, match=rf"No space left on device: '{file}'"), atomic.replacing(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it
    assert [path.name for path in tmp_path.iterdir()] == ["labels.sl"]
    assert file.read_text() == "before"


def test_others_may_read_what_a_library_kept_to_itself(tmp_path):
    file = tmp_path / "weights"
    with atomic.replacing(file) as beside:
        beside.touch(0o600)
    assert file.stat().st_mode & 0o777 == 0o666 & ~atomic.UMASK


def test_a_new_array_has_its_space_on_the_disk(tmp_path):
    """Else a full disk would end the process in the middle of writing, without a word."""
    array = atomic.new_array(tmp_path / "a.npy", np.uint64, (100_000, 2))
    taken = os.stat(tmp_path / "a.npy").st_blocks * 512
    assert taken >= array.nbytes or sys.platform == "darwin"
    array[:] = 7
    array.flush()
    assert (np.load(tmp_path / "a.npy") == 7).all()
    assert atomic.new_array(tmp_path / "none.npy", np.uint8, (0, 3)).shape == (0, 3)
