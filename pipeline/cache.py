"""The soft-label cache: the teacher's answer for every (sample, replica) of the labelled and mined images.

Reads data/prepare, data/mine and data/teacher. Writes data/cache, shard by shard: what is there already and still
holds is not computed again, so a killed run goes on, and a grown pool costs what is new. A damaged shard is set aside
and computed again. Labels of another teacher or of other views are set aside under .scratch/cache, and used again when
those come back. Some of what is there is asked again: where other code or another library makes the same teacher answer
otherwise, the stage stops and says so. Run: python -m pipeline.cache
"""

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core import devices, mined, networks, stage, teaching
from pipeline.core.batches import RowsAndReplicas, Views, load
from pipeline.core.dataset import ImageSet
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.params import Params
from pipeline.core.progress import Progress
from pipeline.core.recheck import TOLERANCE, recheck
from pipeline.core.softlabels import Description, SoftLabels, finish, store
from pipeline.core.softlabels.records import Records
from pipeline.core.views import ViewSpec

FOLDER = Path("data/cache")
RECHECKED = 64  # stored views that each run asks the teacher about again
PENDING = 4  # batches whose answers wait to be packed while the teacher goes on


class Asked(NamedTuple):
    """Views that the teacher is asked about."""

    rows: np.ndarray  # (N,) int64, of the image set
    replicas: np.ndarray  # (N,) int64
    keys: np.ndarray  # (N,) uint64, in the cache

    def part(self, which: slice | np.ndarray) -> "Asked":
        """Some of them."""
        return Asked(*(column[which] for column in self))


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    processes = devices.join(params.machine.device)
    classifier, card = networks.load(Path("data/teacher"), processes.device)
    description = teaching.description(params, card)
    views = Views(images, ViewSpec.of(params.seed, params.views))
    rows = teaching.training_rows(images, mined.read(Path("data/mine")))
    wanted = every_view(images, views, rows, params.cache.replicas, quiet=not processes.first())
    if not processes.first():
        devices.wait_for_all(processes)  # until the folder holds nothing but sound labels of this description
        write_missing(classifier, views, wanted, params, description, processes)
        return
    with stage.only_writer("cache") as scratch:
        set_aside_others(FOLDER, scratch, description)
        for wrong in store.set_damaged_aside(FOLDER, description, scratch / "damaged"):
            print(f"cache: {wrong}: set aside in {scratch / 'damaged'}, to be computed again", flush=True)
        check_same_answers(classifier, views, wanted, params, description)
        devices.wait_for_all(processes)
        write_missing(classifier, views, wanted, params, description, processes)
        finish(FOLDER, description, wanted.keys)


def check_same_answers(
    classifier: Classifier, views: Views, wanted: Asked, params: Params, description: Description
) -> None:
    """Ask the teacher again about some of the stored views.

    Raises:
        ValueError: it answers otherwise, though its weights and the views' specification are the same.
    """
    labels = SoftLabels(FOLDER, description)
    stored = np.flatnonzero(labels.find(wanted.keys) >= 0)
    if not len(stored):
        return
    chosen = wanted.part(stored[np.linspace(0, len(stored) - 1, min(len(stored), RECHECKED)).astype(int)])
    found = recheck(classifier, views, labels, chosen.rows, chosen.replicas, params, "cache: asked again")
    if not found.lost.mean() <= found.lost_by_coding.mean() + TOLERANCE:
        raise ValueError(
            f"{FOLDER}: the same teacher now answers otherwise about {found.wrong.sum()} of {len(found.wrong)} stored "
            f"views, by {found.lost.mean():.1e} nats in the mean: the code of networks or views, or a library, has "
            f"changed; go back to it, or remove {FOLDER} and run `dvc repro cache` to ask about all views anew"
        )


