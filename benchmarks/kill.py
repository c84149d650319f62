"""Kills a stage with -9 at random moments, gives the same command again, and compares the bytes in the end.

    python benchmarks/kill.py cache --project DIR               30 kills of writing the soft-label cache
    python benchmarks/kill.py distill --project DIR --kills 20

A project's folder is one in which the whole pipeline has run; nothing in it is changed. Each attempt begins in a copy
of it without the stage's output, with shards of 16 views and a checkpoint at every step; one that ends before its
moment comes does not count, and is made again. On a CPU the bytes are to be those of a run that was left alone, 30 of
30 times; the command ends with 1 where they are not. The table goes to the standard output, a line of each attempt to
the standard error.
"""

import argparse
import hashlib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine
from turns import silence

from pipeline.core import params
from pipeline.core.running import params_file

STAGES = ("teacher", "score", "cache", "baseline", "distill", "finetune", "fixres")
SMALL = {"cache.shard_views": 16, "machine.checkpoint_seconds": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--project", type=Path, default=Path(), help="where the pipeline has run (default: here)")
    parser.add_argument("--kills", type=int, default=30, help="how often (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("forkserver")  # imports once; a new process then takes no time to start
    context.set_forkserver_preload([f"pipeline.{arguments.stage}"])

    def start(folder: Path) -> multiprocessing.Process:
        process = context.Process(target=run, args=(arguments.stage, folder))
        process.start()
        return process

    chance, outcomes = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        for _ in range(2):  # the first warms up
            copy(arguments.project, folder, arguments.stage)
            begin = time.monotonic()
            finish(start(folder))
            seconds = time.monotonic() - begin
        expected = digest(folder / "data" / arguments.stage)
        while len(outcomes) < arguments.kills:
            copy(arguments.project, folder, arguments.stage)
            moment = chance.uniform(0, seconds)
            process = start(folder)
            process.join(moment)
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                finish(process)  # it was done before its moment came
                continue
            left = left_behind(folder, arguments.stage)
            finish(start(folder))
            outcomes.append((left, digest(folder / "data" / arguments.stage) == expected))
            verdict = "the same bytes" if outcomes[-1][1] else "OTHER BYTES"
            done = f"{len(outcomes)} of {arguments.kills}"
            print(f"{done}: killed after {moment:.1f} s, {left} files to go on from, {verdict}", file=sys.stderr)
    same = sum(equal for _, equal in outcomes)
    with_work = sum(left > 0 for left, _ in outcomes)
    print(f"{machine()}\n")
    print("| stage | s uninterrupted | killed | of them with work to go on from | the same bytes in the end |")
    print("|---|---|---|---|---|")
    print(f"| {arguments.stage} | {seconds:.1f} | {arguments.kills} | {with_work} | {same} of {arguments.kills} |")
    sys.exit(same != arguments.kills)


def finish(process: multiprocessing.Process) -> None:
    """Wait for a process, and stop where it has failed: nothing would be compared."""
    process.join()
    if process.exitcode:
        sys.exit(f"the stage ended with {process.exitcode} where nobody stopped it; run it by hand to see why")


def copy(project: Path, folder: Path, stage: str) -> None:
    """Copy a project's settings and data to `folder`, all but the stage's own output."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(project / "data", folder / "data", ignore=shutil.ignore_patterns("digits", stage))
    settings = params_file.changed(project, SMALL)
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))


def left_behind(folder: Path, stage: str) -> int:
    """How many shards, parts or checkpoints a stage has written."""
    places = [folder / "data" / stage, folder / ".scratch" / stage]
    return sum(file.suffix in (".pt", ".sl", ".npz") for place in places for file in place.rglob("*"))


def run(stage: str, folder: Path) -> None:
    """Run a stage in a folder."""
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    with silence():
        importlib.import_module(f"pipeline.{stage}").run(params.load(Path("params.yaml")))


def digest(folder: Path) -> dict[str, str]:
    """The content of all files in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*"))}


if __name__ == "__main__":
    main()
