"""The machine of a benchmark in a few words, and the memory of a process."""

import os
import platform
from pathlib import Path

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


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
