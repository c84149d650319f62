"""Loops that are timed by turns, and the Markdown tables that say how they did."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch


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
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
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
