"""DVC, as the flow needs it: the graph of stages, which of them are not up to date, and the command that runs one."""

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from configobj import ConfigObj
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError
from dvc_data.hashfile.build import IgnoreInCollectedDirError

from pipeline.core import recorded

if TYPE_CHECKING:
    from dvc.stage import Stage

ADVICE = (  # how lines begin that DVC prints after each stage: a flow's log would repeat them for each
    "To track the changes with git",
    "\tgit add ",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
)
RAN = "Completed"  # the outcome of a stage that was run, and by Prefect's words its task's state
Graph = dict[str, list[str]]  # stage: the stages whose outputs it reads; each stage stands after those


def repro(stage: str) -> list[str]:
    """Give the command that brings one stage up to date, its inputs taken as they are.

    It is the one that works for several stages side by side in one folder; the caller keeps the order.
    """
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]


def outcome(lines: list[str]) -> str:
    """Name what `repro` did, from what it printed."""
    if any("didn't change, skipping" in line for line in lines):
        return "Up to date"
    return "Restored from cache" if any("is cached - skipping run" in line for line in lines) else RAN


def graph(folder: Path) -> Graph:
    """Read the graph of all stages, data added with `dvc add` included, from a DVC project.

    Raises:
        ValueError: dvc.yaml is missing or wrong: DVC's words, on one line.
    """
    recorded.read_lock(folder / recorded.LOCK)  # else one that is just being written is called invalid
    with _repo(folder) as repo:
        reads = {_name(stage): [_name(other) for other in reads] for stage, reads in _dependencies(repo).items()}
    return {stage: reads[stage] for stage in TopologicalSorter(reads).static_order()}


def outdated(folder: Path) -> set[str]:
    """Name the stages that `dvc repro` would look at more closely: changed ones, and all that follow those.

    The others are up to date, and stay so while these run.

    Raises:
        ValueError: see `graph`.
    """
    names: set[str] = set()
    with _repo(folder) as repo, repo.lock:
        edges = _dependencies(repo)
        for stage in TopologicalSorter(edges).static_order():
            if any(_name(other) in names for other in edges[stage]) or _changed(stage):
                names.add(_name(stage))
    return names


def upstream(graph: Graph, stages: list[str]) -> Graph:
    """Cut a graph down to some stages and all that they need.

    Raises:
        ValueError: a stage that the graph does not have.
    """
    for stage in stages:
        if stage not in graph:
            raise ValueError(f"{stage}: no such stage in dvc.yaml; there are {', '.join(graph)}")
    wanted = set(stages)
    for stage in reversed(graph):
        if stage in wanted:
            wanted.update(graph[stage])
    return {stage: reads for stage, reads in graph.items() if stage in wanted}


def edited(folder: Path) -> list[tuple[str, str]]:
    """Name what is no longer what its .dvc file says: that file, and the path to give to `dvc add`.

    What is absent (a clone before `dvc pull`) is not edited. DVC's state makes this quick where nothing has changed.

    Raises:
        ValueError: see `graph`.
    """
    with _repo(folder) as repo:
        return [
            (stage.path_in_repo, os.path.relpath(out.fs_path, repo.root_dir))
            for stage in sorted(repo.index.stages, key=_name)
            for out in stage.outs
            if stage.is_data_source and "modified" in out.workspace_status().values()
        ]


def inputs_and_outputs(folder: Path) -> tuple[set[Path], set[Path]]:
    """Name the files and folders that the stages of a DVC project read, and those that they make, all absolute.

    Raises:
        ValueError: see `graph`.
    """
    with _repo(folder) as repo:
        stages = repo.index.stages
        read = {Path(dep.fs_path) for stage in stages for dep in stage.deps if dep.protocol == "local"}
        return read, {Path(out.fs_path) for stage in stages for out in stage.outs if out.protocol == "local"}


def share_cache(owner: Path, guest: Path, notes: Path) -> None:
    """Let one DVC project use another one's cache, in settings that git ignores.

    Args:
        owner: the project whose cache it is.
        guest: the project that is to use it.
        notes: folder for what DVC notes about `guest`; its default lies outside the project and would stay behind.

    Raises:
        ValueError: see `graph`.
    """
    with _repo(owner) as repo:
        cache = repo.cache.local_cache_dir
    # As DVC reads them; DVC's own way to write them fails on paths that are not ASCII.
    local = ConfigObj(str(guest / ".dvc/config.local"), encoding="utf-8")
    local.setdefault("cache", {})["dir"] = cache
    local.setdefault("core", {})["site_cache_dir"] = str(notes)
    local.write()


@contextmanager
def _repo(folder: Path) -> Iterator[Repo]:
    try:
        with Repo(str(folder), _wait_for_lock=True) as repo:
            yield repo
    except RWLockFileCorruptedError:  # one that was killed as it wrote it
        file = folder / ".dvc/tmp/rwlock"
        raise ValueError(f"DVC in {folder}: {file} is damaged: delete it, when no other DVC is at work here") from None
    except sqlite3.Error as error:
        advice = (
            "wait for the DVC that is at work"
            if "locked" in str(error)
            else "its site cache (`dvc doctor` names the folder) is damaged, or that disk is full; it may be deleted"
        )
        raise ValueError(f"DVC in {folder}: {error}: {advice}") from None
    except (DvcException, IgnoreInCollectedDirError) as error:
        raise ValueError(f"DVC in {folder}: {' '.join(str(error).split())}") from None


def _dependencies(repo: Repo) -> dict["Stage", list["Stage"]]:
    edges = repo.index.graph  # an edge leads from a stage to one that makes what it reads
    return {stage: sorted(edges.successors(stage), key=_name) for stage in sorted(edges, key=_name)}


def _name(stage: "Stage") -> str:
    """The name that `dvc repro` takes in the project's root: a stage's, or a .dvc file's path."""
    name = getattr(stage, "name", None)
    if stage.path_in_repo == "dvc.yaml":
        return name
    return f"{stage.path_in_repo}:{name}" if name else stage.path_in_repo


def _changed(stage: "Stage") -> bool:
    try:
        return stage.changed()  # what `dvc repro` itself asks
    except LockError:  # another DVC is writing it: the task waits for that one, then sees
        return True
