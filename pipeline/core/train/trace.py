"""A trace of some training steps, as Chrome's and Perfetto's pages open it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(device: torch.device, steps: int, file: Path) -> Iterator[torch.profiler.profile]:
    """Profile a loop that calls `step()` after each of its steps: up to `steps` of them are traced, from the fourth on.

    Args:
        file: the trace, as Chrome's and Perfetto's pages open it (.json.gz).
    """
    wait, warmup = 1, 2
    skipped = wait + warmup

    def write(profile: torch.profiler.profile) -> None:
        if profile.step_num <= skipped:
            return  # the profiler calls this, too, where the loop ends just before the first step to trace
        profile.export_chrome_trace(str(file))
        print(f"trace: {file}; https://ui.perfetto.dev opens it", file=sys.stderr, flush=True)

    file.unlink(missing_ok=True)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])],
        schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
    ) as profile:
        yield profile
    if not file.exists():
        print("no trace: it begins with the fourth step, and fewer were left", file=sys.stderr, flush=True)
