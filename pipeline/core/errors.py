"""Kinds of errors, told apart by their words: torch and its libraries have no classes for most of them.

A stage that ends with an error says it in one line, STAGE: MARK: WORDS, on stderr.
"""

import errno
import os

# Marks of that line. A stage that refuses would do so again; one that ends with another of them the flow starts again,
# as torchrun does.
REFUSED, LEFT_ALONE, CUT_SHORT = "error", "left alone", "cut short"

OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "alloc_failed",  # CUDA's, as the next
    "allocation_failed",
    "unable to allocate",  # NumPy's in a worker process
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU (torch.OutOfMemoryError) or on the CPU."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(one in words for one in OUT_OF_MEMORY)
    )


def out_of_shared_memory(error: BaseException) -> bool:
    """Whether an error of torch's DataLoader says that a worker process found no room to hand its batch over."""
    words = str(error)
    return isinstance(error, RuntimeError) and "DataLoader worker" in words and "shared memory" in words


def too_many_open_files(error: BaseException) -> bool:
    """Whether an error says that a process has as many files open as it may; of a worker process a RuntimeError."""
    return isinstance(error, OSError | RuntimeError) and "Too many open files" in str(error)


def of_machine(error: BaseException) -> bool:
    """Whether an error says something of this machine (too many open files, no memory), and nothing of the file."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def in_a_line(error: BaseException) -> str:
    """Give an error's message in a line, or its class where it has none; of a DataLoader worker's error, that alone."""
    words = str(error)
    if (
        isinstance(error, OSError) and error.filename and error.strerror and not error.filename2
    ):  # else "[Errno 2] No such ...: 'FILE'"
        words = f"{error.filename}: {error.strerror}"
    if "DataLoader worker process" in words and "Original Traceback" in words:
        words = words.rpartition(f"\n{type(error).__name__}: ")[2]
    return " ".join(words.split()) or type(error).__name__


def of_compiler(error: BaseException) -> bool:
    """Tell an error of torch.compile, as where there is no C++ compiler."""
    return type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))


def left_alone(error: BaseException) -> bool:
    """Whether an error says that another process is not there any more, as gloo, NCCL and torch's store say it."""
    return (
        "RANK" in os.environ
        and isinstance(error, RuntimeError)
        and ("gloo/" in str(error) or "NCCL" in str(error) or type(error).__name__.startswith("Dist"))
    )


def no_nccl(error: BaseException) -> bool:
    """Whether an error says that NCCL cannot connect the GPUs here, and would not at another try."""
    words = str(error)
    return (
        isinstance(error, RuntimeError)
        and "Failed to initialize NCCL" in words
        and "remote process exited" not in words
    )


def worker_lost(error: BaseException) -> bool:
    """Whether an error of torch's DataLoader says that a worker process was killed, or ended with a line of its own."""
    words = str(error)
    return isinstance(error, RuntimeError) and "DataLoader worker" in words and "exited unexpectedly" in words
