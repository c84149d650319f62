"""Where a process computes, and beside how many others."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.sections import Machine

# Torch's names of instructions for bfloat16.
WITH_BFLOAT16 = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "sve_bf16")


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
        if rank == 0 and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            print("waiting for the processes of the other machines", flush=True)
        # What lies in the host's memory, a checkpoint, is sent from there: a GPU need not hold it once more.
        backend, options = "gloo", None
        if device.startswith("cuda"):
            backend, options = "cpu:gloo,cuda:nccl", dist.ProcessGroupNCCL.Options()
            options.lazy_init = True  # NCCL connects the GPUs in training stages alone, which exchange gradients
        # Who has not come by then will not come.
        dist.init_process_group(backend, timeout=timedelta(minutes=30), pg_options=options)
        # Shards are dealt out in advance, so one process may wait hours for another.
        dist.set_timeout(timedelta(days=7))
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


def warn_of_slow(stage: str, key: str, precision: str, processes: Processes) -> None:
    """Say that a processor has no instructions for bfloat16, where a stage is to compute in it.

    Args:
        key: the setting that gives the precision.
    """
    if precision != "bfloat16" or processes.device.type != "cpu" or not processes.first():
        return
    known = torch.cpu.get_capabilities()
    if not any(known.get(name) for name in WITH_BFLOAT16):
        print(
            f"{stage}: warning: {key} is bfloat16, for which this processor has no instructions: float32 may take a "
            "tenth of the time",
            flush=True,
        )


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; the host does not wait for what a GPU has still to do, as from pageable memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def check_same(processes: Processes, work: dict[str, Any]) -> None:
    """Make sure that all processes are about to do the same.

    Args:
        work: settings, digests and versions, by what they are.

    Raises:
        ValueError: one has others; it names what these are.
    """
    works: list[Any] = [work] * processes.world
    if processes.world > 1:
        dist.all_gather_object(works, work)
    if differ := [what for what in work if any(one[what] != work[what] for one in works)]:
        raise ValueError(
            f"the processes have not the same {', '.join(differ)}: start them in one folder, which several machines "
            "share, with the same packages, and edit nothing there until all have begun"
        )


def wait_for_all(processes: Processes) -> None:
    """Wait until every process has come here."""
    if processes.world > 1:
        _meet()


def from_first(processes: Processes, value: Any) -> Any:
    """Give every process the first one's value, whatever it has itself; the value is pickled on the way."""
    told = [value]
    if processes.world > 1:
        dist.broadcast_object_list(told)
    return told[0]


def leave() -> None:
    """Part from the other processes, once all have done their work: who went before would take the others down."""
    if dist.is_initialized():
        _meet()
        dist.destroy_process_group()


def _meet() -> None:
    dist.all_reduce(torch.zeros(1))  # in the host's memory: a barrier of NCCL's would keep the GPUs busy