def every_view(images: ImageSet, views: Views, rows: np.ndarray, replicas: int, quiet: bool = False) -> Asked:
    """Give all views of the samples, sample by sample in ascending order of id."""
    rows = np.repeat(rows[np.argsort(images.ids[rows])], replicas)
    numbers = np.tile(np.arange(replicas), len(rows) // replicas)
    keys = np.empty(len(rows), np.uint64)
    with Progress(len(rows), "views", "cache: keys", quiet=quiet) as progress:
        for start in range(0, len(rows), 10_000):
            part = slice(start, start + 10_000)
            keys[part] = teaching.keys(images, views, rows[part], numbers[part])
            progress.update(len(keys[part]))
    return Asked(rows, numbers, keys)


def write_missing(
    classifier: Classifier,
    views: Views,
    wanted: Asked,
    params: Params,
    description: Description,
    processes: Processes,
) -> None:
    """Compute the labels that the cache lacks and write them, a shard at a time, every world-th in each process.

    The answers to a batch are packed and written by a thread of their own while the teacher answers the next.
    """
    labels = SoftLabels(FOLDER, description)
    missing = wanted.part(labels.find(wanted.keys) < 0)
    devices.wait_for_all(processes)  # all see the same shards missing before the first one comes
    if processes.first():
        there = f"{len(labels):,} views are there, " if len(labels) else ""
        print(f"cache: {there}{len(missing.keys):,} views to ask the teacher about", flush=True)
    size = params.cache.shard_views
    starts = range(0, len(missing.keys), size)
    shards = [missing.part(slice(start, start + size)) for start in starts][processes.rank :: processes.world]
    batches = load(views, _batches(shards, params.cache.batch_size), params.machine.workers, processes.device)
    total = sum(len(shard.keys) for shard in shards)
    with (
        Progress(total, "views", "cache", quiet=not processes.first()) as progress,
        ThreadPoolExecutor(1) as background,
    ):
        waiting: deque[Future] = deque()
        answered = iter(batches)
        for shard in shards:
            packed: list[Future[Records]] = []
            for _ in range(0, len(shard.keys), params.cache.batch_size):
                batch = next(answered)
                pixels = batch.pixels.to(processes.device, non_blocking=True)
                logits = teaching.answer(classifier, pixels, params.teacher.precision)
                packed.append(background.submit(description.coding.encode, logits))
                waiting.append(packed[-1])
                if len(waiting) > PENDING:
                    waiting.popleft().result()
                progress.update(len(batch.rows))
            waiting.append(background.submit(_write, labels, shard.keys, packed))
        for future in waiting:
            future.result()
    devices.wait_for_all(processes)


def _write(labels: SoftLabels, keys: np.ndarray, packed: list[Future[Records]]) -> None:
    counts, content = zip(*(future.result() for future in packed), strict=True)
    labels.write_shard(keys, Records(np.concatenate(counts), np.concatenate(content)))


def _batches(shards: list[Asked], size: int) -> Iterator[RowsAndReplicas]:
    for shard in shards:
        for start in range(0, len(shard.keys), size):
            part = slice(start, start + size)
            yield shard.rows[part], shard.replicas[part]


def set_aside_others(folder: Path, scratch: Path, description: Description) -> None:
    """Make sure that the folder holds labels of this description alone; move others aside, and fetch these back."""
    folder.mkdir(parents=True, exist_ok=True)
    store.unfinish(folder)  # until this run has ended
    for left in folder.glob(".*.part"):  # by a killed run
        left.unlink()
    others = {path: name for path, name in store.fingerprints(folder).items() if name != description.fingerprint}
    for path, name in others.items():
        (scratch / name).mkdir(exist_ok=True)
        shutil.move(path, scratch / name / path.name)
    if others:
        print(f"cache: {len(others):,} shards of another teacher or other views are set aside in {scratch}", flush=True)
    back = list((scratch / description.fingerprint).glob("*.sl"))
    for path in back:
        shutil.move(path, folder / path.name)
    if back:
        print(f"cache: {len(back):,} shards of this teacher and these views were there from before", flush=True)


if __name__ == "__main__":
    stage.main(run, __doc__, distributed=True)
