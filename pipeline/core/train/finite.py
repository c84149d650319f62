"""Whether the losses and weights of a training are finite; and where they are not, a list of the batch's samples."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core import atomic
from pipeline.core.data.batches import RowsAndReplicas
from pipeline.core.data.dataset import ImageSet
from pipeline.core.tables import as_csv

LOOK_EVERY = {"cpu": 1, "cuda": 50}  # steps between two looks at the losses: a look makes a GPU wait


class Losses:
    """The losses of an epoch's steps so far. They stay on the device, so that no step is waited for.

    Args:
        each: one of each step, a scalar.
    """

    def __init__(self, each: Iterable[Tensor] = ()):
        self.each = [*each]
        self.looked = 0  # how many of them were found finite

    def add(self, loss: Tensor) -> None:
        """Take the loss of one more step."""
        self.each.append(loss)

    def not_finite(self) -> int | None:
        """Look at the losses since the last look; say which of the epoch's is the first that is not finite, if any."""
        new = self.each[self.looked :]
        finite = torch.isfinite(torch.stack(new)).tolist() if new else []
        if False in finite:
            return self.looked + finite.index(False)
        self.looked = len(self.each)
        return None

    def stacked(self) -> Tensor:
        """Give all of them, (steps,)."""
        return torch.stack(self.each) if self.each else torch.zeros(0)


def weights_are_finite(part: nn.Module) -> bool:
    """Whether all that is trained of a part is finite, BatchNorm's statistics included."""
    norms = [module for module in part.modules() if isinstance(module, _BatchNorm)]
    learned = [*part.parameters(), *(buffer for norm in norms for buffer in norm.buffers())]
    return bool(torch.stack([value.isfinite().all() for value in learned]).all())


def list_samples(file: Path, images: ImageSet, batch: RowsAndReplicas) -> None:
    """Write a batch's samples to a table: id, replica, source."""
    rows = [
        {"id": f"{images.ids[row]:016x}", "replica": replica, "source": images.source(row)}
        for row, replica in zip(*batch, strict=True)
    ]
    atomic.write_text(file, as_csv(rows))
