"""Batches of views, rendered by worker processes where there are any; and a network asked about clean ones."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection, forkserver, queues
from typing import Literal

import joblib
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.core import errors
from pipeline.core.data import views
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec

RowsAndReplicas = tuple[np.ndarray, np.ndarray]  # (B,) int64 each
MOST_WORKERS = 16  # that `auto` starts
CLEAN_BATCH = 128  # clean views in a batch, where no setting says otherwise


@dataclass(frozen=True)
class Batch:
    """Views of B samples."""

    rows: np.ndarray  # (B,) int64: the samples, as rows of the image set
    replicas: np.ndarray  # (B,) int64: which of their views
    pixels: Tensor  # (B, 3, R, R) uint8
    partner_rows: np.ndarray  # (B,) int64: the samples mixed in; a sample's own row where there is none
    shares: Tensor  # (B,) float32: how much of each view is the sample's own

    def pin_memory(self) -> "Batch":
        """Move the tensors to memory that a GPU can fetch from by itself; the DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory(), shares=self.shares.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors to a device."""
        pixels, shares = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.shares))
        return replace(self, pixels=pixels, shares=shares)

    def parts(self, count: int) -> list["Batch"]:
        """Cut the batch into `count` batches of as equal a size as can be; fewer where there are fewer samples."""
        ends = np.linspace(0, len(self.rows), min(count, len(self.rows)) + 1).round().astype(int).tolist()
        fields = vars(self)
        return [Batch(**{name: fields[name][a:b] for name in fields}) for a, b in itertools.pairwise(ends)]


class Views(Dataset):
    """Renders batches: give it (rows, replicas), get a `Batch`.

    Args:
        images: the image set.
        spec: what views may look like.
    """

    def __init__(self, images: ImageSet, spec: ViewSpec):
        self.images, self.spec, self.resolution = images, spec, spec.resolution
        self.partners = images.ids[images.rows("labelled")]  # ascending, as all ids are

    def __getitem__(self, batch: RowsAndReplicas) -> Batch:
        rows, replicas = batch
        rendered = [self._render(int(row), int(replica)) for row, replica in zip(rows, replicas, strict=True)]
        pixels, partner_rows, shares = zip(*rendered, strict=True)
        return Batch(rows, replicas, torch.from_numpy(np.stack(pixels)), np.array(partner_rows), torch.tensor(shares))

    def partner_ids(self, rows: np.ndarray, replicas: np.ndarray) -> np.ndarray:
        """The ids (N,) uint64 of the samples mixed into views, a sample's own where none is; nothing is rendered."""
        ids = self.images.ids[rows]
        if not self.spec.mix_probability:
            return ids
        for at, (sample_id, replica) in enumerate(zip(ids.tolist(), replicas.tolist(), strict=True)):
            partner = views.draw_partner(self.spec, sample_id, replica, self.partners)
            if partner is not None:
                ids[at] = partner
        return ids

    def _render(self, row: int, replica: int) -> tuple[np.ndarray, int, float]:
        image = self.images.encoded_image(row)
        view = views.draw(self.spec, int(self.images.ids[row]), replica, self.partners)
        if view.partner is None:
            return views.render(self.spec, view, image, None), row, 1.0
        other = int(self.images.row_of(np.array([view.partner], np.uint64))[0])
        of_partner = views.draw(self.spec, view.partner, replica, self.partners)
        return views.render(self.spec, view, image, (of_partner, self.images.encoded_image(other))), other, view.share


class CleanViews(Dataset):
    """Renders batches of the view that networks are tested on, in which nothing is mixed: as `Views` is asked.

    Args:
        images: the image set.
        resolution: pixels a side.
        crop: share of the shorter side that the centre crop takes.
    """

    def __init__(self, images: ImageSet, resolution: int, crop: float):
        self.images, self.resolution, self.crop = images, resolution, crop

    def __getitem__(self, batch: RowsAndReplicas) -> Batch:
        rows, replicas = batch
        pixels = [views.render_test(self.images.image(int(row)), self.resolution, self.crop) for row in rows]
        return Batch(rows, replicas, torch.from_numpy(np.stack(pixels)), rows, torch.ones(len(rows)))


