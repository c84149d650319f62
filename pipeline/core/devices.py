"""Where a process computes, and beside how many others."""

import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """Where this process runs, and beside how many."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def join(device: str) -> Processes:
    """Take a device and, under torchrun, join the other processes.

    Raises:
        ValueError: CUDA was asked for and is not there, or there are fewer devices than processes on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("machine.device is cuda, but torch sees no CUDA device; set it to auto or cpu")
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
        # Shards are dealt out in advance, so one process may wait hours for another.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
    return Processes(torch.device(device), rank, world)


def choose_algorithms(cudnn_benchmark: bool, deterministic: bool) -> None:
    """Say how CUDA computes: by what cuDNN takes for fast or tries out, or in the same way every time.

    What has no deterministic way then raises a RuntimeError that names it.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


class _Captured(nn.Module):
    """A network for training alone: asked itself, in validation, it computes as ever."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)


def capture(network: nn.Module, pixels: Tensor) -> nn.Module:
    """Record a network's forward and backward pass for batches of one shape as CUDA graphs.

    Each is launched as one then, where a deep network on small images waits for its thousands of launches. The kernels
    are the same, and the network is as before. For one process, and one backward pass a step, since gradients lie in
    fixed places.

    Args:
        pixels: (B, 3, R, R) uint8 on the GPU; values do not matter.

    Raises:
        ValueError: the network does something that a graph cannot hold, such as looking at a value.
    """
    state = [(buffer, buffer.clone()) for buffer in network.buffers()]  # passes that warm up move BatchNorm's
    # Gradients lie where they were made, on the capture's stream, and the first product there finds no context: both
    # are as they should be.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
    try:
        # What other threads ask CUDA for meanwhile, a DataLoader's for pinned memory, is no part of it.
        captured = torch.cuda.make_graphed_callables(_Captured(network), (pixels,), capture_error_mode="thread_local")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # a hook of the network is an assertion's
        raise ValueError(
            f"the network's passes cannot be captured ({str(error).splitlines()[0]}); set machine.cuda_graphs to false"
        ) from error
    for buffer, value in state:
        buffer.copy_(value)
    return captured


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; the host does not wait for what a GPU has still to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wait_for_all(processes: Processes) -> None:
    """Wait until every process has come here."""
    if processes.world > 1:
        dist.barrier()


def profiler(device: torch.device, steps: int, file: Path) -> torch.profiler.profile:
    """Make a profiler whose `step()` is called after each step of a loop; it traces `steps` of them, after the third.

    Args:
        file: the trace, as Chrome's and Perfetto's pages open it (.json.gz).
    """

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(file))
        print(f"trace of {steps} steps: {file}; https://ui.perfetto.dev opens it", file=sys.stderr, flush=True)

    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])],
        schedule=torch.profiler.schedule(wait=1, warmup=2, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
    )
