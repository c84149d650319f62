"""What is looked at before `make repro` or a flow starts anything, so that a mistake is named at once.

No stage imports this, so a change here reruns nothing. Run: python -m pipeline.core.preflight
"""

import sys
from pathlib import Path

from pipeline.core import params
from pipeline.core.params import Params

EXAMPLE = "data/digits"  # what stage digits makes


def check_images(settings: Params, root: Path) -> None:
    """Make sure that the folders and archives of images are there; the example's folder is made by the first stage.

    Args:
        root: the project's root, from which the settings' paths lead.

    Raises:
        ValueError: one is not there; its key is named.
    """
    for key in ("labelled_root", "unlabelled_root"):
        path = getattr(settings.prepare, key)
        if path != EXAMPLE and not (root / path).exists():
            raise ValueError(f"prepare.{key}: {path}: no such folder or archive")


def main() -> None:
    """Check params.yaml, and that its images are there."""
    try:
        check_images(params.load(), Path())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
