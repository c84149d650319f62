"""A network's forward and backward pass as CUDA graphs."""

import sys
import warnings

import torch
from torch import Tensor, nn


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
        torch.cuda.set_stream(stream)  # a recording that failed leaves its own behind, with work on it
        torch.cuda.synchronize()
        for buffer, value in state:
            buffer.copy_(value)
    if captured is network:
        torch.cuda.empty_cache()
    return captured
