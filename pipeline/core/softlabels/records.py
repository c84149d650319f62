"""Records: a probability distribution as its most probable classes, a few bits each, and the rest's mass.

The classes of a record are a set, written as Elias and Fano do (Elias, JACM 1974; Fano, MIT memorandum 61, 1971): in
ascending order, the low bits of each as they are, the high bits as the places of ones in a run of bits. Low bits and
probability share one, two or three whole bytes, whichever makes the record smallest. FORMAT.md names every bit;
`benchmarks/records.py` shows what a record costs and keeps, beside other formats.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_CLASSES = 255  # of a record: their number is one byte
RANGE_STEP = 1 / 8  # nats: the unit of a record's range of log-probabilities
HEAD = np.dtype([("range", "u1"), ("log_rest", "<f2")])
WIDTHS = (8, 16, 24)  # bits that a class may take in a record, besides the run of high bits


class SparseLabels(NamedTuple):
    """The stored answers for B views; the classes of the first, then those of the second, ...: E in all."""

    counts: np.ndarray  # (B,) int32: how many classes are stored of each view, at least 1
    classes: np.ndarray  # (E,) int32, ascending within a view
    log_probabilities: np.ndarray  # (E,) float32
    log_rest: np.ndarray  # (B,) float32: logarithm of the mass of all other classes; -inf where there is none


class Records(NamedTuple):
    """N records."""

    counts: np.ndarray  # (N,) uint8: classes in each; the size of a record follows from it
    content: np.ndarray  # (bytes of all,) uint8, one after another


@dataclasses.dataclass(frozen=True)
class Coding:
    """How distributions become records.

    Args:
        num_classes: C, of the teacher, at most 2^24.
        top_k: most classes of a record, at most 255.
        min_probability: a class below it is not stored, unless it is the most probable one; 0 to 1.
        bits: of a stored log-probability, 2 to 16.

    Raises:
        ValueError: one of them is out of its range.
    """

    num_classes: int
    top_k: int
    min_probability: float
    bits: int

    def __post_init__(self) -> None:
        if not (1 <= self.top_k <= MOST_CLASSES and 2 <= self.bits <= 16 and 1 <= self.num_classes <= 2**24):
            raise ValueError(f"no record holds {self.top_k} of {self.num_classes} classes in {self.bits} bits each")
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"{self.min_probability}, the least probability to be stored, is not from 0 to 1")

    @cached_property
    def _layout(self) -> np.ndarray:
        """(256,) by the number of classes: bits of a class, low bits of it, bytes of the high bits, bytes of all."""
        layout = np.zeros(MOST_CLASSES + 1, [(name, "i4") for name in ("width", "low", "high_bytes", "size")])
        for count in range(MOST_CLASSES + 1):
            choices = []
            for width in WIDTHS:
                if width >= self.bits:
                    low = width - self.bits
                    high_bytes = -(-(count + ((self.num_classes - 1) >> low)) // 8)
                    size = HEAD.itemsize + high_bytes + count * width // 8
                    choices.append((size, width, low, high_bytes))
            size, width, low, high_bytes = min(choices)
            layout[count] = width, low, high_bytes, size
        return layout

    @property
    def sizes(self) -> np.ndarray:
        """(256,) int32: bytes of a record, by the number of classes."""
        return self._layout["size"]

    def encode(self, logits: Tensor) -> Records:
        """Turn logits (B, C) into records; among equal probabilities the lower class numbers are kept.

        Raises:
            ValueError: a logit is not finite.
        """
        if not torch.isfinite(logits).all():
            raise ValueError("the teacher's answer is not finite: no soft label can be made of it")
        log_probabilities = torch.log_softmax(logits.double(), dim=1)
        values, order = log_probabilities.sort(dim=1, descending=True, stable=True)
        values, order = values[:, : self.top_k], order[:, : self.top_k]
        stored = values >= np.log(max(self.min_probability, 1e-300))
        stored[:, 0] = True
        rest = log_probabilities.scatter(1, order, torch.where(stored, -torch.inf, values)).logsumexp(1)
        return self._write(*(part.cpu().numpy() for part in (values, order, stored, rest)))

    def _write(self, values: np.ndarray, order: np.ndarray, stored: np.ndarray, log_rest: np.ndarray) -> Records:
        """Write records of (B, K) descending log-probabilities, their classes, and which are stored; rests (B,)."""
        below = values[:, :1] - values  # nats below the most probable class
        ranges = np.clip(np.ceil(np.where(stored, below, 0).max(1) / RANGE_STEP), 1, 255)
        codes = np.rint(np.minimum(below / (ranges * RANGE_STEP)[:, None], 1) * (2**self.bits - 1)).astype(np.int64)
        by_class = np.argsort(np.where(stored, order, self.num_classes), axis=1, kind="stable")
        counts = stored.sum(1)
        rows, ranks = np.nonzero(np.arange(stored.shape[1]) < counts[:, None])
        classes = np.take_along_axis(order, by_class, 1)[rows, ranks].astype(np.int64)
        codes = np.take_along_axis(codes, by_class, 1)[rows, ranks]

        layout = self._layout[counts]
        starts = _before(layout["size"])
        low = layout["low"][rows]
        bits = np.zeros((int(layout["size"].sum()), 8), np.uint8)
        high = (starts + HEAD.itemsize)[rows] * 8 + (classes >> low) + ranks
        bits.reshape(-1)[high] = 1
        content = np.packbits(bits, axis=1, bitorder="little")[:, 0]

        field = (classes & ((1 << low) - 1)) | (codes << low)
        width = layout["width"][rows] // 8
        at = (starts + HEAD.itemsize + layout["high_bytes"])[rows] + ranks * width
        for byte in range(int(width.max(initial=0))):
            here = byte < width
            content[at[here] + byte] = (field[here] >> (8 * byte)) & 255
        head = np.zeros(len(counts), HEAD)
        head["range"], head["log_rest"] = ranges, log_rest
        content[starts[:, None] + np.arange(HEAD.itemsize)] = head.view(np.uint8).reshape(-1, HEAD.itemsize)
        return Records(counts.astype(np.uint8), content)

    def decode(self, records: Records) -> SparseLabels:
        """Turn B records back into numbers.

        Raises:
            ValueError: a record holds another number of classes than it says.
        """
        counts, content = records.counts.astype(np.int32), records.content
        layout = self._layout[records.counts]
        low, high_bytes, width = layout["low"], layout["high_bytes"], layout["width"] // 8  # bytes of a class
        starts, first = _before(layout["size"]), _before(counts)
        number = np.arange(counts.sum(), dtype=np.int32)  # of the class among all of the batch
        words = _words(content)
        head = words.take(starts)
        step = (head & 255).astype(np.float32) * np.float32(-RANGE_STEP / (2**self.bits - 1))
        log_rest = (head >> 8).astype(np.uint16).view(np.float16).astype(np.float32)

        at = np.repeat(starts + HEAD.itemsize + high_bytes - first * width, counts)
        at += number if (width == 1).all() else number * np.repeat(width, counts)
        field = words.take(at)
        lows = np.repeat(low, counts)
        code = field >> lows
        field -= code << lows
        code &= 2**self.bits - 1  # above it are bits of the next class
        classes = self._high(content, starts, high_bytes, counts, first, number)
        classes <<= lows
        classes |= field

        values = code.astype(np.float32)
        values *= np.repeat(step, counts)
        # The stored classes share what the rest leaves, so their common scale need not be stored.
        total = np.add.reduceat(np.exp(values), first) if len(counts) else np.zeros(0, np.float32)
        values += np.repeat(np.log1p(-np.minimum(np.exp(log_rest), 1 - 1e-7)) - np.log(total), counts)
        return SparseLabels(counts, classes, values, log_rest)

    def _high(
        self,
        content: np.ndarray,
        starts: np.ndarray,
        runs: np.ndarray,
        counts: np.ndarray,
        first: np.ndarray,
        number: np.ndarray,
    ) -> np.ndarray:
        """Read the high bits (E,) of all classes: the place of the n-th one in a record's run of bits, less n."""
        before = _before(runs)
        at = np.repeat(starts + HEAD.itemsize - before, runs)
        at += np.arange(len(at), dtype=np.int32)
        ones = np.flatnonzero(np.unpackbits(content.take(at), bitorder="little").view(bool)).astype(np.int32)
        if len(ones) != len(number):
            raise ValueError("a record holds another number of classes than it says")
        ones -= number
        ones -= np.repeat(before * 8 - first, counts)
        return ones


