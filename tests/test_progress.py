"""Progress lines, and what a step of a training costs."""

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest

from pipeline.core import progress
from pipeline.core.progress import Progress, duration
from pipeline.core.train import meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but for who moves it: its `now` is in seconds."""
    found = SimpleNamespace(now=100.0)
    for module in (progress, meter):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


@pytest.mark.parametrize(
    ("seconds", "words"), [(9.4, "9 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (12_000, "3 h 20 min")]
)
def test_durations_are_written_as_people_say_them(seconds, words):
    assert duration(seconds) == words


def test_a_resumed_runs_rate_is_that_of_its_own_work(clock, capsys):
    with Progress(1000, "images", "train", done=600) as bar:
        clock.now += 4
        bar.update(50)  # too soon for a line
        clock.now += 2
        bar.update(100)
        clock.now += 2
        bar.note = "epoch 2"
        bar.update(250)
    assert capsys.readouterr().err.splitlines() == [
        "train: 750/1,000 images (75 %), 50/s, 5 s left",
        "train: 1,000/1,000 images (100 %), 50/s, took 8 s, epoch 2",
    ]


def test_before_the_second_work_no_rate_is_told(clock, capsys):
    with Progress(1000, "images", "train") as bar:
        clock.now += 30  # workers start
        bar.update(10)
        clock.now += 5
        bar.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "train: 10/1,000 images (1 %)",
        "train: 110/1,000 images (11 %), 20/s, 44 s left",
    ]


def test_that_nobody_reads_its_last_line_hides_no_ctrl_c(clock, monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)  # as where Ctrl-C ends `tee`, too
    nobody = open(writes, "w")  # noqa: SIM115  closing it fails, too
    monkeypatch.setattr(sys, "stderr", nobody)
    with pytest.raises(KeyboardInterrupt), Progress(1000, "images", "train") as bar:
        bar.update(10)
        raise KeyboardInterrupt
    with pytest.raises(BrokenPipeError), Progress(1000, "images", "train") as bar:
        bar.update(10)
    with contextlib.suppress(BrokenPipeError):
        nobody.close()


def test_of_no_work_and_of_other_processes_nothing_is_said(clock, capsys):
    for total, quiet in ((0, False), (10, True)):
        with Progress(total, "images", "train", quiet=quiet) as bar:
            bar.update(total)
    assert capsys.readouterr().err == ""


def test_a_step_costs_its_share_of_the_time_since_the_last_restart(clock):
    steps = meter.Meter()

    def slow():
        for _ in range(4):
            clock.now += 3  # a wait for images
            yield None

    for number, _ in enumerate(steps.batches(slow())):
        clock.now += 1 if number < 2 else 2  # the step
        if number == 1:
            first = steps.figures(images=8)
            steps.restart()
    second = steps.figures(images=8)
    assert first == pytest.approx(first | {"step_seconds": 4, "images_per_second": 2, "data_wait_share": 0.75})
    assert second == pytest.approx(second | {"step_seconds": 5, "images_per_second": 1.6, "data_wait_share": 0.6})
    assert 0.05 < second["memory_gb"] < 50
