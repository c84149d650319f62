"""What a step of a training costs: its time, the share of it spent waiting for images, and memory."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")


class Meter:
    """Times the steps of a training: how long one takes, how much of that is waiting for its images, and the memory.

    On a GPU the host runs ahead: a single step's time says little there, that of an epoch is right.
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forget the steps so far."""
        self.started, self.steps, self.waited = time.monotonic(), 0, 0.0

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Hand batches on, and time the wait for each."""
        waiting = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - waiting
            self.steps += 1
            yield batch
            waiting = time.monotonic()

    def figures(self, images: int) -> dict[str, float]:
        """Give images/s, seconds a step, the share of them spent waiting for images, and the memory in GB, so far.

        Args:
            images: of a step.
        """
        seconds, steps = max(time.monotonic() - self.started, 1e-9), max(self.steps, 1)
        return {
            "images_per_second": images * steps / seconds,
            "step_seconds": seconds / steps,
            "data_wait_share": self.waited / seconds,
            "memory_gb": memory_gb(self.device),
        }


def memory_gb(device: str) -> float:
    """Give the most memory that torch has held on a GPU, or what this process holds now, in GB."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 1e9  # CUDA graphs hold what is not counted as allocated
    return psutil.Process().memory_info().rss / 1e9
