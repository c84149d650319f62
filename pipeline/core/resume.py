"""What lets a stage resume after it was killed: a scratch folder, one writer at a time, and what a run is a run of."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

SCRATCH = Path(".scratch")  # checkpoints and locks: what a stage needs to go on after it was killed
SCORED = SCRATCH / "scored"  # the teacher's answers of score's last run
ENDED = "ended"  # a file in the folder of a run whose results are in place


@contextlib.contextmanager
def only_writer(name: str) -> Iterator[Path]:
    """Be the only process that works on a stage's output in this workspace; give its scratch folder.

    Raises:
        ValueError: another process is at it; its process number is named.
    """
    folder = SCRATCH / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        for attempt in range(6):  # a run that has just been killed needs a moment to be gone
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 5:
                    lock.seek(0)
                    raise ValueError(
                        f"process {lock.read().strip() or '?'} is already at work on {name} here; "
                        "wait for it, or stop it"
                    ) from None
                time.sleep(1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def begin_run(folder: Path) -> None:
    """Make a run's folder, or take up the one that is there.

    Folders beside it, of runs with other images, settings or code, go if those have ended; the others are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENDED).unlink(missing_ok=True)
    for other in folder.parent.glob(f"*/{ENDED}"):
        shutil.rmtree(other.parent)
    others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder and any(other.iterdir())]
    if others:
        print(
            f"{folder.parent.name}: unfinished runs with other images, settings or code stay in {folder.parent}: "
            f"{len(others)}; `make clean` removes them",
            flush=True,
        )


def end_run(folder: Path) -> None:
    """Note that a run has ended well, its results in place.

    What it could go on from stays until the stage's next run: a DVC that is stopped before it has noted the results, or
    cannot because another DVC is at work, removes them, and runs the stage again.
    """
    (folder / ENDED).touch()


def package_versions() -> list[str]:
    """Versions of the packages on which views' pixels and networks' answers depend."""
    return [version(name) for name in ("torch", "torchvision", "timm", "pillow", "simplejpeg", "numpy", "scipy")]


def code_digest() -> str:
    """SHA-256 over the project's source files that this process has loaded, in hex."""
    root = Path(__file__).resolve().parents[2]
    folders = root / "pipeline", root / "models"
    ours = [sys.modules[name] for name in sys.modules if name.split(".")[0] in ("pipeline", "models", "__main__")]
    loaded = {Path(file).resolve() for module in ours if (file := getattr(module, "__file__", None))}
    total = hashlib.sha256()  # __main__ is the stage itself, or a program that is not the project's
    for file in sorted(file for file in loaded if any(file.is_relative_to(folder) for folder in folders)):
        total.update(file.read_bytes())
    return total.hexdigest()
