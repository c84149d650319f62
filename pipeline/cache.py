"""The soft-label cache: the teacher's answer for every (sample, replica) of the labelled and mined images.

Reads data/prepare, data/mine and data/teacher. Writes data/cache, shard by shard: what is there already and still
holds is not computed again, so a killed run goes on, and a grown pool costs what is new. A damaged shard is set aside
and computed again. Labels of another teacher or of other views are set aside under .scratch/cache, and used again when
those come back. Some of what is there is asked again: where other code or another library makes the same teacher answer
otherwise, the stage stops and says so. Run: python -m pipeline.cache
"""

import hashlib
import shutil
from bisect import bisect_right
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core import atomic, devices, networks, resume, stage, teaching
from pipeline.core.data.batches import RowsAndReplicas, Views, load
from pipeline.core.data.dataset import ImageSet
from pipeline.core.data.views import ViewSpec
from pipeline.core.devices import Processes
from pipeline.core.networks import Classifier
from pipeline.core.progress import Progress
from pipeline.core.recheck import TOLERANCE, recheck
from pipeline.core.sections import Params
from pipeline.core.softlabels import Description, SoftLabels, shards, writing
from pipeline.core.softlabels.keys import find_double
from pipeline.core.softlabels.records import Records

FOLDER = Path("data/cache")
RECHECKED = 64  # stored views that each run asks the teacher about again
PENDING = 4  # batches and shards that wait to be packed and written while the teacher goes on


