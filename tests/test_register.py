"""The registry: a student is registered once, loaded back as it was evaluated, and refused where it is not."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from images import ROOT
from student_project import NAME, RESOLUTION, make_network, put_student, write_images

from pipeline import register
from pipeline.core import digests, networks
from pipeline.core import params as settings
from pipeline.core.data.batches import CleanViews, in_order
from pipeline.core.results import finished, mlflow_store, onnx_file, registry

CODE = """
import json, sys
import mlflow, numpy as np, onnxruntime, torch
pixels = np.load("pixels.npy")
plain = mlflow.pyfunc.load_model("models:/resnet50_vd_ssld@champion")
network = mlflow.pytorch.load_model("models:/resnet50_vd_ssld@champion")
file = mlflow.artifacts.download_artifacts("models:/resnet50_vd_ssld@champion/student.onnx")
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
said = {}
for batch in (1, 7):
    parts = np.split(pixels, range(batch, len(pixels), batch))
    said[f"pyfunc{batch}"] = np.concatenate([plain.predict(part) for part in parts])
    with torch.inference_mode():
        said[f"pytorch{batch}"] = np.concatenate([network(torch.from_numpy(part)).numpy() for part in parts])
    said[f"onnx{batch}"] = np.concatenate([session.run(["logits"], {"pixels": part})[0] for part in parts])
try:
    plain.predict(pixels.astype(np.float64))
    sys.exit("the signature was not enforced")
except mlflow.exceptions.MlflowException:
    pass
np.savez("said.npz", **said)
"""


def test_the_champion_predicts_in_a_fresh_process_what_was_evaluated(registered, tmp_path_factory):
    """Without this project's code, without unpickling anything, for batches of 1 and of 7."""
    rows = registered.images.rows("test")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    pixels = CleanViews(registered.images, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels
    np.save(elsewhere / "pixels.npy", pixels.numpy().astype(np.float32))
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{registered.root}/mlflow.db",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", CODE], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recorded = pyarrow.parquet.read_table(registered.data / "evaluate" / "predictions.parquet")
    recorded = np.stack(recorded["student_logits"].to_numpy())
    said = np.load(elsewhere / "said.npz")
    assert set(said) == {"pyfunc1", "pyfunc7", "pytorch1", "pytorch7", "onnx1", "onnx7"}
    for logits in said.values():
        np.testing.assert_allclose(logits, recorded, atol=1e-4)
        assert (logits.argmax(1) == registered.images.labels[rows]).all()


def test_a_version_leads_back_and_has_everything_beside_it(project, capfd):
    project.register()
    client = mlflow_store.connect()
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.version in ("1", 1)
    assert set(version.aliases) == {"champion", "challenger"}
    digest = digests.of_file(project.data / "fixres" / "weights.safetensors")
    assert (
        version.tags.items()
        >= {
            "digest.weights": digest,
            "digest.data": project.all_images.digest,
            "digest.known": project.images.digest,
            "digest.teacher": "t" * 64,
            "digest.cache": "c" * 64,
            "dvc.data/cache": "abc.dir",
            "top1": "1.0",
            "test_crop": "1.0",
            "digest.test": finished.read(project.data).test_digest,
        }.items()
    )
    assert len(version.tags["digest.params"]) == 64
    assert "no other to compare it with" in version.tags["decision"]
    assert "distilled from ResNet152_vd" in version.description
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["register.name"] == NAME
    assert {f"{who}.top1" for who in ("teacher", "baseline", "student")} <= set(run.data.metrics)
    assert run.data.tags.items() >= {"digest.weights": digest, "digest.data": project.all_images.digest}.items()
    (logged,) = client.search_logged_models([run.info.experiment_id])  # what MLflow's pages show of it
    assert logged.status == "READY"
    assert {metric.key: metric.value for metric in logged.metrics}["student.top1"] == 1.0
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "1"}]
    assert [one.model_id for one in run.outputs.model_outputs] == [logged.model_id]

    import mlflow.artifacts

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", tracking_uri=client.tracking_uri))
    assert digests.of_file(folder / "weights.safetensors") == digest
    names = {"MLmodel", "README.md", "network.json", "report.html", "metrics.json", "params.yaml", "dvc.lock"}
    names |= {"student.onnx"}
    assert names <= {file.name for file in folder.iterdir()}
    assert b".py" not in (folder / "data/model.pt2").read_bytes()  # nor where the code lies that it came from
    classifier, _ = networks.load(folder)
    assert classifier.network.get_classifier().out_features == 3
    assert settings.load(folder / "params.yaml").register_.name == NAME
    model = yaml.safe_load((folder / "MLmodel").read_text())
    assert '"shape": [-1, 3, 32, 32]' in model["signature"]["inputs"]
    assert '"shape": [-1, 3]' in model["signature"]["outputs"]
    assert model["saved_input_example_info"]["artifact_path"] == "input_example.json"
    assert model["flavors"]["python_function"]["config"]["device"] == "cpu"
    text = (folder / "README.md").read_text()
    assert digest in text
    assert "2 images in the pool, of which mining took 5" in text  # by what the cache of the fixture says

    said = capfd.readouterr()
    assert "is the champion now" in said.out
    chatter = [line for line in said.err.splitlines() if not line.startswith("register: ")]
    assert chatter == []


