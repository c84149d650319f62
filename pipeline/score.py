"""Scores: the teacher's answer on one clean view of each pool image, and of each validation and test image.

Reads data/prepare and data/teacher. Writes data/score: ids.npy (N,) uint64, logits.npy (N, C) float32, embeddings.npy
(N, D) float16 and thumbnails.npy (N, 32, 32) uint8, row by row the same images, those of the pool first. Thumbnails are
made here because decoding is what takes the time. Run: python -m pipeline.score
"""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.core import atomic, devices, networks, stage
from pipeline.core.batches import RowsAndReplicas, Views, in_order, load
from pipeline.core.dataset import ImageSet
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.params import Params
from pipeline.core.progress import Progress
from pipeline.core.thumbnails import thumbnails
from pipeline.core.views import render_test

PART_IMAGES = 4096  # images scored between two files: what a killed run loses at most
COLUMNS = ("ids", "logits", "embeddings", "thumbnails")


class ViewsAndThumbnails(Views):
    """Decodes each image once: give it (rows, replicas), get clean views (B, 3, R, R) and thumbnails (B, 32, 32)."""

    def __getitem__(self, batch: RowsAndReplicas) -> tuple[Tensor, Tensor]:
        views, small = [], []
        for row in batch[0]:
            image = self.images.image(int(row))
            views.append(render_test(image, self.resolution, self.crop))
            small.append(thumbnails([image])[0])
        return torch.from_numpy(np.stack(views)), torch.from_numpy(np.stack(small))


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    processes = devices.join(params.machine)
    classifier, card = networks.load(Path("data/teacher"), processes.device)
    rows = np.concatenate([images.rows("unlabelled"), images.rows("val", "test")])
    asked = [
        images.digest,
        card["digest"],
        card["mean"],
        card["std"],
        params.teacher.precision,
        params.views.resolution,
        params.views.test_crop,
    ]
    key = hashlib.sha256(json.dumps([*asked, stage.code_digest()]).encode()).hexdigest()[:16]
    parts = stage.SCRATCH / "score" / key
    if not processes.first():
        devices.wait_for_all(processes)  # until the first process has cleared what others left
        score_parts(classifier, images, rows, params, parts, processes)
        return
    with stage.only_writer("score"):
        stage.begin_run(parts)
        devices.wait_for_all(processes)
        score_parts(classifier, images, rows, params, parts, processes)
        with atomic.replacing_folder(Path("data/score")) as folder:
            join_parts(parts, len(rows), folder)
        shutil.rmtree(parts)
    print(f"score: {len(rows):,} images")


@torch.inference_mode()
def score_parts(
    classifier: Classifier, images: ImageSet, rows: np.ndarray, params: Params, folder: Path, processes: Processes
) -> None:
    """Score the parts that are not there yet, every world-th in each process; each part is one .npz file."""
    views = ViewsAndThumbnails(images, None, params.views.resolution, params.views.test_crop)
    parts = [rows[start : start + PART_IMAGES] for start in range(0, len(rows), PART_IMAGES)]
    missing = [(n, part) for n, part in enumerate(parts) if not _file(folder, n).exists()]
    devices.wait_for_all(processes)  # all see the same parts missing before the first one comes
    mine = missing[processes.rank :: processes.world]
    batches = [in_order(part, params.score.batch_size) for _, part in mine]
    rendered = iter(load(views, [*itertools.chain(*batches)], params.machine.workers, processes.device))
    bfloat16 = params.teacher.precision == "bfloat16"
    with Progress(sum(len(part) for _, part in mine), "images", "score", quiet=not processes.first()) as progress:
        for (number, part), of_part in zip(mine, batches, strict=True):
            answers = []
            for pixels, small in itertools.islice(rendered, len(of_part)):
                with torch.autocast(processes.device.type, torch.bfloat16, enabled=bfloat16):
                    answer = classifier.embed(pixels.to(processes.device, non_blocking=True))
                answers.append([*(tensor.float().cpu().numpy() for tensor in answer), small.numpy()])
                progress.update(len(pixels))
            logits, embeddings, small = (np.concatenate(column) for column in zip(*answers, strict=True))
            columns = (images.ids[part], logits, embeddings.astype(np.float16), small)
            with atomic.replacing(_file(folder, number)) as beside, beside.open("wb") as file:
                np.savez(file, **dict(zip(COLUMNS, columns, strict=True)))
    devices.wait_for_all(processes)


def join_parts(parts: Path, count: int, folder: Path) -> None:
    """Write the parts one after another into one file a column, without holding them all in memory."""
    for column in COLUMNS:
        whole, at = None, 0
        for file in sorted(parts.glob("part-*.npz")):
            with np.load(file) as part:
                values = part[column]
            if whole is None:
                shape = (count, *values.shape[1:])
                whole = np.lib.format.open_memmap(folder / f"{column}.npy", "w+", values.dtype, shape)
            whole[at : at + len(values)] = values
            at += len(values)
        assert at == count
        whole.flush()


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.npz"


if __name__ == "__main__":
    stage.main(run, __doc__, distributed=True)