def load(
    dataset: Dataset,
    batches: Iterable[RowsAndReplicas],
    workers: int | Literal["auto"],
    device: torch.device,
    again: bool = False,
) -> DataLoader:
    """Render batches, in worker processes where there are any, a few ahead.

    Args:
        workers: as `machine.workers`; no more of them than batches, where these are a list.
        again: the same batches are asked for again: worker processes, which take seconds to start, stay for that.
    """
    if workers == "auto":
        workers = spare_cores() if device.type == "cuda" else 0
    if isinstance(batches, list):
        workers = min(workers, len(batches))
    if workers:
        _start_server()
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,
        collate_fn=_into_shared_memory if workers else None,
        persistent_workers=again and workers > 0,
        worker_init_fn=_prepare_worker if workers else None,
    )


def spare_cores() -> int:
    """How many cores this process has beside its own, from 1 to 16: its share of what a container or batch job may use.

    More workers than that take shared memory by the gigabyte, and another stage may be at work beside this one.
    """
    share = joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(share - 1, 1), MOST_WORKERS)


def _start_server() -> None:
    """Start the process that workers are forked from, unless it is there.

    It imports what this process has of the pipeline, once for all workers, since they run its program's imports; not
    the program, which would be there twice then. It is deaf to Ctrl-C, as workers are: they end with the program.
    """
    multiprocessing.set_forkserver_preload(
        ["torch", *sorted(name for name in sys.modules if name.startswith("pipeline.core."))]
    )
    # A program that is stopped ends at once (stage.py); that Python then clears up after it would look like an error.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, heard)


def _into_shared_memory(batch: Batch | Tensor | tuple[Tensor, ...]) -> Batch | Tensor | tuple[Tensor, ...]:
    """Move a worker's tensors to where the program reads them.

    Else the queue does so, in a thread whose errors say less.
    """
    parts = vars(batch).values() if isinstance(batch, Batch) else batch if isinstance(batch, tuple) else (batch,)
    for part in parts:
        if isinstance(part, Tensor):
            try:
                part.share_memory_()
            except RuntimeError as error:
                raise RuntimeError(f"no shared memory: {error}") from None
    return batch


def _prepare_worker(number: int) -> None:
    """Have this worker process end as the program does that it serves, however that ends; the server waits for both.

    It also ends where it cannot hand a batch over: the thread that does so would drop the batch and go on.
    """
    program = multiprocessing.parent_process()
    assert program is not None

    def watch() -> None:
        connection.wait([program.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    queues.Queue._on_queue_feeder_error = staticmethod(_end_with_error)


def _end_with_error(error: Exception, batch: object) -> None:
    try:
        sys.stderr.write(f"a worker process cannot hand over what it has: {errors.in_a_line(error)}\n")
        sys.stderr.flush()
    finally:
        os._exit(1)


@torch.inference_mode()
def ask(
    network: Callable[[Tensor], Tensor],
    views: CleanViews,
    rows: np.ndarray,
    workers: int | Literal["auto"],
    device: torch.device,
    batch_size: int = CLEAN_BATCH,
) -> Iterator[tuple[Batch, Tensor]]:
    """Ask a network about clean views: give each batch, on the device, and its logits (B, C) float32.

    Args:
        network: gives logits for pixels (B, 3, R, R) float32, 0 to 255; in eval mode, and on the device.
        rows: (N,) of the image set.
        workers: as `machine.workers`.
    """
    for batch in load(views, in_order(rows, batch_size), workers, device):
        there = batch.to(device)
        yield there, network(there.pixels.float()).float()


def in_order(rows: np.ndarray, batch_size: int) -> list[RowsAndReplicas]:
    """Cut rows into batches of replica 0, the last one smaller."""
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [(part, np.zeros(len(part), np.int64)) for part in parts]
