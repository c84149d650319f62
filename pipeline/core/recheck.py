"""Ask the teacher again about stored views, and compare what it says now with what is stored."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.labelling import Labelling, cut
from pipeline.core.progress import Progress
from pipeline.core.softlabels import SoftLabels, dense

TOLERANCE = 1e-3  # nats: other arithmetic may move a stored number by a step of its rounding


class Findings(NamedTuple):
    """What the teacher's present answers say of the stored ones; one entry a view."""

    samples: np.ndarray  # (N,) uint64: ids
    replicas: np.ndarray  # (N,) int64
    same: np.ndarray  # (N,) bool: coded and decoded, the present answer is the stored one to the bit
    lost: np.ndarray  # (N,) KL(teacher now, stored), nats
    lost_by_coding: np.ndarray  # (N,) KL(teacher now, coded and decoded), nats

    @property
    def wrong(self) -> np.ndarray:
        """(N,) bool: the views whose stored answer is not the teacher's."""
        return ~(self.lost <= self.lost_by_coding + TOLERANCE)


def recheck(labelling: Labelling, labels: SoftLabels, numbers: np.ndarray, title: str) -> Findings:
    """Compare the stored answers to views with the teacher's present ones.

    Args:
        numbers: (N,) int64, of the views, all of them stored.
        title: of the progress lines.

    Raises:
        ValueError: a view is not stored, or a shard is damaged.
    """
    coding, found = labels.coding, []
    parts = cut(numbers, labelling.params.cache.batch_size)
    answers = labelling.answers([labelling.rows_and_replicas(part) for part in parts])
    with Progress(len(numbers), "views", title) as progress:
        for part, logits in zip(parts, answers, strict=True):
            logits = logits.cpu()
            stored = labels.read(labelling.keys(part))
            coded = coding.decode(coding.encode(logits))
            stored, coded = (dense(which, coding.num_classes) for which in (stored, coded))
            now = torch.softmax(logits.double(), 1)
            found.append(((stored == coded).all(1).numpy(), _divergence(now, stored), _divergence(now, coded)))
            progress.update(len(part))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    rows, replicas = labelling.rows_and_replicas(numbers)
    return Findings(labelling.views.images.ids[rows], replicas, *columns)


def _divergence(expected: Tensor, found: Tensor) -> np.ndarray:
    found = found.double().clamp(min=1e-300)
    return (torch.special.xlogy(expected, expected) - torch.special.xlogy(expected, found)).sum(1).numpy()
