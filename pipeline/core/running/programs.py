"""Programs that end with the run that started them.

`Programs` starts each program in a session of its own and hands on its output line by line. Leaving it (an error, a
cancelled run, Ctrl-C) ends everything that still runs in or below those sessions: SIGTERM, then SIGKILL.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

GRACE = 2.0  # seconds between SIGTERM and SIGKILL: of a cancelled run nothing is to be left after 5

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Programs:
    """The programs of one run: `with Programs(...) as programs:` ends what is left of them on the way out.

    Args:
        folder: where they run.
        environment: their environment variables.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], grace: float = GRACE) -> None:
        self.folder, self.environment, self.grace = folder, environment, grace
        self.stopped = False
        self._running: set[int] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], on_line: Callable[[str], None]) -> int:
        """Run one program to its end, from any thread; give its exit code (negative: the signal that ended it).

        Raises:
            InterruptedError: the run has been stopped, nothing more may start.
        """
        with self._lock:
            if self.stopped:
                raise InterruptedError("the run has been stopped")
            process = start(command, self.folder, self.environment)
            self._running.add(process.pid)
        # A child that outlives its program keeps the pipe open: without the watcher the loop below would wait for it.
        watcher = threading.Thread(target=self._reap, args=(process,))
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip())
        watcher.join()
        return process.returncode

    def stop(self) -> None:
        """End every program, and let none start any more."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        # In threads: a second Ctrl-C interrupts this one's wait, but not their work.
        enders = [threading.Thread(target=end, args=(pid, self.grace)) for pid in running]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()

    def _reap(self, process: subprocess.Popen[str]) -> None:
        process.wait()
        end(process.pid, self.grace)
        with self._lock:
            self._running.discard(process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], output: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a program in a session of its own; on Linux it gets SIGTERM if the thread that started it ends first."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_die_with_parent if _libc else None,  # covers kill -9, where no Python code of ours runs any more
    )


def end(leader: int, grace: float = GRACE) -> None:
    """End a session's processes and their descendants: SIGTERM, and SIGKILL to those left after `grace` seconds."""
    members = _members(leader)
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 1.0)):
        _signal(members, number)
        deadline = time.monotonic() + patience
        while any(map(_alive, members)) and time.monotonic() < deadline:
            time.sleep(0.02)
        members = {process for process in members if _alive(process)} | _members(leader)


def _members(leader: int) -> set[psutil.Process]:
    members: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader:
                # Descendants, too: torchrun gives its workers sessions of their own.
                members |= {process, *process.children(recursive=True)}
    return {process for process in members if _alive(process)}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(processes: set[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _die_with_parent() -> None:
    assert _libc is not None
    _libc.prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
