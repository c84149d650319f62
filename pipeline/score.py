"""Scores: the teacher's answer on one clean view of each pool image, and of each validation and test image.

Reads data/prepare/images and data/teacher. Writes data/score: ids.npy (N,) uint64, logits.npy (N, C) float32,
embeddings.npy (N, D) float16 and thumbnails.npy (N, 32, 32) uint8, row by row the same images, those of the pool first;
and links to these in .scratch/scored, so that a grown pool costs what is new. Thumbnails are made here because decoding
is what takes the time. Run: python -m pipeline.score
"""

import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.core import atomic, devices, digests, networks, resume, stage
from pipeline.core.data.batches import RowsAndReplicas, in_order, load
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import render_test
from pipeline.core.devices import Processes
from pipeline.core.mining.thumbnails import thumbnails
from pipeline.core.networks import Classifier
from pipeline.core.progress import Progress
from pipeline.core.sections import Params

TEACHER, FOLDER = Path("data/teacher"), Path("data/score")  # not teaching.py's: it imports soft labels' code
SCORED = resume.SCORED  # what the last run wrote, and answers.json, which says whose answers those are
PART_IMAGES = 4096  # images scored between two files: what a killed run loses at most
LARGEST = float(np.finfo(np.float16).max)
COLUMNS = ("ids", "logits", "embeddings", "thumbnails")


@dataclass(frozen=True)
class ViewsAndThumbnails(Dataset):
    """Decodes each image once: give it (rows, replicas), get clean views (B, 3, R, R) and thumbnails (B, 32, 32)."""

    images: ImageSet
    resolution: int
    crop: float

    def __getitem__(self, batch: RowsAndReplicas) -> tuple[Tensor, Tensor]:
        views, small = [], []
        for row in batch[0]:
            image = self.images.image(int(row))
            views.append(render_test(image, self.resolution, self.crop))
            small.append(thumbnails([image])[0])
        return torch.from_numpy(np.stack(views)), torch.from_numpy(np.stack(small))


class Known(NamedTuple):
    """What the last run wrote, where those are the teacher's present answers."""

    ids: np.ndarray  # (M,) uint64
    columns: dict[str, np.ndarray]  # (M, ...) each, memory-mapped


NOTHING_KNOWN = Known(np.zeros(0, np.uint64), {})


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    devices.warn_of_slow("score", "teacher.precision", params.teacher.precision, processes)
    # A second program is told so before it loads the teacher.
    with resume.only_writer("score") if processes.first() else nullcontext():
        bring_up_to_date(params, processes)


def bring_up_to_date(params: Params, processes: Processes) -> None:
    """Score the images that the last run did not; the first of several processes writes data/score, with the others."""
    images = ImageSet(Path("data/prepare/images"))
    classifier, card = networks.load(TEACHER, processes.device)
    networks.check_classes(TEACHER, card, images.classes)
    network = [card["model"], card["digest"], card["mean"], card["std"], card.get("resized_to")]
    views = [params.views.resolution, params.views.test_crop]
    asked = [*network, params.teacher.precision, *views, *resume.package_versions(), resume.code_digest()]
    answers = digests.of_json(asked)[:16]
    devices.check_same(processes, {"teacher, views, packages and code": answers, "images": images.digest})
    rows = np.concatenate([images.rows("unlabelled"), images.rows("val", "test")])
    known = read_known(answers) if processes.first() else NOTHING_KNOWN  # with a digest of all columns, once
    new = devices.from_first(processes, rows[~np.isin(images.ids[rows], known.ids)])
    parts = resume.SCRATCH / "score" / f"{answers}-{digests.of_array(images.ids[new])[:16]}"
    if processes.first():
        resume.begin_run(parts)
        there = f"{len(rows) - len(new):,} images are scored already, " if len(new) < len(rows) else ""
        print(f"score: {there}{len(new):,} images to ask the teacher about", flush=True)
    devices.wait_for_all(processes)  # until the first process has cleared what others left
    score_parts(classifier, images, new, params, parts, processes)
    if processes.first():
        with atomic.replacing_folder(FOLDER) as folder:
            join_parts(parts, known, images.ids[rows], folder)
        keep(answers)
        resume.end_run(parts)
        shutil.rmtree(parts)