def test_a_version_goes_without_an_onnx_file_that_cannot_be_made(project, capfd, monkeypatch):
    def refuse(*_):
        raise ValueError("it cannot be written as ONNX: an operator is unknown")

    monkeypatch.setattr(onnx_file, "write", refuse)
    project.register()
    assert "without student.onnx: it cannot be written as ONNX: an operator is unknown" in capfd.readouterr().out
    with registry.loaded(mlflow_store.connect(), project.versions()[1]) as model:
        assert model(torch.zeros(5, 3, RESOLUTION, RESOLUTION)).shape == (5, 3)
    (folder,) = Path("mlartifacts").rglob("MLmodel")
    assert not (folder.parent / "student.onnx").exists()
    assert "There is no ONNX file of it: it cannot be written as ONNX" in (folder.parent / "README.md").read_text()


def test_an_onnx_file_that_predicts_something_else_is_left_out(project, capfd, monkeypatch):
    monkeypatch.setattr(onnx_file, "load", lambda file: lambda pixels: torch.zeros(len(pixels), 3))
    project.register()
    assert "without student.onnx: logits differ by up to" in capfd.readouterr().out
    assert not list(Path("mlartifacts").rglob("student.onnx"))


@pytest.mark.usefixtures("no_onnx")
def test_a_damaged_record_is_written_anew(registered):
    file = registered.data / "register" / "version.json"
    record = file.read_bytes()
    file.write_bytes(record[:20])
    registered.register()
    assert file.read_bytes() == record
    assert list(registered.versions()) == [1]


@pytest.mark.usefixtures("no_onnx")
def test_the_same_student_again_gives_no_new_version(registered, capfd):
    record = (registered.data / "register" / "version.json").read_bytes()
    shutil.rmtree(registered.data / "register")  # as DVC does before it runs a stage
    registered.register()
    assert list(registered.versions()) == [1]
    assert (registered.data / "register" / "version.json").read_bytes() == record
    said = capfd.readouterr().out
    assert "no new version" in said
    assert "is the champion already" in said
    assert registered.versions()[1].tags["decision"].startswith("promoted: ")


@pytest.mark.usefixtures("no_onnx")
def test_many_test_images_are_compared_with_what_was_recorded_of_the_same(project, monkeypatch):
    monkeypatch.setattr(register, "CHECKED", 7)
    Path("dvc.lock").unlink()  # as without DVC
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 1}


@pytest.mark.parametrize("count", [1, 6, 7, 8, 13, 100])
def test_some_of_many_are_spread_evenly(count):
    chosen = register._some(np.arange(count), 7)
    assert 1 <= len(chosen) <= 7
    assert chosen[0] == 0
    assert len({*np.diff(chosen)}) <= 1
    assert count - chosen[-1] <= -(-count // 7)


@pytest.mark.usefixtures("no_onnx")
def test_an_evaluation_of_another_student_is_not_registered(project):
    path = project.data / "evaluate" / "predictions.parquet"
    table = pyarrow.parquet.read_table(path)
    logits = np.stack(table["student_logits"].to_numpy())
    logits[3] += 0.01
    lists = pyarrow.FixedSizeListArray.from_arrays(logits.reshape(-1), 3)
    pyarrow.parquet.write_table(table.set_column(1, "student_logits", lists), path)
    with pytest.raises(ValueError, match=r"student does not predict what data/evaluate recorded.*differ by up to 0.01"):
        project.register()
    assert project.versions() == {}
    assert not (project.data / "register").exists()
    (project.data / "evaluate/speed.json").write_text(json.dumps({"device": "cuda"}))  # which rounds more coarsely
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 1}


