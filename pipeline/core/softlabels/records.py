"""Records: a probability distribution as its top-k classes, their log-probabilities, and the rest's mass."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SparseLabels(NamedTuple):
    """The stored answers for B views."""

    classes: np.ndarray  # (B, k) int64, the most probable first
    log_probabilities: np.ndarray  # (B, k) float32
    log_rest: np.ndarray  # (B,) float32: logarithm of the mass of all other classes; -inf where there is none


def record_type(top_k: int, num_classes: int) -> np.dtype:
    """Give the record's layout: little-endian, without padding."""
    number = "<u2" if num_classes <= 2**16 else "<u4"
    return np.dtype([("classes", number, (top_k,)), ("log_probabilities", "<f2", (top_k,)), ("log_rest", "<f2")])


def pack(logits: Tensor, top_k: int) -> np.ndarray:
    """Turn logits (B, C) into B records of the k most probable classes; ties go to the lower class number."""
    log_probabilities = torch.log_softmax(logits.double(), dim=1).cpu()
    values, classes = log_probabilities.sort(dim=1, descending=True, stable=True)
    records = np.zeros(len(logits), record_type(top_k, logits.shape[1]))
    records["classes"] = classes[:, :top_k].numpy()
    records["log_probabilities"] = values[:, :top_k].numpy()
    rest = values[:, top_k:]
    records["log_rest"] = torch.logsumexp(rest, dim=1).numpy() if rest.shape[1] else -np.inf
    return records


def unpack(records: np.ndarray) -> SparseLabels:
    """Turn B records back into numbers."""
    return SparseLabels(
        records["classes"].astype(np.int64),
        records["log_probabilities"].astype(np.float32),
        records["log_rest"].astype(np.float32),
    )


def dense(labels: SparseLabels, num_classes: int, temperature: float = 1.0) -> Tensor:
    """Give whole distributions (B, C) float32 at a temperature; the rest's mass is spread evenly.

    The temperature divides the logits before the softmax (Hinton et al., arXiv:1503.02531), which is the same as
    dividing log-probabilities and normalising again: one cache serves any temperature.
    """
    top = torch.from_numpy(labels.log_probabilities)
    others = num_classes - top.shape[1]
    each = torch.from_numpy(labels.log_rest)[:, None] - float(np.log(max(1, others)))
    logits = each.expand(-1, num_classes).clone() if others else torch.full((len(top), num_classes), -torch.inf)
    logits.scatter_(1, torch.from_numpy(labels.classes), top)
    return torch.softmax(logits / temperature, dim=1)
