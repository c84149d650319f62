"""Which images make up each batch of a training, in an order that is a pure function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np

from pipeline.core.data.batches import RowsAndReplicas

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
        ValueError: there are no samples, or a batch cannot be shared out evenly.
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
        if len(rows) == 0:
            raise ValueError("there is no image to train on: see data/prepare/summary.json for what was found")
        self.rows = np.sort(rows).astype(np.int32)
        self.batch_size = min(batch_size, len(rows))
        if self.batch_size < 2 * parts:  # params.yaml's batch_size is more, so there are fewer images
            mend = f"set the stage's accumulate to {len(rows) // 2}" if len(rows) > 1 else "it takes more images"
            raise ValueError(
                f"{len(rows)} images to train on, in {parts} parts a step (accumulate), leave a part fewer than two, "
                f"and BatchNorm needs two: {mend}"
            )
        if world > 1 and self.batch_size % (world * parts):
            each, shares = f" in {parts} parts each" if parts > 1 else "", world * parts
            even = self.batch_size // shares * shares
            other = f"{'its accumulate or ' if each else ''}machine.processes to"
            mend = f"the stage's batch_size to {even}, or {other} another" if even else f"{other} a smaller"
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be shared out evenly to {world} processes{each}; "
                f"set {mend} number"
            )
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
