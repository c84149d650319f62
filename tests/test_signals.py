"""Ctrl-C and SIGTERM: heard once a short piece of work is done, but for a second Ctrl-C; and not lost."""

import contextlib
import importlib
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.core import signals
from pipeline.core.progress import Progress


@pytest.fixture
def heard():
    """The signals that reach the handlers of Ctrl-C and SIGTERM, which only note them while a test runs."""
    found, both = [], (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, lambda signum, frame: found.append(signum)) for signum in both}
    yield found
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("sent", [(2,), (15,), (15, 2), (2, 15), (15, 15), (15, 15, 2)])
def test_the_first_signal_is_heard_once_a_short_piece_of_work_is_done(heard, sent):
    done = []
    with contextlib.suppress(KeyboardInterrupt), signals.finish_first():
        for signum in sent:
            signal.raise_signal(signum)
            done.append(signum)
        assert heard == []
    assert done == [*sent]
    assert heard == [sent[0]]
    for signum in (signal.SIGINT, signal.SIGTERM):  # each has its handler back
        signal.raise_signal(signum)
    assert heard[1:] == [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def no_stop(monkeypatch):
    """What the process knows of stops is forgotten after a test, and none waits any more."""
    monkeypatch.setattr(signals, "_came", [])
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_stop")
def test_a_second_ctrl_c_does_not_wait(heard):
    done = []
    signals.hear_ctrl_c()
    with pytest.raises(KeyboardInterrupt), signals.finish_first():
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            done.append(signum)
            signal.raise_signal(signum)
        done.append("all")
    assert done == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    assert signals.stopping()
    assert signal.getsignal(signal.SIGINT) is signals.stop
    assert heard == []


def test_who_is_deaf_to_ctrl_c_stays_so(heard):
    """As a shell makes what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.hear_ctrl_c()
    with signals.finish_first():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert heard == [signal.SIGTERM]


IMPORTED = """
import signal, time
try:
    signal.raise_signal(signal.{signum})
    time.sleep(0.2)  # as long as it takes to look again, more than once
except BaseException:  # as libraries do
    pass
else:
    done = True
"""


@pytest.mark.usefixtures("no_stop", "heard")
@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_a_stop_waits_for_an_import(tmp_path, monkeypatch, signum):
    (tmp_path / "interrupted.py").write_text(IMPORTED.format(signum=signum))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interrupted", raising=False)
    signal.signal(getattr(signal, signum), signals.stop)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted")
        time.sleep(10)
    assert sys.modules["interrupted"].done
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.usefixtures("no_stop", "heard")
def test_a_second_ctrl_c_does_not_wait_for_an_import(tmp_path, monkeypatch):
    twice = "import signal\nfor _ in range(2):\n    signal.raise_signal(signal.SIGINT)\ndone = True\n"
    (tmp_path / "interrupted.py").write_text(twice)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interrupted", raising=False)
    signals.hear_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted")
    assert "interrupted" not in sys.modules
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.usefixtures("no_stop")
def test_work_is_not_begun_once_a_stop_waits(monkeypatch):
    monkeypatch.setattr(signals, "_came", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt), signals.finish_first():
        pytest.fail("it was begun")


@pytest.mark.usefixtures("no_stop")
def test_a_stop_that_a_finalizer_loses_comes_with_the_next_progress(monkeypatch):
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: lost.append(raised.exc_type))

    class Last:
        def __del__(self):
            signals.stop(signal.SIGINT, None)

    with Progress(10, "images", "train", quiet=True) as progress:
        progress.update()
        Last()
        assert lost == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            progress.update()


@pytest.mark.usefixtures("no_stop", "heard")
def test_a_stop_waits_for_a_finalizer(monkeypatch):
    """As of a loader's, which waits for its worker processes: Python would print the KeyboardInterrupt, and drop it."""
    lost, done = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: lost.append(raised.exc_type))

    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)  # as long as it takes to look again, more than once
            done.append(True)

    signal.signal(signal.SIGTERM, signals.stop)
    with pytest.raises(KeyboardInterrupt):
        Slow()
        time.sleep(10)
    assert (lost, done) == ([], [True])


def test_a_thread_that_may_not_handle_signals_works_all_the_same():
    def work():
        with signals.finish_first():
            return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == "done"
