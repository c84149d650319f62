"""Where a process computes, and beside how many others."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.core.sections import Machine


@dataclass(frozen=True)
class Processes:
    """Where this process runs, and beside how many."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def join(machine: Machine) -> Processes:
    """Take a device, say how it computes and, under torchrun, join the other processes.

    Raises:
        ValueError: CUDA was asked for and is not there, or there are fewer devices than processes on this machine.
    """
    device = machine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("machine.device is cuda, but torch sees no CUDA device; set it to auto or cpu")
    if device == "cuda":
        choose_algorithms(machine.cudnn_benchmark, machine.deterministic)
    if "RANK" not in os.environ:
        return Processes(torch.device(device))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local + 1} of this machine has no CUDA device of its own: torch sees "
                f"{torch.cuda.device_count()}; set machine.processes to that, or to auto"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not dist.is_initialized():
        # What lies in the host's memory, a checkpoint, is sent from there: a GPU need not hold it once more.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        # Shards are dealt out in advance, so one process may wait hours for another.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return Processes(torch.device(device), rank, world)


def choose_algorithms(cudnn_benchmark: bool, deterministic: bool) -> None:
    """Set, for this process, whether cuDNN times its algorithms, and whether CUDA may use only deterministic ones.

    With the latter, what has no deterministic way raises a RuntimeError that names it.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # it is there to find errors, and takes time
    torch.use_deterministic_algorithms(deterministic)


def capture(network: nn.Module, pixels: Tensor) -> nn.Module:
    """Record a network's forward and backward pass for batches of one shape as CUDA graphs.

    Each is launched as one then, where a deep network on small images waits for its thousands of launches. The kernels
    are the same, and the network is as before. Only what the GPU computes is repeated: no hook, no random number of the
    host. For one process, and one forward and backward pass a step, since activations and gradients lie in fixed
    places.

    Args:
        pixels: (B, 3, R, R) uint8 on the GPU; values do not matter.

    Returns:
        what to call in the network's place; the network itself, and a warning, where it cannot be recorded. What is
        wrong with more than the recording will show at the first step.
    """
    state = [(buffer, buffer.clone()) for buffer in network.buffers()]  # passes that warm up move BatchNorm's
    stream = torch.cuda.current_stream()
    # Gradients stay where they were made, on the recording's stream, which torch warns of.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    captured = network
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # the first product on that stream
            # In a wrapper, since recording changes `forward`, and validation calls the network itself with batches of
            # other shapes. Local to this thread: another's may ask CUDA for pinned memory meanwhile, as the
            # DataLoader's of another run in this process does (benchmarks/engine.py).
            captured = torch.cuda.make_graphed_callables(
                nn.Sequential(network), (pixels,), capture_error_mode="thread_local"
            )
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        print(f"warning: goes on without CUDA graphs, which could not be recorded: {why}", file=sys.stderr, flush=True)
    finally:
        torch.cuda.set_stream(stream)  # a recording that failed leaves its own behind
        for buffer, value in state:
            buffer.copy_(value)
    if captured is network:
        torch.cuda.empty_cache()
    return captured


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; the host does not wait for what a GPU has still to do, as from pageable memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wait_for_all(processes: Processes) -> None:
    """Wait until every process has come here."""
    if processes.world > 1:
        dist.barrier()


def from_first(processes: Processes, value: Any) -> Any:
    """Give every process the first one's value, whatever it has itself; the value is pickled on the way."""
    told = [value]
    if processes.world > 1:
        dist.broadcast_object_list(told)
    return told[0]


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
