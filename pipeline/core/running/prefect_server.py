"""The Prefect server that a flow talks to: one that runs already, or one started here, on loopback, and ended again.

Its data (runs, logs, artifacts) lie in PREFECT_HOME, by default the project's own .scratch/prefect.
"""

import atexit
import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import urlopen

import prefect.settings

from pipeline.core.running import programs

PATIENCE = 120.0  # seconds that a server may take to start; the first time it makes its database, which takes longest


def ready(port: int = 0, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Give the address of a Prefect API that answers.

    It is PREFECT_API_URL's where that is set, else that of the server with which this project is being served, else
    that of a server started here, which ends when this program does.

    Args:
        port: where to start a server: this port, or the first free one above it; 0: any.
        meanwhile: called once, while the server starts if one must be; its errors end that server.

    Raises:
        ValueError: PREFECT_API_URL names another machine and none answers; or a server would not start.
    """
    _ask_no_proxy_for_this_machine()
    url = prefect.settings.PREFECT_API_URL.value() or _served()
    if url and answers(url):
        meanwhile()
        return url
    if url:
        try:
            place, its_port = urlsplit(url), urlsplit(url).port or 4200
        except ValueError as error:
            raise ValueError(f"PREFECT_API_URL={url}: no address: {error}") from None
        if place.hostname not in ("127.0.0.1", "localhost"):
            raise ValueError(f"no Prefect server answers at PREFECT_API_URL={url}: start it, or unset the variable")
        return _start(its_port, meanwhile)
    return _start(_free_port(port), meanwhile, tries=2)


@contextmanager
def serving(url: str) -> Iterator[None]:
    """Be the only program that serves this project's flow: a second one would take up the same runs.

    Raises:
        ValueError: another one does already.
    """
    with (_home() / "serving").open("a+", encoding="utf-8") as note:
        deadline = time.monotonic() + 1  # who only looks (`_served`) holds it for a moment
        while not _locked(note, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise ValueError(f"this project is being served already, at {_served()}")
            time.sleep(0.1)
        note.truncate(0)
        note.write(url)
        note.flush()
        yield


def _served() -> str | None:
    """The address that `serving` noted, while it is at it."""
    with (_home() / "serving").open("a+", encoding="utf-8") as note:
        if _locked(note, fcntl.LOCK_SH):
            return None
        note.seek(0)
        return note.read()


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start(port: int, meanwhile: Callable[[], None], tries: int = 1) -> str:
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = _home() / "server.log"
    # One at a time: two servers that make the database at once spoil it.
    with (_home() / "starting").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with log.open("w", encoding="utf-8") as output:
            server = programs.start(command, Path.cwd(), os.environ | {"PREFECT_API_URL": url}, output)
        atexit.register(programs.end, server.pid)
        meanwhile()
        deadline = time.monotonic() + PATIENCE
        while not (there := answers(url)) and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    if server.poll() is not None and tries > 1:  # another program may have taken the port meanwhile
        return _start(_free_port(port + 1), lambda: None, tries - 1)
    if not there or server.poll() is not None:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        said = " ".join(named[-1:] or lines[-3:]).strip() or "it said nothing"
        raise ValueError(f"the Prefect server did not start ({said}); all that it said is in {log}")
    return url


def _ask_no_proxy_for_this_machine() -> None:
    """Have this process, Prefect's client and all that they start reach this machine's servers directly."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [named, "127.0.0.1", "localhost"]))


def answers(url: str) -> bool:
    """Whether a Prefect server answers at an API's address."""
    try:
        with urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, HTTPException):
        return False


def _free_port(first: int) -> int:
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", first))
            except OSError:
                first += 1
            else:
                return probe.getsockname()[1]


def _home() -> Path:
    home = Path(prefect.settings.PREFECT_HOME.value())
    home.mkdir(parents=True, exist_ok=True)
    return home