def _before(sizes: np.ndarray) -> np.ndarray:
    """The sum (N,) of all sizes before each one; int32: the bits of a batch's records are less than 2^31."""
    return np.cumsum(sizes, dtype=np.int32) - sizes


def _words(content: np.ndarray) -> np.ndarray:
    """The four bytes from each byte (N,) on as a number, int32; behind the last byte are zeros."""
    padded = np.concatenate([content, np.zeros(3, np.uint8)])
    return np.ndarray(len(content), "<i4", padded, strides=(1,)).astype(np.int32)


def dense(
    labels: SparseLabels, num_classes: int, temperature: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Give whole distributions (B, C) float32 at a temperature; the rest's mass is spread evenly.

    The temperature divides the logits before the softmax (Hinton et al., arXiv:1503.02531), which is the same as
    dividing log-probabilities and normalising again: one cache serves any temperature.

    Args:
        device: where they are written out; stored probabilities, their places and each view's share of the rest travel
            there.
    """
    counts, classes, values, log_rest = labels
    first = _before(counts)
    top = np.maximum.reduceat(values, first)
    stored = np.exp((values - np.repeat(top, counts)) / temperature)
    others = num_classes - counts
    each = np.exp((log_rest - np.log(np.maximum(others, 1), dtype=np.float32) - top) / temperature)
    total = np.add.reduceat(stored, first) + others * each
    stored /= np.repeat(total, counts).astype(np.float32)
    places = classes + np.repeat(np.arange(len(counts)) * num_classes, counts)  # in the batch, row after row
    arrays = places, stored, (each / total).astype(np.float32)
    tensors = [torch.from_numpy(array) for array in arrays]
    if device is not None and device.type == "cuda":  # from pageable memory the host would wait for the GPU
        tensors = [tensor.pin_memory() for tensor in tensors]
    places, stored, each = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return each.repeat_interleave(num_classes).scatter_(0, places, stored).view(len(counts), num_classes)
