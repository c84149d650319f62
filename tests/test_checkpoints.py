"""Checkpoint files: what keeps one from being written or read costs none of the others."""

import errno
import os
import pickle
import re
import resource

import pytest
import torch
from commands import at_most

from pipeline.core.train import checkpoints


def test_what_keeps_a_checkpoint_from_being_read_does_not_remove_it(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"step": step}, keep=2)

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        checkpoints.load(tmp_path)
    assert len(checkpoints.files(tmp_path)) == 2


def test_a_full_disk_is_named_where_it_shows_as_a_checkpoint_is_flushed(tmp_path, monkeypatch):
    """As of a quota, or on NFS."""

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.atomic, "flush", full)
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path))}: a checkpoint cannot be written; .*No space left"):
        checkpoints.save(tmp_path, 1, {"step": 1}, keep=1)


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path):
    checkpoints.save(tmp_path, 1, {"step": 1}, keep=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):  # the latter from Python 3.14 on
        checkpoints.save(tmp_path, 2, {"step": lambda: 2}, keep=1)
    assert checkpoints.load(tmp_path) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named_where_a_checkpoint_finds_no_room(tmp_path):
    words = f"{re.escape(str(tmp_path))}: a checkpoint cannot be written; [0-9,]+ MB are free there"
    with at_most(resource.RLIMIT_FSIZE, 1024), pytest.raises(OSError, match=words):
        checkpoints.save(tmp_path, 1, {"step": torch.zeros(2**20)}, keep=1)
    assert not list(tmp_path.iterdir())
