"""The soft-label cache: the teacher's answer for every (sample, replica) of the labelled and mined images.

Reads data/prepare, data/mine and data/teacher. Writes data/cache, shard by shard: what is there already and still
holds is not computed again, so a killed run goes on, and a grown pool costs what is new. Labels of another teacher or
of other views are set aside under .scratch/cache, and used again when those come back.
Run: python -m pipeline.cache
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core import devices, mined, networks, stage, teaching
from pipeline.core.batches import Views, load
from pipeline.core.dataset import ImageSet
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.params import Params
from pipeline.core.progress import Progress
from pipeline.core.softlabels import Description, SoftLabels, describe, make_keys, records
from pipeline.core.softlabels.store import fingerprint_of
from pipeline.core.views import ViewSpec

FOLDER = Path("data/cache")


def run(params: Params) -> None:
    images = ImageSet.open(Path("data/prepare"))
    processes = devices.join(params.machine.device)
    classifier, card = networks.load(Path("data/teacher"), processes.device)
    description = teaching.description(params, card)
    views = Views(images, ViewSpec.of(params.seed, params.views))
    rows = np.sort(teaching.training_rows(images, mined.read(Path("data/mine"))))
    if not processes.first():
        devices.wait_for_all(processes)  # until the folder holds nothing but labels of this description
        write_missing(classifier, images, views, rows, params, description, processes)
        return
    with stage.only_writer("cache") as scratch:
        set_aside_others(FOLDER, scratch, description)
        devices.wait_for_all(processes)
        write_missing(classifier, images, views, rows, params, description, processes)
        whole = SoftLabels(FOLDER, description)
        assert not len(missing_views(whole, images, views, rows, params.cache.replicas)[0])
        describe(FOLDER, description, len(rows) * params.cache.replicas)


def write_missing(
    classifier: Classifier,
    images: ImageSet,
    views: Views,
    rows: np.ndarray,
    params: Params,
    description: Description,
    processes: Processes,
) -> None:
    """Compute the labels that the cache lacks and write them, a shard at a time, every world-th in each process."""
    labels = SoftLabels(FOLDER, description)
    if processes.first():
        labels.verify()
    rows, replicas, keys = missing_views(labels, images, views, rows, params.cache.replicas)
    devices.wait_for_all(processes)  # all see the same shards missing before the first one comes
    wanted = len(labels) and f"{len(labels):,} views are there, "
    if processes.first():
        print(f"cache: {wanted or ''}{len(keys):,} views to ask the teacher about", flush=True)
    starts = range(0, len(keys), params.cache.shard_views)
    mine = [slice(start, start + params.cache.shard_views) for start in starts][processes.rank :: processes.world]
    total = sum(len(keys[part]) for part in mine)
    with Progress(total, "views", "cache", quiet=not processes.first()) as progress:
        for part in mine:
            batches = _batches(rows[part], replicas[part], params.cache.batch_size)
            packed = []
            for batch in load(views, batches, params.machine.workers, processes.device):
                pixels = batch.pixels.to(processes.device)
                logits = teaching.answer(classifier, pixels, params.teacher.precision)
                packed.append(records.pack(logits, description.top_k))
                progress.update(len(batch.rows))
            labels.write_shard(keys[part], np.concatenate(packed))
    devices.wait_for_all(processes)


def missing_views(
    labels: SoftLabels, images: ImageSet, views: Views, rows: np.ndarray, replicas: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give rows, replicas and keys (M,) of the views that have no label yet, sample by sample in order of id."""
    rows = np.repeat(rows[np.argsort(images.ids[rows])], replicas)
    numbers = np.tile(np.arange(replicas), len(rows) // replicas)
    keys = make_keys(images.ids[rows], numbers, views.partner_ids(rows, numbers))
    missing = labels.find(keys) < 0
    return rows[missing], numbers[missing], keys[missing]


def set_aside_others(folder: Path, scratch: Path, description: Description) -> None:
    """Make sure that the folder holds labels of this description alone; move others aside, and fetch these back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cache.json").unlink(missing_ok=True)  # not whole until this run has ended
    found = fingerprint_of(folder)
    if found == description.fingerprint:
        return
    if found is None:
        shutil.rmtree(folder)
    else:
        print(f"cache: labels of another teacher or other views are set aside in {scratch / found}", flush=True)
        shutil.rmtree(scratch / found, ignore_errors=True)
        shutil.move(folder, scratch / found)
    if (scratch / description.fingerprint).exists():
        shutil.move(scratch / description.fingerprint, folder)
        print("cache: labels of this teacher and these views were there from before", flush=True)
    folder.mkdir(exist_ok=True)


def _batches(rows: np.ndarray, replicas: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size], replicas[start : start + size]


if __name__ == "__main__":
    stage.main(run, __doc__, distributed=True)
