"""Asking the teacher about the views that stage cache stores and `pipeline.audit` checks; teaching.py has the rules."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.core import networks, teaching
from pipeline.core.data.batches import RowsAndReplicas, Views, load
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.sections import Params
from pipeline.core.softlabels import Description, make_keys


@dataclass(frozen=True)
class Labelling:
    """A teacher and N views to ask it about: view n is replica n mod R of sample n div R, with R = `cache.replicas`.

    There may be billions of views, so they are named by their numbers, some at a time.
    """

    params: Params
    processes: Processes
    classifier: Classifier
    description: Description  # what the teacher's answers depend on
    views: Views
    rows: np.ndarray  # (S,) int64: the samples, ascending, as the images' ids are

    @classmethod
    def of(cls, params: Params, processes: Processes) -> "Labelling":
        """Open the teacher in data/teacher, and the labelled and mined images.

        Raises:
            ValueError: a stage before has not been run, or not with the present images; it is named.
        """
        images = ImageSet(Path("data/prepare/images"))
        classifier, card = networks.load(teaching.TEACHER, processes.device)
        networks.check_classes(teaching.TEACHER, card, images.classes)
        views = Views(images, ViewSpec.of(params.seed, params.views))
        description, rows = teaching.description(params, card), teaching.training_rows(images)
        return cls(params, processes, classifier, description, views, rows)

    def __len__(self) -> int:
        return len(self.rows) * self.params.cache.replicas

    def rows_and_replicas(self, numbers: np.ndarray) -> RowsAndReplicas:
        """Say which sample (its row), and which replica of it, some views are."""
        replicas = self.params.cache.replicas
        return self.rows[numbers // replicas], numbers % replicas

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """Give the keys (N,) uint64 of some views in the cache; nothing is rendered."""
        rows, replicas = self.rows_and_replicas(numbers)
        return make_keys(self.views.images.ids[rows], replicas, self.views.partner_ids(rows, replicas))

    def answers(self, batches: Iterable[RowsAndReplicas]) -> Iterator[Tensor]:
        """Give the teacher's logits (B, C) float32, on its device, for one batch of views after the other.

        Views are rendered in worker processes, a few batches ahead: no more of them than batches, where these are a
        list.
        """
        device, precision = self.processes.device, self.params.teacher.precision
        for batch in load(self.views, batches, self.params.machine.workers, device):
            yield teaching.answer(self.classifier, batch.pixels.to(device, non_blocking=True), precision)


def cut(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut numbers into parts of a size, the last one smaller."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
