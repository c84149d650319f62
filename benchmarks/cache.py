"""Times the soft-label cache. One command a question; each prints a Markdown table and names the machine.

    python benchmarks/cache.py read                   reading whole batches at random, on one core
    python benchmarks/cache.py large                  opening and reading a cache of 5 million views
    python benchmarks/cache.py write --project DIR    writing, against the teacher's bare forward passes
    python benchmarks/cache.py peers --project DIR    the same answers in TinyViT's format, and a dense file a view

A project's folder is one in which `dvc repro cache` has run; nothing in it is changed. What training gains by the
cache, and what it loses: online.py.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from formats import FORMATS
from machine import machine, own_memory
from project import Project
from records import made_logits
from turns import again_and_again, against, header, row, show_rates, silence, take_turns

from pipeline import cache
from pipeline.core import teaching
from pipeline.core.data.batches import load
from pipeline.core.labelling import cut
from pipeline.core.softlabels import Description, SoftLabels, dense, shards, writing
from pipeline.core.softlabels.records import Records

MADE = Description({"digest": "benchmark"}, {}, num_classes=1000, top_k=255, min_probability=5e-5, bits=5)
SHARD_VIEWS = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COMMANDS))
    parser.add_argument("--project", type=Path, default=Path(), help="where the cache stage has run (default: here)")
    parser.add_argument(
        "--views", type=int, help="how many views (read: 262,144; large: 5,000,000; write, peers: 2,048)"
    )
    parser.add_argument("--workers", type=int, help="machine.workers, in place of the project's")
    parser.add_argument("--by-batch", action="store_true", help="`write`: take turns batch by batch")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of `write` (default: 3)")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    os.chdir(arguments.project)
    COMMANDS[arguments.what](arguments)


def made_cache(folder: Path, views: int, keys: np.ndarray | None = None) -> np.ndarray:
    """Write a finished cache of so many views; the answers repeat, the keys do not. Give the keys (None: random)."""
    coding = MADE.coding
    parts = [coding.encode(part) for part in made_logits(8192, smooth=False).split(1024)]
    counts, content = (np.concatenate(column) for column in zip(*parts, strict=True))
    keys = np.random.default_rng(0).integers(0, 2**64, views, dtype=np.uint64) if keys is None else keys
    for start in range(0, views, SHARD_VIEWS):
        part = keys[start : start + SHARD_VIEWS]
        times = -(-len(part) // len(counts))
        lengths = np.tile(counts, times)[: len(part)]
        size = int(coding.sizes[lengths].sum())
        shards.write(folder, MADE.fingerprint, part, Records(lengths, np.tile(content, times)[:size]))
    writing.finish(folder, MADE, keys)
    return keys


def read(arguments: argparse.Namespace) -> None:
    """Random whole batches of 256."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        keys = made_cache(Path(folder), arguments.views or 262_144)
        labels = SoftLabels(Path(folder), MADE)
        chosen = np.random.default_rng(1).integers(0, len(keys), (400, 256))
        labels.read(keys[::SHARD_VIEWS])  # the first touch of a shard checks its checksum

        def sparse() -> None:
            for batch in chosen:
                labels.read(keys[batch])

        def whole() -> None:
            for batch in chosen:
                dense(labels.read(keys[batch]), MADE.num_classes)

        counts = labels.read(keys[:4096]).counts
        header("random batches of 256", "views", "classes stored of a view", "ms a batch", "records/s")
        for name, way in (("stored classes alone", sparse), ("as whole distributions", whole)):
            seconds = best_of(25, way) / len(chosen)
            row(name, f"{len(keys):,}", f"{counts.mean():.1f}", f"{1000 * seconds:.3f}", f"{256 / seconds:,.0f}")


