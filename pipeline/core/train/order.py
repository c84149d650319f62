"""Which images make up each batch of a training, in an order that is a pure function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np

from pipeline.core.data.batches import RowsAndReplicas
from pipeline.core.sharing import images_at_once

EVERY_REPLICA = 0  # "as many replicas as there are epochs": each epoch sees views of its own


class TrainingOrder:
    """Which views make up each batch of a training run.

    The order is drawn over the rows, which ascend as ids do, so it does not depend on where a file was found; the last
    images of an epoch that do not fill a batch are left out of it, and each epoch leaves out others.

    Args:
        rows: (N,) the samples to train on.
        batch_size: images a step, all processes together.
        seed: of the order.
        replicas: an epoch shows replica (epoch mod replicas); EVERY_REPLICA: replica = epoch.
        rank, world: this process takes every world-th image of each batch.
        parts: that each process computes its share of a batch in, one after another.

    Raises:
        ValueError: there are fewer than two samples, or a batch cannot be shared out: see `sharing.images_at_once`.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        replicas: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ):
        images_at_once(batch_size, parts, world, len(rows))
        self.rows = np.sort(rows).astype(np.int32)
        self.batch_size = min(batch_size, len(rows))
        self.seed, self.replicas, self.rank, self.world, self.parts = seed, replicas, rank, world, parts
        self.steps_per_epoch = len(rows) // self.batch_size
        self._order = (-1, self.rows)  # the last epoch that was asked for, and its order

    def batches(self, first_step: int, steps: int) -> Iterator[RowsAndReplicas]:
        """Give (rows, replicas) of this process for the steps from `first_step` up to `steps`."""
        for step in range(first_step, steps):
            rows, replicas = self.whole_batch(step)
            yield rows[self.rank :: self.world], replicas[self.rank :: self.world]

    def whole_batch(self, step: int) -> RowsAndReplicas:
        """Give (rows, replicas) of all processes together for one step."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._order[0]:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = epoch, random.permutation(self.rows)
        rows = self._order[1][at * self.batch_size : (at + 1) * self.batch_size].astype(np.int64)
        return rows, np.full(len(rows), epoch % self.replicas if self.replicas else epoch)
