"""Workspaces as the tests open them."""

from contextlib import contextmanager

from pipeline.core.running import workspace

CHANGES = {"distill.epochs": 3}


def opened(toy, changes=CHANGES, said=None):
    return workspace.opened(toy, changes, (said if said is not None else []).append)


@contextmanager
def failing(workspace):
    """Leave a workspace as a run leaves it that fails."""
    try:
        with workspace as folder:
            yield folder
            raise InterruptedError
    except InterruptedError:
        pass
