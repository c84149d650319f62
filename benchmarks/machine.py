"""What benchmarks share: the machine in a few words, the memory of a process, turns, silence, and tables."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch


def machine() -> str:
    """Name the processor, its cores that this process may use, the GPU where there is one, and torch."""
    info = Path("/proc/cpuinfo")  # Linux alone has it
    named = [line.split(":")[1].strip() for line in _lines(info) if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{named[0] if named else platform.processor() or platform.machine()}, {cores} cores"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join([*words, f"torch {torch.__version__}"])


def own_memory() -> float:
    """Megabytes of this process that are not the page cache's, where the system tells it (Linux)."""
    memory = psutil.Process().memory_info()
    return (memory.rss - getattr(memory, "shared", 0)) / 1e6


def take_turns(loops: dict[str, Generator], turns: int, steps: int, warm_up: int) -> dict[str, list[float]]:
    """Let training loops go on by turns, so that a machine whose speed wanders slows all of them alike.

    Args:
        loops: each gives something after every step; they are closed in the end.
        turns: that each has, the first `warm_up` ones besides, which are not timed.
        steps: of a turn.

    Returns:
        the seconds of each turn: `turns` numbers a loop.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-warm_up, turns):
        for name, loop in loops.items():
            begin = time.perf_counter()
            for _ in range(steps):
                next(loop)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    for loop in loops.values():
        loop.close()
    return seconds


def against(figures: list[float], others: list[float]) -> str:
    """How many times another loop's figure each turn's is: the median, and the quartiles."""
    low, median, high = np.quantile(np.array(figures) / np.array(others), [0.25, 0.5, 0.75])
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print nothing for a while."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def again_and_again(work: Callable[[], object]) -> Generator[None, None, None]:
    """Do the whole work at every step."""
    while True:
        work()
        yield


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*names: str) -> None:
    row(*names)
    row(*["---"] * len(names))


def show_rates(seconds: dict[str, list[float]], count: int, unit: str) -> None:
    """Print how fast several ways were, and how much longer than the first each took, turn by turn.

    Args:
        seconds: of each turn.
        count: what was done in a turn.
        unit: of that, a second.
    """
    first = next(iter(seconds.values()))
    header("way", f"{unit}, median", "time against the first: median, quartiles", "turns")
    for name, taken in seconds.items():
        row(name, f"{count / np.median(taken):,.1f}", against(taken, first), len(taken))


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
