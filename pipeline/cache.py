"""The soft-label cache: the teacher's answer for every (sample, replica) of the labelled and mined images.

Reads data/prepare/images, data/mine and data/teacher. Writes data/cache, shard by shard: what is there already and
still holds is not computed again, so a killed run goes on, and a grown pool costs what is new. A damaged shard is set
aside and computed again. Labels of another teacher or of other views are set aside under .scratch/cache, and used again
when those come back. Some of what is there is asked again: where other code or another library makes the same teacher
answer otherwise, the stage stops and says so. Run: python -m pipeline.cache
"""

import hashlib
import shutil
from bisect import bisect_right
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.core import atomic, devices, resume, stage
from pipeline.core.devices import Processes
from pipeline.core.labelling import Labelling, cut
from pipeline.core.progress import Progress
from pipeline.core.recheck import TOLERANCE, recheck
from pipeline.core.sections import Params
from pipeline.core.softlabels import Description, SoftLabels, shards, writing
from pipeline.core.softlabels.keys import find_double
from pipeline.core.softlabels.records import Records
from pipeline.core.teaching import warn_of_top_k

FOLDER = Path("data/cache")
RECHECKED = 64  # stored views that each run asks the teacher about again
PENDING = 4  # batches and shards that wait to be packed and written while the teacher goes on


def run(params: Params) -> None:
    processes = devices.join(params.machine)
    devices.warn_of_slow("cache", "teacher.precision", params.teacher.precision, processes)
    # A second program is told so before it loads the teacher.
    alone = resume.only_writer("cache") if processes.first() else nullcontext(resume.SCRATCH / "cache")
    with alone as scratch:
        bring_up_to_date(params, processes, scratch)


def bring_up_to_date(params: Params, processes: Processes, scratch: Path) -> None:
    """Write what data/cache lacks; the first of several processes lists that for all, and finishes the cache.

    Args:
        scratch: the stage's scratch folder, for labels of other teachers and this run's lists.
    """
    labelling = Labelling.of(params, processes)
    if processes.first():
        warn_of_top_k("cache", params, labelling.description.num_classes)
    keys_at, missing_at = scratch / keys_file(labelling), scratch / "missing.bin"
    devices.check_same(
        processes, {"teacher and views": labelling.description.fingerprint, "images and code": keys_at.name}
    )
    if processes.first():
        list_missing(labelling, scratch, keys_at, missing_at)
    devices.wait_for_all(processes)
    if not keys_at.exists():
        raise ValueError(f"{keys_at}: not there, though the first process made it: machines must share the folder")
    keys, missing = np.load(keys_at, mmap_mode="r"), numbers_in(missing_at)
    write_missing(labelling, keys, missing)
    devices.wait_for_all(processes)
    if processes.first():
        writing.finish(FOLDER, labelling.description, keys)
        keys_at.unlink()
        missing_at.unlink()


def keys_file(labelling: Labelling) -> str:
    """Name the file of all keys after what they depend on: a killed run that goes on need not make billions anew."""
    views = labelling.views
    replicas = labelling.params.cache.replicas
    digest = hashlib.sha256(f"{resume.code_digest()} {views.spec.digest} {replicas}".encode())
    digest.update(views.images.ids[labelling.rows])
    digest.update(views.partners)
    return f"wanted-{digest.hexdigest()[:16]}.npy"


def list_missing(labelling: Labelling, scratch: Path, keys_at: Path, missing_at: Path) -> None:
    """Set aside what cannot stay in data/cache, and list all views, and those that it lacks: they may be billions.

    Args:
        keys_at: where to write the keys of all views.
        missing_at: where to write the numbers of the views to ask about.

    Raises:
        ValueError: two views have one key, or the teacher now answers otherwise; see `check_same_answers`.
    """
    description = labelling.description
    set_aside_others(description, scratch)
    for wrong in writing.set_damaged_aside(FOLDER, description, scratch / "damaged"):
        print(f"cache: {wrong}: set aside in {scratch / 'damaged'}, to be computed again", flush=True)
    for other in set(scratch.glob("*wanted*")) - {keys_at}:  # of a killed run with other images or settings
        other.unlink()
    keys = list_keys(labelling, keys_at)
    check_distinct(labelling, keys)
    writing.write_index(FOLDER, description)
    labels = SoftLabels(FOLDER, description)
    with atomic.replacing(missing_at) as beside, beside.open("wb") as listed:
        for numbers in labels.missing(keys):
            listed.write(numbers.astype(np.int64).tobytes())
    missing = numbers_in(missing_at)
    check_same_answers(labelling, labels, stored_among(len(keys), missing, RECHECKED))
    there = f"{len(labels):,} views are there, " if len(labels) else ""
    print(f"cache: {there}{len(missing):,} views to ask the teacher about", flush=True)
    writing.unfinish(FOLDER)


