"""What several test files are given."""

import shutil

import pytest
from cached_project import go
from images import prepared


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The prepared shapes; the working folder is theirs while a module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        yield prepared(tmp_path_factory.mktemp("shapes"), patch)


@pytest.fixture(scope="session")
def cached_project_once(tmp_path_factory):
    """A folder in which everything up to the cache has run, to copy."""
    from pipeline import cache, mine, score, teacher  # for the tests that ask: they take seconds to import

    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        prepared(folder, patch)
        go(teacher, score, mine, cache)
    return folder


@pytest.fixture
def cached_project(cached_project_once, tmp_path, monkeypatch):
    """A copy of that folder, which is the working folder."""
    shutil.copytree(cached_project_once, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path / "copy"


@pytest.fixture
def alone(tmp_path):
    """A process group of this process only."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
