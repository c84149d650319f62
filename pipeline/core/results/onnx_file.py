"""A network as an ONNX file, for where torch is not: ONNX Runtime, TensorRT, OpenVINO and others take it.

Its input is `pixels`, float32 (B, 3, R, R), RGB, 0 to 255, of any B; its output `logits`, float32 (B, C). Its metadata
has the names of the classes, in order, as JSON.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core import errors
from pipeline.core.results import exporting

if TYPE_CHECKING:  # torch takes seconds to import: who looks a version up should not wait for it
    from torch import Tensor, nn

MOST_GIGABYTES = 1.9  # of weights; a protobuf file holds 2


def write(file: Path, network: "nn.Module", example: np.ndarray, classes: list[str]) -> None:
    """Write a network as an ONNX file.

    Args:
        network: on the CPU, in eval mode; pixels (B, 3, R, R) float32 -> logits (B, C).
        example: pixels (2, 3, R, R); with one image alone, the file would take no other number.
        classes: C names.

    Raises:
        ValueError: ONNX has not all that the network does.
    """
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from pipeline.core import small_maps

    gigabytes = sum(value.numel() * value.element_size() for value in network.state_dict().values()) / 1e9
    if gigabytes > MOST_GIGABYTES:
        raise ValueError(f"it cannot be written as one ONNX file: its weights take {gigabytes:.1f} GB")
    network = small_maps.exportable(network)
    try:
        with warnings.catch_warnings(), torch.no_grad(), exporting.without_stack_traces():
            warnings.simplefilter("ignore")  # what they speak of is torch's own
            program = torch.onnx.export(
                network,
                (torch.from_numpy(example),),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),  # the dimension's name in the file; its size is free
                input_names=["pixels"],
                output_names=["logits"],
                verbose=False,
                external_data=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # the exporter's own, and what its optimizer lets through
        raise ValueError(f"it cannot be written as ONNX: {errors.in_a_line(error.__cause__ or error)[:300]}") from None
    ClearMetadataAndDocStringPass()(program.model)  # which says how torch came to each node
    program.model.metadata_props["classes"] = json.dumps(classes)
    program.save(file, external_data=False)


def load(file: Path) -> "Callable[[Tensor], Tensor]":
    """Read an ONNX file: pixels (B, 3, R, R) float32 -> logits (B, C), on the CPU, through ONNX Runtime.

    Raises:
        ValueError: ONNX Runtime does not take the file, or, from the function given back, the pixels.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # by itself it takes the machine's cores, allowed or not
    with _speaking_plainly():
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def ask(pixels: "Tensor") -> "Tensor":
        with _speaking_plainly():
            return torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])

    return ask


@contextmanager
def _speaking_plainly() -> Iterator[None]:
    """Make one line of an error of ONNX Runtime, whose classes have none but Exception in common."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"ONNX Runtime does not take it: {errors.in_a_line(error)[:300]}") from None
