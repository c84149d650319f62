"""What a network needs to be exported, as an MLflow model (registry.py) or as ONNX (onnx_file.py)."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def example(resolution: int) -> np.ndarray:
    """Make an input example (2, 3, R, R): a ramp to the right and one downwards.

    Nobody's picture goes to the registry with it. Of one image alone, the exported batch size would be fixed at 1.
    """
    ramp = np.linspace(0, 255, resolution, dtype=np.float32).round()
    right = np.broadcast_to(ramp, (3, resolution, resolution))
    return np.ascontiguousarray(np.stack([right, right.transpose(0, 2, 1)]))


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Have torch not note where on this machine the code of each step lies that it exports meanwhile.

    It also saves a fifth of the time.
    """
    import torch.fx.config  # torch takes seconds to import: who looks a version up should not wait for it

    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before
