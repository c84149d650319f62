"""timm's pretrained weights, fetched before anything runs, and not after hours of work on what comes first."""

from pathlib import Path

from pipeline.core.params import parse
from pipeline.core.sections import TIMM, Params

STARTING = {"teacher": ("teacher",), "student": ("baseline", "distill")}  # the stages that start from their weights


def fetch(params: Params, root: Path, keys: list[str]) -> None:
    """Have timm download weights; it keeps them for the stages.

    Args:
        root: the project.
        keys: the settings that ask for them, such as "student.init".

    Raises:
        ValueError: they cannot be had, and stages that start from them have not been run.
    """
    for key in keys:
        who = key.partition(".")[0]
        model = getattr(params, who).model
        if all(_made_from(root, stage_name, key, model) for stage_name in STARTING[who]):
            continue
        import models  # with timm, it takes seconds to load

        try:
            models.build(model, pretrained=True)
        except ValueError as error:
            words = str(error).rstrip(".")
            instead = "checkpoint, and bring the file" if key == "teacher.source" else "a file of weights, or to null"
            raise ValueError(f"{key}: {words}; without a network, set it to {instead}") from None


def _made_from(root: Path, stage_name: str, key: str, model: str) -> bool:
    """Whether a stage's outputs are there, and made from timm's weights of that network, by dvc.lock."""
    section, _, name = key.partition(".")
    try:
        lock = parse((root / "dvc.lock").read_text(encoding="utf-8"))
        made = lock["stages"][stage_name]["params"]["params.yaml"][section]
        return (root / "data" / stage_name).exists() and (made["model"], made[name]) == (model, TIMM)
    except (OSError, ValueError, KeyError, TypeError):
        return False