def large(arguments: argparse.Namespace) -> None:
    """Open time and memory of a large cache."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        keys = made_cache(Path(folder), arguments.views or 5_000_000)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        np.save(Path(folder) / "keys.npy", keys)
        context = multiprocessing.get_context("spawn")  # a process that holds nothing else
        with context.Pool(1) as pool:
            opened, before, after, rate = pool.apply(_open_and_read, (folder,))
        header("views", "GB", "s to open", "MB before", "MB after 2,000 random batches of 256", "MB more", "records/s")
        row(f"{len(keys):,}", f"{size / 1e9:.2f}", f"{opened:.3f}", f"{before:.0f}", f"{after:.0f}",
            f"{after - before:.0f}", f"{rate:,.0f}")  # fmt: skip


def _open_and_read(folder: str) -> tuple[float, float, float, float]:
    torch.set_num_threads(1)
    keys = np.load(Path(folder) / "keys.npy", mmap_mode="r")
    chosen = np.random.default_rng(1).integers(0, len(keys), (2000, 256))
    before = own_memory()
    begin = time.perf_counter()
    labels = SoftLabels(Path(folder), MADE)
    opened = time.perf_counter() - begin
    for batch in chosen[:1000]:
        labels.read(keys[batch])
    begin = time.perf_counter()
    for batch in chosen[1000:]:
        labels.read(keys[batch])
    return opened, before, own_memory(), 1000 * 256 / (time.perf_counter() - begin)


def write(arguments: argparse.Namespace) -> None:
    """The stage's own loop against forward passes over one batch of tensors in memory, and against rendering alone.

    No stage is faster than the slower of the two; where rendering is, more machine.workers help, if there are cores.
    A turn is all views, worker processes' start included, or a batch, where it is not (--by-batch).
    """
    project, count = Project(arguments.workers), arguments.views or 2048
    labelling, keys = project.labelling, project.keys()
    some = np.arange(min(count, len(keys)))
    pixels = torch.randint(0, 256, (project.params.cache.batch_size, 3, *[project.params.views.resolution] * 2))
    pixels = pixels.to(torch.uint8)

    def bare_pass(count: int) -> None:
        teaching.answer(project.classifier, pixels[:count].to(project.device), project.params.teacher.precision).cpu()

    def bare() -> None:
        for start in range(0, len(some), len(pixels)):
            bare_pass(min(len(pixels), len(some) - start))

    def render() -> None:
        asked = (labelling.rows_and_replicas(part) for part in cut(some, len(pixels)))
        for batch in load(project.views, asked, project.params.machine.workers, project.device):
            batch.pixels.to(project.device)

    def stage() -> None:
        with scratch_cache(), silence():
            cache.write_missing(labelling, keys, some)

    if arguments.by_batch:
        if len(some) < 3 * len(pixels):
            sys.exit(
                f"cache: error: --by-batch needs {3 * len(pixels):,} views: the first and last batches do not count"
            )
        show_rates(batch_by_batch(stage, lambda: bare_pass(len(pixels)), arguments.rounds), len(pixels), "views/s")
        return
    ways = {"bare forward passes": bare, "rendering alone": render, "cache stage": stage}
    loops = {name: again_and_again(way) for name, way in ways.items()}
    seconds = take_turns(loops, arguments.rounds, steps=1, warm_up=1)
    show_rates(seconds, len(some), "views/s")
    least = np.maximum(seconds["bare forward passes"], seconds["rendering alone"])
    print(f"\nThe stage against the slower of the two: {against(seconds['cache stage'], least)}")


def batch_by_batch(stage: Callable[[], None], bare: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Run the stage, with a bare forward pass before each of its own; its worker processes stand still meanwhile.

    The thread that packs answers does not, but a batch's are packed in a millisecond or a few tens.

    Returns:
        the seconds of each bare pass, and of the stage from each pass to the next; those of the first round, and the
        first and the last (smaller) batch of each, are left out.
    """
    ask = teaching.answer
    seconds: dict[str, list[float]] = {"bare forward passes": [], "cache stage": []}

    def timed(*arguments: object) -> torch.Tensor:
        nonlocal left_at
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        came_at = time.perf_counter()
        with at_rest():
            teaching.answer, begin = ask, time.perf_counter()
            bare()
            teaching.answer, end = timed, time.perf_counter()
        of_round.append((end - begin, came_at - left_at))
        left_at = time.perf_counter()
        return ask(*arguments)

    for number in range(rounds + 1):
        of_round: list[tuple[float, float]] = []
        left_at = time.perf_counter()
        teaching.answer = timed
        try:
            stage()
        finally:
            teaching.answer = ask
        for passed, of_stage in of_round[1:-1] if number else ():
            seconds["bare forward passes"].append(passed)
            seconds["cache stage"].append(of_stage)
    return seconds


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Let the processes that this one has started stand still for a while."""
    workers = psutil.Process().children(recursive=True)
    try:
        for worker in workers:
            worker.suspend()
        yield
    finally:
        for worker in workers:
            worker.resume()


def peers(arguments: argparse.Namespace) -> None:
    """The same answers in other formats: time to write, size, time to read an epoch in random order."""
    project, count = Project(arguments.workers), arguments.views or 2048
    labelling, keys = project.labelling, project.keys()[:count]
    asked = [labelling.rows_and_replicas(part) for part in cut(np.arange(len(keys)), 256)]
    logits = torch.cat([answer.cpu() for answer in labelling.answers(asked)])
    order = np.random.default_rng(0).permutation(len(keys))
    header("format", "s to write", "bytes a view", "s to read an epoch")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, (store, fetch) in FORMATS.items():
            (folder / "x").mkdir()
            begin = time.perf_counter()
            store(folder / "x", labelling.description, keys, logits)
            written = time.perf_counter() - begin
            size = sum(file.stat().st_size for file in (folder / "x").iterdir())
            seconds = best_of(3, lambda fetch=fetch: fetch(folder / "x", labelling.description, keys, order))
            row(kind, f"{written:.3f}", f"{size / len(order):.1f}", f"{seconds:.3f}")
            shutil.rmtree(folder / "x")


@contextlib.contextmanager
def scratch_cache() -> Iterator[None]:
    """Let the stage write to a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        before, cache.FOLDER = cache.FOLDER, Path(folder)
        try:
            yield
        finally:
            cache.FOLDER = before


def best_of(times: int, work: Callable[[], object]) -> float:
    """The shortest of some runs, seconds."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


COMMANDS = {"read": read, "large": large, "write": write, "peers": peers}

if __name__ == "__main__":
    main()
