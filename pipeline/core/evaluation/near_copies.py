"""Test images that are near-copies of labelled images, so that a network may have learned their answers.

Of CIFAR-10's test images 3.3 % have such a copy among the training images, of CIFAR-100's 10 % (Barz & Denzler, "Do We
Train on Test Data? Purging CIFAR of Near-Duplicates", arXiv:1902.00423).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.core.data import batches
from pipeline.core.data.dataset import ImageSet
from pipeline.core.mining import copies
from pipeline.core.mining.thumbnails import SIDE, thumbnails
from pipeline.core.progress import Progress

BATCH = 256  # images a worker process decodes for a batch
BLOCK = 16_384  # labelled images compared with at once: 160 MB
DECIMALS = 4  # of a similarity: further ones depend on the machine
COLUMNS = ("id", "source", "class", "labelled_id", "labelled_source", "labelled_class", "similarity", "alignment")


class Pair(NamedTuple):
    """A test image and the labelled image that it is most like.

    Attributes:
        test, labelled: their rows in the image set.
        similarity: from the threshold to 1.
        alignment: what of the two is alike ("inner part": the test image is that of the labelled one; "its inner part":
            the reverse).
    """

    test: int
    labelled: int
    similarity: float
    alignment: str


@dataclass(frozen=True)
class Thumbnails(Dataset):
    """Decodes images: give it (rows, replicas), get thumbnails (B, 32, 32) uint8."""

    images: ImageSet

    def __getitem__(self, batch: batches.RowsAndReplicas) -> Tensor:
        return torch.from_numpy(thumbnails(self.images.image(int(row)) for row in batch[0]))


def find(images: ImageSet, threshold: float, workers: int | Literal["auto"], device: torch.device) -> list[Pair]:
    """Find the test images that are near-copies of a labelled image.

    Args:
        threshold: the similarity from which on two images are near-copies.
        workers: as `machine.workers`.
        device: where to compare images.

    Returns: the most similar pair first.
    """
    test, labelled = images.rows("test"), images.rows("labelled")
    rows = np.concatenate([test, labelled])
    small, filled = np.empty((len(rows), SIDE, SIDE), np.uint8), 0
    with Progress(len(rows), "images", "evaluate: thumbnails") as progress:
        for part in batches.load(Thumbnails(images), batches.in_order(rows, BATCH), workers, device):
            small[filled : filled + len(part)] = part.numpy()
            filled += len(part)
            progress.update(len(part))
    of_test, of_labelled = small[: len(test)], small[len(test) :]
    best: dict[int, Pair] = {}
    with Progress(len(labelled), "images", "evaluate: near-copies") as progress:
        for start in range(0, len(labelled), BLOCK):
            block = of_labelled[start : start + BLOCK]
            found = copies.nearest(of_test, block, threshold, device)
            progress.update(len(block))
            for at in np.flatnonzero(found.similarity >= threshold):
                pair = Pair(
                    int(test[at]),
                    int(labelled[start + found.which[at]]),
                    round(float(found.similarity[at]), DECIMALS),
                    copies.ALIGNMENTS[found.alignment[at]].name,
                )
                best[pair.test] = max(best.get(pair.test, pair), pair, key=lambda each: each.similarity)
    return sorted(best.values(), key=lambda pair: (-pair.similarity, pair.test))


def table(pairs: list[Pair], images: ImageSet) -> list[dict[str, Any]]:
    """Give near_copies.csv's rows, a pair each."""

    def named(row: int, prefix: str = "") -> dict[str, str]:
        values = format(int(images.ids[row]), "016x"), images.source(row), images.classes[images.labels[row]]
        return {f"{prefix}{name}": value for name, value in zip(("id", "source", "class"), values, strict=True)}

    return [
        named(pair.test)
        | named(pair.labelled, "labelled_")
        | {"similarity": f"{pair.similarity:.{DECIMALS}f}", "alignment": pair.alignment}
        for pair in pairs
    ]
