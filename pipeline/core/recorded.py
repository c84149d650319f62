"""What DVC records of a stage, against what the stage's result is of.

DVC reads settings and source files once a stage has ended. Were they edited while it ran, dvc.lock would name the new
ones beside a result of the former, which DVC would then take for up to date, and restore from its cache ever after.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.core import digests, params

SETTINGS, GRAPH, LOCK = Path("params.yaml"), Path("dvc.yaml"), Path("dvc.lock")
CODE = ("pipeline/", "models/")
LOOK_AGAIN = 1  # seconds after which to look once more at what has changed
LOOKS, LOOK_SOON = 20, 0.2  # how often, and after how many seconds, to look whether a dvc.lock is whole


@dataclass(frozen=True)
class Recorded:
    """What DVC would record of a stage at this moment.

    Attributes:
        settings: dotted keys, as dvc.yaml names them and their sections, and their values as params.yaml has them.
        sources: source files, as dvc.yaml names them, and their SHA-256.
    """

    settings: dict[str, Any]
    sources: dict[str, str]

    @classmethod
    def now(cls, stage: str) -> Self:
        """Read it in the project's root; nothing is recorded where there is no dvc.yaml, or no such stage in it.

        Raises:
            ValueError: a file is not YAML.
        """
        described = _read(GRAPH).get("stages", {}).get(stage, {})
        names = [name for name in described.get("params", []) if isinstance(name, str)]
        sections, held = tuple(f"{name}." for name in names), params.flat(_read(SETTINGS))
        settings = {key: value for key, value in held.items() if key in names or key.startswith(sections)}
        sources = [dep for dep in described.get("deps", []) if isinstance(dep, str) and dep.startswith(CODE)]
        return cls(settings, {file: digests.of_file(Path(file)) for file in sources if Path(file).is_file()})


def check(stage: str, began: Recorded) -> None:
    """Make sure that DVC will record what a stage began with.

    Raises:
        ValueError: settings or code have changed since; it names them, and says what to do.
    """
    now = Recorded.now(stage)
    if now != began:
        time.sleep(LOOK_AGAIN)  # an editor may be just writing a file
        now = Recorded.now(stage)
    if edited := _changes(began.settings, now.settings):
        raise ValueError(
            f"params.yaml was edited while this ran: {edited}. DVC would record the new values for a result of the old "
            "ones: with those back, the same command goes on from what is there; with the new ones it begins anew"
        )
    if edited := sorted(file for file, _ in began.sources.items() ^ now.sources.items()):
        raise ValueError(
            f"{', '.join(dict.fromkeys(edited))}: edited while this ran. DVC would record the new code for a result of "
            f"the old: where that alters no result, `dvc commit --force {stage}` does so; else the same command begins "
            "anew"
        )


def check_lock(stages: tuple[str, ...]) -> None:
    """Make sure that params.yaml still holds the settings with which, by dvc.lock, some stages ran.

    Args:
        stages: their names; those that are frozen, or that DVC has not run, do not matter.

    Raises:
        ValueError: some have changed since; it names them, and says what to do.
    """
    graph = _read(GRAPH).get("stages", {})
    ran = (params.parse(read_lock(LOCK)) or {}).get("stages") or {}
    for stage in stages:
        if graph.get(stage, {}).get("frozen"):
            continue
        used = params.flat(ran.get(stage, {}).get("params", {}).get(SETTINGS.name, {}))
        held = Recorded.now(stage).settings  # without those that dvc.yaml no longer names
        both = used.keys() & held.keys()
        if edited := _changes({key: used[key] for key in both}, {key: held[key] for key in both}):
            raise ValueError(
                f"params.yaml was edited since stage {stage} ran: {edited}. What it made is of the old values: put "
                "those back, or run `dvc repro`"
            )


def read_lock(file: Path) -> str:
    """Read a dvc.lock, which another DVC may be writing, in place: wait until it is whole, for some seconds at most.

    DVC's own lock is no way to wait: who holds it for seconds makes a `dvc repro` fail whose stage ends meanwhile.
    """
    text = ""
    for _ in range(LOOKS):
        with suppress(ValueError):  # no YAML, or no text
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            if not file.exists() or (text.endswith("\n") and isinstance(params.parse(text), dict)):
                break
        time.sleep(LOOK_SOON)
    return text


def _read(file: Path) -> dict[str, Any]:
    """Give a YAML file's content; nothing where it is not there."""
    try:
        content = params.parse(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected sections with keys, found a {type(content).__name__}")
    return content


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} (was {before.get(key)}, is {now.get(key)})" for key in changed)
