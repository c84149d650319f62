"""Ctrl-C and SIGTERM: heard once a short piece of work is done, but for a second Ctrl-C; and not lost."""

import contextlib
import signal
import sys
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
    """What the process knows of stops is forgotten after a test."""
    monkeypatch.setattr(signals, "_came", [])


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


def test_a_thread_that_may_not_handle_signals_works_all_the_same():
    def work():
        with signals.finish_first():
            return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == "done"