def keep(answers: str) -> None:
    """Keep what was written for the next run; as links, where they can be made, which take no space."""
    with atomic.replacing_folder(SCORED) as folder:
        for column in COLUMNS:
            written, kept = FOLDER / f"{column}.npy", folder / f"{column}.npy"
            try:
                os.link(written, kept)
            except OSError:
                shutil.copyfile(written, kept)
        checksums = {column: digests.of_file(folder / f"{column}.npy") for column in COLUMNS}
        atomic.write_json(folder / "answers.json", {"answers": answers, "digests": checksums})


def read_known(answers: str) -> Known:
    """Read what the last run wrote, if those are answers of the same teacher to the same views, and whole.

    Args:
        answers: what names the teacher, the views and the code.
    """
    atomic.restore_folder(SCORED)
    files = {column: SCORED / f"{column}.npy" for column in COLUMNS}
    try:
        noted = json.loads((SCORED / "answers.json").read_text(encoding="utf-8"))
        same = noted["answers"] == answers
        if same and noted["digests"] == {column: digests.of_file(file) for column, file in files.items()}:
            columns = {column: np.load(file, mmap_mode="r") for column, file in files.items()}
            return Known(np.asarray(columns["ids"]), columns)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there yet, or damaged: all are asked about
    return NOTHING_KNOWN


@torch.inference_mode()
def score_parts(
    classifier: Classifier, images: ImageSet, rows: np.ndarray, params: Params, folder: Path, processes: Processes
) -> None:
    """Write a .npz file for each part of the rows that has none yet, or a damaged one.

    Of W processes each has every W-th part.
    """
    views = ViewsAndThumbnails(images, params.views.resolution, params.views.test_crop)
    parts = [*enumerate(rows[start : start + PART_IMAGES] for start in range(0, len(rows), PART_IMAGES))]
    own = parts[processes.rank :: processes.world]
    mine = [(number, part) for number, part in own if not is_whole(_file(folder, number))]
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
            if not np.isfinite(logits).all():
                wrong = images.source(part[~np.isfinite(logits).all(1)][0])
                raise ValueError(f"the teacher's logits of {wrong} are not finite; teacher.precision: float32 may help")
            # What is beyond float16 becomes its largest number, which to `mine` is as far out as the number itself.
            embeddings = embeddings.clip(-LARGEST, LARGEST).astype(np.float16)
            columns = (images.ids[part], logits, embeddings, small)
            with atomic.replacing(_file(folder, number)) as beside, beside.open("wb") as file:
                np.savez(file, **dict(zip(COLUMNS, columns, strict=True)))
    devices.wait_for_all(processes)


def is_whole(part: Path) -> bool:
    """Whether a part is there, with all columns, and its checksums hold."""
    try:
        with zipfile.ZipFile(part) as columns:
            return columns.namelist() == [f"{column}.npy" for column in COLUMNS] and columns.testzip() is None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False


def join_parts(parts: Path, known: Known, ids: np.ndarray, folder: Path) -> None:
    """Write a file a column, in the order of the ids (N,), without holding any of them in memory as a whole.

    Args:
        parts: folder of the new answers.
        known: answers from before; those to other images are left out.
    """
    order = np.argsort(ids)
    for column in COLUMNS:
        whole, written = None, 0
        for some, columns in _in_parts(parts, known):
            places = order[np.minimum(np.searchsorted(ids, some, sorter=order), len(ids) - 1)]
            wanted = ids[places] == some
            values = columns[column][wanted]
            if whole is None:
                shape = (len(ids), *values.shape[1:])
                whole = atomic.new_array(folder / f"{column}.npy", values.dtype, shape)
            whole[places[wanted]] = values
            written += len(values)
        assert written == len(ids)
        whole.flush()


def _in_parts(parts: Path, known: Known) -> Iterator[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
    """Give known and new answers, some thousand at a time: ids, and the columns of these."""
    for start in range(0, len(known.ids), PART_IMAGES):
        here = slice(start, start + PART_IMAGES)
        yield known.ids[here], {column: values[here] for column, values in known.columns.items()}
    for file in sorted(parts.glob("part-*.npz")):
        with np.load(file) as part:
            yield part["ids"], part


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.npz"


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