class Wanted(NamedTuple):
    """The views that the cache is to hold: view n is replica n mod `replicas` of sample n div `replicas`."""

    rows: np.ndarray  # (S,) int64, of the image set, ascending, as the images' ids are
    replicas: int
    keys: np.ndarray  # (N,) uint64, N = S x replicas; memory-mapped: they may be billions

    def views(self, numbers: np.ndarray) -> RowsAndReplicas:
        """Rows and replicas of some views."""
        return self.rows[numbers // self.replicas], numbers % self.replicas


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    # A second program is told so before it loads the teacher.
    alone = resume.only_writer("cache") if processes.first() else nullcontext(resume.SCRATCH / "cache")
    with alone as scratch:
        bring_up_to_date(params, processes, scratch)


def bring_up_to_date(params: Params, processes: Processes, scratch: Path) -> None:
    """Write what data/cache lacks; the first of several processes also says what that is, and finishes the cache.

    Args:
        scratch: the stage's scratch folder, for labels of other teachers and this run's lists.
    """
    images = ImageSet(Path("data/prepare"))
    classifier, card = networks.load(Path("data/teacher"), processes.device)
    description = teaching.description(params, card)
    views = Views(images, ViewSpec.of(params.seed, params.views))
    rows = teaching.training_rows(images)
    keys_at, missing_at = scratch / keys_file(views, rows, params), scratch / "missing.bin"
    if not processes.first():
        devices.wait_for_all(processes)  # until the first process has listed what is to be done
        wanted = Wanted(rows, params.cache.replicas, np.load(keys_at, mmap_mode="r"))
        write_missing(classifier, views, wanted, numbers_in(missing_at), params, description, processes)
        return
    set_aside_others(FOLDER, scratch, description)
    for wrong in writing.set_damaged_aside(FOLDER, description, scratch / "damaged"):
        print(f"cache: {wrong}: set aside in {scratch / 'damaged'}, to be computed again", flush=True)
    for other in set(scratch.glob("*wanted*")) - {keys_at}:  # of a killed run with other images or settings
        other.unlink()
    wanted = every_view(views, rows, params.cache.replicas, keys_at)
    check_distinct(images, wanted)
    missing = look_up(classifier, views, wanted, params, description, missing_at)
    devices.wait_for_all(processes)
    write_missing(classifier, views, wanted, missing, params, description, processes)
    writing.finish(FOLDER, description, wanted.keys)
    keys_at.unlink()
    missing_at.unlink()


def keys_file(views: Views, rows: np.ndarray, params: Params) -> str:
    """Name the file of all keys after what they depend on: a killed run that goes on need not make billions anew."""
    assert views.spec is not None
    digest = hashlib.sha256(f"{resume.code_digest()} {views.spec.digest} {params.cache.replicas}".encode())
    digest.update(views.images.ids[rows])
    digest.update(views.partners)
    return f"wanted-{digest.hexdigest()[:16]}.npy"


def check_distinct(images: ImageSet, wanted: Wanted) -> None:
    """Make sure that no two views have one key.

    Raises:
        ValueError: two have; it names them.
    """
    double = find_double(wanted.keys)
    if double is not None:
        views = zip(*wanted.views(np.array(double)), strict=True)
        named = " and ".join(f"view {replica} of {images.source(row)}" for row, replica in views)
        raise ValueError(f"{named} have one key by chance, so one would be taught as the other; leave one image out")


def look_up(
    classifier: Classifier, views: Views, wanted: Wanted, params: Params, description: Description, file: Path
) -> np.ndarray:
    """Give the numbers (M,) int64 of the views that the cache lacks, once some of the others have been asked again.

    Args:
        file: where to list them; they may be billions.

    Raises:
        ValueError: see `check_same_answers`.
    """
    writing.write_index(FOLDER, description)
    labels = SoftLabels(FOLDER, description)
    with atomic.replacing(file) as beside, beside.open("wb") as listed:
        for numbers in labels.missing(wanted.keys):
            listed.write(numbers.astype(np.int64).tobytes())
    missing = numbers_in(file)
    check_same_answers(classifier, views, labels, wanted, stored_among(len(wanted.keys), missing, RECHECKED), params)
    there = f"{len(labels):,} views are there, " if len(labels) else ""
    print(f"cache: {there}{len(missing):,} views to ask the teacher about", flush=True)
    writing.unfinish(FOLDER)
    return missing


def numbers_in(file: Path) -> np.ndarray:
    """Map the numbers (M,) int64 that `look_up` has listed."""
    return np.memmap(file, np.int64, "r") if file.stat().st_size else np.zeros(0, np.int64)


def stored_among(count: int, missing: np.ndarray, most: int) -> np.ndarray:
    """Give at most so many of the numbers 0 to count - 1 that are not missing, far apart.

    Args:
        missing: (M,) int64, ascending; they may be billions.
    """
    stored = count - len(missing)
    ranks = np.linspace(0, stored - 1, min(stored, most)).astype(np.int64)  # among those that are not missing
    places = range(len(missing))
    before = [bisect_right(places, rank, key=lambda place: missing[place] - place) for rank in ranks]
    return ranks + np.array(before, np.int64)


def check_same_answers(
    classifier: Classifier, views: Views, labels: SoftLabels, wanted: Wanted, chosen: np.ndarray, params: Params
) -> None:
    """Ask the teacher again about some stored views.

    Args:
        chosen: (N,) int64: their numbers among the wanted.

    Raises:
        ValueError: it answers otherwise, though its weights and the views' specification are the same.
    """
    if not len(chosen):
        return
    found = recheck(classifier, views, labels, *wanted.views(chosen), params, "cache: asked again")
    if not found.lost.mean() <= found.lost_by_coding.mean() + TOLERANCE:
        raise ValueError(
            f"{FOLDER}: the same teacher now answers otherwise about {found.wrong.sum()} of {len(found.wrong)} stored "
            f"views, by {found.lost.mean():.1e} nats in the mean: the code of networks or views, or a library, has "
            f"changed; go back to it, or remove {FOLDER} and run `dvc repro cache` to ask about all views anew"
        )


def every_view(views: Views, rows: np.ndarray, replicas: int, file: Path, quiet: bool = False) -> Wanted:
    """List all views of the samples in ascending order of row, sample by sample.

    Args:
        file: the keys' (.npy); where it is there already, it is taken as it is.
    """
    count = len(rows) * replicas
    if not file.exists():
        with atomic.replacing(file) as beside, Progress(count, "views", "cache: keys", quiet=quiet) as progress:
            keys = atomic.new_array(beside, np.uint64, (count,))
            wanted = Wanted(rows, replicas, keys)
            for start in range(0, count, 10_000):
                numbers = np.arange(start, min(count, start + 10_000))
                keys[numbers] = teaching.keys(views, *wanted.views(numbers))
                progress.update(len(numbers))
            keys.flush()
    return Wanted(rows, replicas, np.load(file, mmap_mode="r"))


def write_missing(
    classifier: Classifier,
    views: Views,
    wanted: Wanted,
    missing: np.ndarray,
    params: Params,
    description: Description,
    processes: Processes,
) -> None:
    """Compute the labels that the cache lacks and write them, a shard at a time, every world-th in each process.

    The answers to a batch are packed and written by a thread of their own while the teacher answers the next.

    Args:
        missing: (M,) int64: the numbers of the views to ask about.
    """
    size = params.cache.shard_views
    starts = range(0, len(missing), size)[processes.rank :: processes.world]
    parts = [missing[start : start + size] for start in starts]
    if not parts:  # no worker processes for nothing
        devices.wait_for_all(processes)
        return
    asked = (
        wanted.views(part[start : start + params.cache.batch_size])
        for part in parts
        for start in range(0, len(part), params.cache.batch_size)
    )
    batches = load(views, asked, params.machine.workers, processes.device)
    total = sum(len(part) for part in parts)
    with (
        Progress(total, "views", "cache", quiet=not processes.first()) as progress,
        ThreadPoolExecutor(1) as background,
    ):
        waiting: deque[Future] = deque()
        answered = iter(batches)
        for part in parts:
            packed: list[Future[Records]] = []
            for _ in range(0, len(part), params.cache.batch_size):
                batch = next(answered)
                pixels = batch.pixels.to(processes.device, non_blocking=True)
                logits = teaching.answer(classifier, pixels, params.teacher.precision)
                packed.append(background.submit(description.coding.encode, logits))
                waiting.append(packed[-1])
                while len(waiting) > PENDING:
                    waiting.popleft().result()
                progress.update(len(batch.rows))
            waiting.append(background.submit(_write, description, wanted.keys[part], packed))
        for future in waiting:
            future.result()
    devices.wait_for_all(processes)


def _write(description: Description, keys: np.ndarray, packed: list[Future[Records]]) -> None:
    counts, content = zip(*(future.result() for future in packed), strict=True)
    shards.write(FOLDER, description.fingerprint, keys, Records(np.concatenate(counts), np.concatenate(content)))


def set_aside_others(folder: Path, scratch: Path, description: Description) -> None:
    """Make sure that the folder holds labels of this description alone; move others aside, and fetch these back."""
    folder.mkdir(parents=True, exist_ok=True)
    writing.unfinish(folder)  # until this run has ended
    for left in folder.glob(".*.part"):  # by a killed run
        left.unlink()
    others = {path: name for path, name in writing.fingerprints(folder).items() if name != description.fingerprint}
    for path, name in others.items():
        (scratch / name).mkdir(exist_ok=True)
        shutil.move(path, scratch / name / path.name)
    if others:
        print(f"cache: shards of another teacher or other views, set aside in {scratch}: {len(others):,}", flush=True)
    back = list((scratch / description.fingerprint).glob("*.sl"))
    for path in back:
        shutil.move(path, folder / path.name)
    if back:
        print(f"cache: shards of this teacher and these views from before: {len(back):,}", flush=True)


if __name__ == "__main__":
    stage.main(run, __doc__, distributed=True)