@pytest.mark.usefixtures("no_onnx")
def test_a_version_that_predicts_something_else_is_refused_for_good(project, monkeypatch):
    another = nullcontext(lambda pixels: torch.zeros(len(pixels), 3))
    with monkeypatch.context() as patch:
        patch.setattr(registry, "loaded", lambda *_: another)
        with pytest.raises(ValueError, match=r"version 1 was loaded back .* does not predict what data/eval"):
            project.register()
    assert project.aliases() == {}
    assert project.versions()[1].tags["decision"].startswith("refused: logits differ by up to ")
    assert not (project.data / "register").exists()
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 2}
    mlflow_store.connect().delete_model_version(NAME, "2")
    project.register(if_missing=True)
    assert project.aliases() == {"champion": 3, "challenger": 3}


@pytest.mark.usefixtures("no_onnx")
def test_if_missing_registers_what_the_registry_lacks_and_nothing_else(project, capfd, tmp_path_factory, monkeypatch):
    with pytest.raises(ValueError, match="so that nothing is known to be registered"):
        project.register(if_missing=True)
    project.register()
    project.register(if_missing=True)
    assert "nothing to do" in capfd.readouterr().out
    record = (project.data / "register" / "version.json").read_bytes()

    shutil.rmtree("mlartifacts")  # the store still speaks of the version, but its files are gone
    project.register(if_missing=True)
    assert "lacks this version" in capfd.readouterr().out
    assert project.aliases() == {"champion": 2, "challenger": 2}
    with registry.loaded(mlflow_store.connect(), project.versions()[2]) as model:
        assert model(torch.zeros(5, 3, RESOLUTION, RESOLUTION)).shape == (5, 3)
    project.register(if_missing=True)
    assert "nothing to do" in capfd.readouterr().out

    clone = tmp_path_factory.mktemp("clone")  # `git clone` and `dvc pull`: the store is not part of that
    shutil.copytree("data", clone / "data")
    monkeypatch.chdir(clone)
    project.register(if_missing=True)
    assert "lacks this version" in capfd.readouterr().out
    assert project.aliases() == {"champion": 1, "challenger": 1}
    assert (project.data / "register" / "version.json").read_bytes() == record

    shutil.rmtree("mlartifacts")
    put_student(clone / "data", project.images, make_network(project.pixels, spoilt=1.0))
    with pytest.raises(ValueError, match="describes another student"):
        project.register(if_missing=True)


@pytest.mark.usefixtures("no_onnx")
def test_what_does_not_fit_together_is_refused(project):
    write_images(project.data / "prepare", lambda at: 0, first=100)
    with pytest.raises(ValueError, match="other test images"):
        project.register()
    write_images(project.data / "prepare", lambda at: 0, classes=["dog", "cat", "owl"])
    with pytest.raises(ValueError, match="fixres: knows other classes than data/prepare holds; run `dvc repro`"):
        project.register()
    (project.data / "evaluate" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json: not there"):
        project.register()


def test_differ():
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 10)).astype(np.float32)
    assert register.differ(logits, logits, 1e-4) == ""
    assert register.differ(logits + 1e-5, logits, 1e-4) == ""
    assert "logits differ by up to 0.1" in register.differ(logits + 0.1, logits, 1e-4)
    assert "differ" in register.differ(np.full_like(logits, np.nan), logits, 1e-4)
    tie = np.array([[1.0, 1.0 + 1e-7]], np.float32)
    assert register.differ(tie[:, ::-1], tie, 1e-4) == ""  # which of two equals is the first says nothing


def test_the_settings_of_a_version_are_written_as_they_were_given(tmp_path, monkeypatch):
    """DVC runs a stage again where `loss: ssld` has become `loss: {ssld: 1.0}`."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text, encoding="utf-8")
    params = settings.load()
    assert register._as_written(params) == text
    for later in (text.replace("seed: 0 ", "seed: 1 "), "seed: [", ""):  # edited while the stage runs
        Path("params.yaml").write_text(later, encoding="utf-8")
        assert settings.check(yaml.safe_load(register._as_written(params))) == params
