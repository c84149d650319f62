"""Batches as training gets them: rendered by worker processes, the same ones by any, with labelled partners."""

import dataclasses
import subprocess
import sys

import joblib
import numpy as np
import psutil
import pytest
import torch
from commands import ENVIRONMENT
from images import ROOT, prepared, tiny

from pipeline.core.data.batches import CleanViews, Views, in_order, load, spare_cores
from pipeline.core.data.views import ViewSpec
from pipeline.core.train.order import TrainingOrder


def test_workers_render_the_same_batches(images):
    views = Views(images, ViewSpec.of(0, tiny().views))
    batch = next(TrainingOrder(images.rows("labelled"), 8, 0, 0).batches(0, 1))
    here = next(iter(load(views, [batch], 0, torch.device("cpu"))))
    there = next(iter(load(views, [batch], 1, torch.device("cpu"))))
    for field in dataclasses.fields(here):
        a, b = getattr(here, field.name), getattr(there, field.name)
        assert np.array_equal(np.asarray(a), np.asarray(b)), field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_are_as_many_as_cores_and_batches_allow(images, monkeypatch):
    views, cpu, gpu = CleanViews(images, 16, 1.0), torch.device("cpu"), torch.device("cuda")
    batches = in_order(images.rows("labelled"), 2)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    assert load(views, batches, "auto", cpu).num_workers == 0
    assert load(views, batches, "auto", gpu).num_workers == 5
    assert load(views, batches[:3], "auto", gpu).num_workers == 3
    assert load(views, iter(batches), 4, cpu).num_workers == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's: processes on this machine
    assert load(views, batches, "auto", gpu).num_workers == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert load(views, batches, "auto", gpu).num_workers == 1
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1024)
    assert spare_cores() == 16


PROGRAM = """
import torch
from pathlib import Path
from pipeline.core import networks
from pipeline.core.data.batches import CleanViews, in_order, load
from pipeline.core.data.dataset import ImageSet

if __name__ == "__main__":
    images = ImageSet(Path("data/prepare/images"))
    batches = in_order(images.rows("labelled"), 4)
    workers = 1  # torch warns of more than there are cores
    assert len(list(load(CleanViews(images, 16, 1.0), batches, workers, torch.device("cpu")))) == len(batches)
"""


def test_workers_start_in_silence(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    (tmp_path / "asks.py").write_text(PROGRAM)
    variables = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "asks"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_workers_end_with_a_program_that_is_killed(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    waits = PROGRAM.partition("    workers")[0] + (
        "    it = iter(load(CleanViews(images, 16, 1.0), batches, 2, torch.device('cpu')))\n"
        "    next(it)\n    print('begun', flush=True)\n    input()\n"
    )
    (tmp_path / "waits.py").write_text(waits)
    program = subprocess.Popen(
        [sys.executable, "-m", "waits"],
        cwd=tmp_path,
        env={
            **ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore:This DataLoader will create",  # torch says so where there is one core
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "begun\n"
    below = psutil.Process(program.pid).children(recursive=True)
    assert len(below) >= 4  # the server, two workers, and multiprocessing's own
    program.kill()
    assert program.communicate()[1] == ""  # as of semaphores that have leaked
    assert psutil.wait_procs(below, timeout=20)[1] == []


def test_a_stage_that_ends_leaves_no_worker(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    ends = PROGRAM.partition("    workers")[0] + (
        "    it = iter(load(CleanViews(images, 16, 1.0), batches, 1, torch.device('cpu')))\n"
        "    next(it)\n    print('begun', flush=True)\n    input()\n    stage._exit(3)\n"
    )
    (tmp_path / "ends.py").write_text("from pipeline.core import stage\n" + ends)
    program = subprocess.Popen(
        [sys.executable, "-m", "ends"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "begun\n"
    below = psutil.Process(program.pid).children(recursive=True)
    worker = next(process for process in below if process.ppid() != program.pid)
    worker.suspend()  # it does not see by itself that the program has ended
    try:
        program.communicate("\n", timeout=60)
        assert program.returncode == 3
        assert psutil.wait_procs(below, timeout=20)[1] == []
    finally:
        if worker.is_running():
            worker.kill()


def test_partners_are_labelled_and_named(images):
    views = Views(images, ViewSpec.of(0, tiny(**{"views.mix_probability": 1.0}).views))
    rows = images.rows("unlabelled")
    batch = views[rows, np.zeros(len(rows), np.int64)]
    assert (images.splits[batch.partner_rows] == "labelled").all()
    assert np.array_equal(views.partner_ids(rows, batch.replicas), images.ids[batch.partner_rows])
