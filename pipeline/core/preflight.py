"""What is looked at before `make repro` or a flow starts anything, so that a mistake is named at once.

No stage imports this, so a change here reruns nothing. Run: python -m pipeline.core.preflight
"""

import json
import sys
from pathlib import Path

from pipeline.core import atomic, params
from pipeline.core.params import Params

EXAMPLE = "data/digits"  # what stage digits makes
NOTED = Path(".scratch/preflight.json")  # the networks that were looked at last, and found good
CLASSES = 10  # the number makes no difference here, and the images' own is not known yet


def check(settings: Params, root: Path) -> None:
    """Make sure that images and weights are there, and that the networks are known and take the images.

    Args:
        root: the project's root, from which the settings' paths lead.

    Raises:
        ValueError: one line that names the key.
    """
    check_files(settings, root)
    check_networks(settings, root)


def check_files(settings: Params, root: Path) -> None:
    """Make sure that files and folders are there, all but the example's, which the first stage makes.

    Raises:
        ValueError: see `check`.
    """
    for key in ("labelled_root", "unlabelled_root"):
        path = getattr(settings.prepare, key)
        if path != EXAMPLE and not (root / path).exists():
            raise ValueError(f"prepare.{key}: {path}: no such folder or archive")
    checkpoint = settings.teacher.checkpoint if settings.teacher.source == "checkpoint" else None
    for key, file in (("teacher.checkpoint", checkpoint), ("student.init", settings.student.init)):
        if file and not (root / file).is_file():
            raise ValueError(f"{key}: {file}: no such file")


def check_networks(settings: Params, root: Path) -> None:
    """Make sure that the networks are known and fit the settings; those of the last time are not built again.

    Raises:
        ValueError: see `check`.
    """
    views, fixres = settings.views.resolution, settings.fixres.resolution
    trained = {name: getattr(settings, name).lr_multipliers for name in ("baseline", "distill", "finetune")}
    wanted = {"teacher": [settings.teacher.model, views], "student": [settings.student.model, views, fixres]}
    noted, asked = root / NOTED, {**wanted, "lr_multipliers": trained}
    if noted.exists() and json.loads(noted.read_text()) == json.loads(json.dumps(asked)):
        return
    import torch  # with timm, it takes seconds to load

    from pipeline.core import engine, networks

    for who, (name, *resolutions) in wanted.items():
        try:
            with torch.device("meta"):  # no weight is drawn
                classifier = networks.build(name, CLASSES, seed=0)
            for resolution in resolutions:
                networks.check_takes(classifier, name, resolution)
        except ValueError as error:
            raise ValueError(f"{who}.model: {error}") from None
    for name, multipliers in trained.items():
        if multipliers is not None:  # the student's: it was built last
            engine.with_multipliers(classifier.network, getattr(settings, name))
    noted.parent.mkdir(exist_ok=True)
    atomic.write_json(noted, asked)


def main() -> None:
    """Check params.yaml, and what it names."""
    try:
        check(params.load(), Path())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
