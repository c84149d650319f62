"""What several test files are given."""

import contextlib
import shutil
import signal
import sqlite3

import pytest
import yaml
from cached_project import go
from images import ROOT, prepared


@pytest.fixture(autouse=True)
def ctrl_c():
    """What Ctrl-C does to pytest stays as it is, though commands that tests call take it over."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture(scope="module")
def made_project(tmp_path_factory):
    """A project whose student is right on all test images and stands evaluated; nothing is registered."""
    import student_project

    from pipeline.core.results import mlflow_store

    root = tmp_path_factory.mktemp("project")
    made = student_project.make(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow_store.connect(root)
    return made


@pytest.fixture
def no_onnx(monkeypatch):
    """Making the file takes seconds; tests that are not about it do without."""
    from pipeline import register

    monkeypatch.setattr(register, "_write_onnx", lambda *_: "not made in this test")


@pytest.fixture
def project(made_project, tmp_path, monkeypatch):
    """A copy of the project, as the working folder."""
    import student_project

    shutil.copytree(made_project.root, tmp_path, dirs_exist_ok=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return student_project.Project(tmp_path, made_project.pixels)


@pytest.fixture(scope="module")
def made_registered(made_project, tmp_path_factory):
    """The project with its student registered."""
    import student_project

    root = tmp_path_factory.mktemp("registered")
    shutil.copytree(made_project.root, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        student_project.Project(root, made_project.pixels).register()
    return root


@pytest.fixture
def registered(made_project, made_registered, tmp_path, monkeypatch):
    """A copy of the project with its student registered, as the working folder; what it registers lies beside it."""
    import student_project

    shutil.copytree(made_registered, tmp_path, dirs_exist_ok=True)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as store:
        store.execute("UPDATE experiments SET artifact_location = ?", ((tmp_path / "mlartifacts").as_uri(),))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return student_project.Project(tmp_path, made_project.pixels)


@pytest.fixture(scope="module")
def made_store(tmp_path_factory):
    """A store that has just been made: making one takes seconds, copying it none."""
    from pipeline.core.results import mlflow_store

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("store")
        (folder / ".mlflow.db.part").write_bytes(b"half of a database")  # left by a process that was killed
        (folder / "mlflow.db").touch()
        mlflow_store.connect(folder)
    return folder / "mlflow.db"


@pytest.fixture
def root(made_store, tmp_path, monkeypatch):
    """A folder with such a store, the one that is used where the environment names none."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(made_store, tmp_path)
    return tmp_path


@pytest.fixture
def data():
    """The project's params.yaml, to be changed."""
    return yaml.safe_load((ROOT / "params.yaml").read_text())
