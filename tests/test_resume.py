"""What a run can go on from stays until the next one; who is at work is alone there."""

import os
from pathlib import Path

import pytest
from images import tiny

from pipeline import baseline
from pipeline.core import resume

CHANGES = {
    "machine.checkpoint_seconds": 0,
    "student.model": "test_resnet",
    "baseline.epochs": 3,
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def begin(folder, *files):
    resume.begin_run(folder)
    for file in files:
        (folder / file).touch()


def test_a_run_that_has_ended_is_gone_when_another_begins(folder, tmp_path, capsys):
    begin(folder, "checkpoint")
    resume.end_run(folder)
    assert (folder / "checkpoint").exists()
    begin(tmp_path / "other")
    assert not folder.exists()
    assert capsys.readouterr().out == ""


def test_a_run_that_has_not_ended_stays_and_is_named(folder, tmp_path, capsys):
    begin(folder, "checkpoint")
    begin(tmp_path / "other")
    assert (folder / "checkpoint").exists()
    assert f"stay in {tmp_path}: 1; `make clean` removes them" in capsys.readouterr().out


def test_a_run_that_begins_again_has_not_ended(folder, tmp_path):
    begin(folder, "checkpoint")
    resume.end_run(folder)
    begin(folder)
    begin(tmp_path / "other")
    assert (folder / "checkpoint").exists()


def test_who_is_at_work_already_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resume.time, "sleep", lambda seconds: None)
    with resume.only_writer("cache") as folder:
        (folder / "lock").write_text("99999999")  # of one that was killed
    words = f"^process {os.getpid()} is already at work on cache here; wait for it, or stop it$"
    with resume.only_writer("cache"), pytest.raises(ValueError, match=words), resume.only_writer("cache"):
        pass


def test_a_trained_network_that_dvc_has_not_noted_costs_a_few_steps(images, capsys):
    params = tiny(**CHANGES)
    baseline.run(params)
    weights = Path("data/baseline/weights.safetensors")
    whole = weights.read_bytes()
    assert len(list(Path(".scratch/baseline").glob("*/*.pt"))) == 1
    os.remove(weights)  # as DVC does, before it runs the stage again
    capsys.readouterr()
    baseline.run(params)
    said = capsys.readouterr().out
    assert "baseline: going on from step" in said
    assert weights.read_bytes() == whole
