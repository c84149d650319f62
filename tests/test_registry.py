"""The registry's versions: found again, read, and named where their files or the store fail."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from student_project import NAME

from pipeline.core import networks
from pipeline.core.results import mlflow_store, registry


@pytest.mark.usefixtures("no_onnx")
def test_a_student_is_looked_for_under_its_own_name(registered):
    client, key = mlflow_store.connect(), registered.versions()[1].tags["key"]
    client.create_registered_model("another")
    assert registry.find(client, "another", key) is None
    assert registry.find(client, NAME, key).aliases == ["challenger", "champion"]


def test_the_newest_whole_version_of_a_student_is_found(monkeypatch):
    versions = [SimpleNamespace(version=str(number), tags={}) for number in (9, 10, 11, 2, 12)]
    versions[-1].tags["decision"] = "refused: logits differ"
    client = SimpleNamespace(search_model_versions=lambda _: versions, get_model_version=lambda name, number: number)
    monkeypatch.setattr(registry, "is_whole", lambda _, version: version.version != "11")
    assert registry.find(client, NAME, "key") == "10"


def test_a_network_that_the_disk_has_no_room_for_is_not_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    network = networks.build("test_resnet", 3, seed=0).eval()
    with pytest.raises(
        OSError, match=f"^{re.escape(str(tmp_path))}: 2 MB are free, and packing the student takes up to 5 MB"
    ):
        registry.pack(tmp_path / "model", network, 32, ["a", "b", "c"])


@pytest.mark.usefixtures("no_onnx")
def test_a_version_that_lacks_a_file_is_named(project):
    project.register()
    client, version = mlflow_store.connect(), project.versions()[1]
    for file, words in (("model.pt2", "cannot be loaded: "), ("network.json", "its network.json is missing or dam")):
        next(Path("mlartifacts").rglob(file)).unlink()
        with pytest.raises(ValueError, match=f"^models:/{NAME}/1: {words}"):
            registry.card_of(client, version)
            with registry.loaded(client, version):
                pass


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize(
    ("name", "share", "words"),
    [
        ("model.pt2", 0.5, "cannot be loaded: its model is damaged, or no program of torch.export$"),
        ("MLmodel", 0.95, "cannot be loaded: "),
        ("network.json", 0.5, "its network.json is missing or damaged"),
    ],
)
def test_a_version_whose_files_are_cut_short_is_named_and_not_the_registry(project, name, share, words):
    project.register()
    client, version = mlflow_store.connect(), project.versions()[1]
    (file,) = Path("mlartifacts").rglob(name)
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(ValueError, match=f"^models:/{NAME}/1: {words}"):
        registry.card_of(client, version)
        with registry.loaded(client, version):
            pass


@pytest.mark.parametrize("failing", ["list_artifacts", "download_artifacts"])
def test_a_store_of_files_that_does_not_answer_is_not_a_damaged_version(registered, monkeypatch, failing):
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    client, version = mlflow_store.connect(), registered.versions()[1]

    def refuse(*_, **__):
        raise MlflowException("the server is away")

    monkeypatch.setattr(mlflow.artifacts, failing, refuse)
    with pytest.raises(ValueError, match=r"^MLflow at sqlite.*: the server is away") as told:
        registry.card_of(client, version)
    assert "aliases" not in str(told.value)


def test_a_registry_that_does_not_answer_is_not_one_without_a_champion(project, monkeypatch):
    from mlflow.exceptions import MlflowException

    client = mlflow_store.connect()
    assert registry.by_alias(client, NAME, "champion") is None

    def refuse(*_):
        raise MlflowException("the server is away")

    monkeypatch.setattr(client, "get_model_version_by_alias", refuse)
    with pytest.raises(MlflowException, match="the server is away"):
        registry.by_alias(client, NAME, "champion")
