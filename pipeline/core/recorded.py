"""What DVC records of a stage, against what the stage's result is of.

DVC reads settings and source files once a stage has ended. Were they edited while it ran, dvc.lock would name the new
ones beside a result of the former, which DVC would then take for up to date, and restore from its cache ever after.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.core import digests, params

SETTINGS, GRAPH, LOCK = Path("params.yaml"), Path("dvc.yaml"), Path("dvc.lock")
CODE = ("pipeline/", "models/")


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
        held, sources = _flat(_read(SETTINGS)), [dep for dep in described.get("deps", []) if dep.startswith(CODE)]
        names = described.get("params", [])
        sections = tuple(f"{name}." for name in names)
        settings = {key: value for key, value in held.items() if key in names or key.startswith(sections)}
        return cls(settings, {file: digests.of_file(Path(file)) for file in sources if Path(file).is_file()})


def check(stage: str, began: Recorded) -> None:
    """Make sure that DVC will record what a stage began with.

    Raises:
        ValueError: settings or code have changed since; it names them, and says what to do.
    """
    now = Recorded.now(stage)
    if edited := _changes(began.settings, now.settings):
        raise ValueError(
            f"params.yaml was edited while this ran: {edited}. DVC would record the new values for a result of the old "
            "ones: with those back, the same command goes on from what is there; with the new ones it begins anew"
        )
    if edited := sorted(file for file, _ in began.sources.items() ^ now.sources.items()):
        raise ValueError(
            f"{', '.join(dict.fromkeys(edited))}: edited while this ran. DVC would record the new code for a result of "
            f"the old: where that alters no result, `dvc commit --force {stage}` does so; else give the same command"
        )


def check_lock(without: tuple[str, ...]) -> None:
    """Make sure that params.yaml still holds the settings with which, by dvc.lock, the stages ran.

    Args:
        without: stages that do not matter.

    Raises:
        ValueError: some have changed since; it names them, and says what to do.
    """
    held = _flat(_read(SETTINGS))
    for stage, ran in _read(LOCK).get("stages", {}).items():
        used = _flat(ran.get("params", {}).get(SETTINGS.name, {}))
        if stage not in without and (edited := _changes(used, {key: held.get(key) for key in used})):
            raise ValueError(
                f"params.yaml was edited since stage {stage} ran: {edited}. What it made is of the old values: put "
                "those back, or run `dvc repro`"
            )


def _read(file: Path) -> dict[str, Any]:
    """Give a YAML file's content; nothing where it is not there."""
    try:
        return params.parse(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Give keys dotted, which may be so already; a section's key may itself have a table as its value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "." not in key:
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [key for key in (before | now) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} (was {before.get(key)}, is {now.get(key)})" for key in changed)
