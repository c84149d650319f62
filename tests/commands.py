"""Commands that tests run in a project of their own."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "1",
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
}


def run(folder: Path, command: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a command in a folder; what it printed, both streams together, is in `stdout`."""
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def listen() -> None:
    """Hear Ctrl-C, in a new process, also where a shell has started the tests in the background, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.1) -> None:
    """Look, every so many seconds, whether a condition holds; it fails the test where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(every)


@contextlib.contextmanager
def at_most(kind: int, most: int) -> Iterator[None]:
    """Let this process have no more than so much of something (resource.RLIMIT_...)."""
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, limits)


def launch(stage: str) -> str:
    """A program that starts a stage's processes as the stage itself does, without importing it first."""
    return f"from pipeline.core import params, stage; stage._relaunch_with_torchrun(params.load(), '{stage}')"