def list_keys(labelling: Labelling, file: Path) -> np.ndarray:
    """Give the keys (N,) uint64 of all views, mapped.

    Args:
        file: where they are written (.npy); one that is there already is taken as it is.
    """
    if not file.exists():
        count = len(labelling)
        with atomic.replacing(file) as beside, Progress(count, "views", "cache: keys") as progress:
            keys = atomic.new_array(beside, np.uint64, (count,))
            for start in range(0, count, 10_000):
                numbers = np.arange(start, min(count, start + 10_000))
                keys[numbers] = labelling.keys(numbers)
                progress.update(len(numbers))
            keys.flush()
    return np.load(file, mmap_mode="r")


def check_distinct(labelling: Labelling, keys: np.ndarray) -> None:
    """Make sure that no two views have one key.

    Raises:
        ValueError: two have; it names them.
    """
    double = find_double(keys)
    if double is not None:
        images, views = labelling.views.images, zip(*labelling.rows_and_replicas(np.array(double)), strict=True)
        named = " and ".join(f"view {replica} of {images.source(row)}" for row, replica in views)
        raise ValueError(f"{named} have one key by chance, so one would be taught as the other; leave one image out")


def numbers_in(file: Path) -> np.ndarray:
    """Map the numbers (M,) int64 that `list_missing` has listed."""
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


def check_same_answers(labelling: Labelling, labels: SoftLabels, chosen: np.ndarray) -> None:
    """Ask the teacher again about some stored views.

    Args:
        chosen: (N,) int64: their numbers.

    Raises:
        ValueError: it answers otherwise, though its weights and the views' specification are the same.
    """
    if not len(chosen):
        return
    found = recheck(labelling, labels, chosen, "cache: asked again")
    if not found.lost.mean() <= found.lost_by_coding.mean() + TOLERANCE:
        raise ValueError(
            f"{FOLDER}: the same teacher now answers otherwise about {found.wrong.sum()} of {len(found.wrong)} stored "
            f"views, by {found.lost.mean():.1e} nats in the mean: the code of networks or views, or a library, has "
            f"changed; go back to it, or remove {FOLDER} and run `dvc repro cache` to ask about all views anew"
        )


def write_missing(labelling: Labelling, keys: np.ndarray, missing: np.ndarray) -> None:
    """Ask about the views that the cache lacks and write the answers: each process every world-th shard of them.

    The answers to a batch are packed and written by a thread of their own while the teacher answers the next.

    Args:
        keys: (N,) uint64, of all views.
        missing: (M,) int64: the numbers of the views to ask about.
    """
    settings, processes, description = labelling.params.cache, labelling.processes, labelling.description
    parts = cut(missing, settings.shard_views)[processes.rank :: processes.world]
    if not parts:  # no worker processes for nothing
        return
    answers = labelling.answers(
        labelling.rows_and_replicas(batch) for part in parts for batch in cut(part, settings.batch_size)
    )
    waiting: deque[Future] = deque()
    total = sum(len(part) for part in parts)
    with (
        Progress(total, "views", "cache", quiet=not processes.first()) as progress,
        ThreadPoolExecutor(1) as background,
    ):
        for part in parts:
            packed: list[Future[Records]] = []
            for logits in islice(answers, len(cut(part, settings.batch_size))):
                packed.append(background.submit(description.coding.encode, logits))
                waiting.append(packed[-1])
                while len(waiting) > PENDING:
                    waiting.popleft().result()
                progress.update(len(logits))
            waiting.append(background.submit(write_shard, description, keys[part], packed))
        for future in waiting:
            future.result()


def write_shard(description: Description, keys: np.ndarray, packed: list[Future[Records]]) -> None:
    """Write the records of some batches as one shard, once they are packed.

    Args:
        keys: (N,) uint64, of the batches' views.
    """
    counts, content = zip(*(future.result() for future in packed), strict=True)
    shards.write(FOLDER, description.fingerprint, keys, Records(np.concatenate(counts), np.concatenate(content)))


def set_aside_others(description: Description, scratch: Path) -> None:
    """Make sure that data/cache holds labels of this description alone; move others aside, and fetch these back."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    writing.unfinish(FOLDER)  # until this run has ended
    for left in FOLDER.glob(".*.part"):  # by a killed run
        left.unlink()
    others = {path: name for path, name in writing.fingerprints(FOLDER).items() if name != description.fingerprint}
    for path, name in others.items():
        (scratch / name).mkdir(exist_ok=True)
        shutil.move(path, scratch / name / path.name)
    if others:
        print(f"cache: shards of another teacher or other views, set aside in {scratch}: {len(others):,}", flush=True)
    back = list((scratch / description.fingerprint).glob("*.sl"))
    for path in back:
        shutil.move(path, FOLDER / path.name)
    if back:
        print(f"cache: shards of this teacher and these views from before: {len(back):,}", flush=True)


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="shared")
