"""The registry: a student is registered once, loaded back as it was evaluated, and promoted only if it is better."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from student_project import CLASSES, NAME, RESOLUTION, ROOT, Project, make_network, put_student, write_images

from pipeline import register
from pipeline.core import finished, mlflow_store, networks, onnx_file, registry, weights
from pipeline.core import params as settings
from pipeline.core.batches import Views, in_order

REPLICAS = settings.load(ROOT / "params.yaml").cache.replicas


@pytest.fixture(scope="module")
def made_project(tmp_path_factory):
    """A project whose student, `good`, is right on all test images and stands evaluated; nothing is registered."""
    root = tmp_path_factory.mktemp("project")
    data = root / "data"
    images = write_images(data / "prepare", lambda at: 0)
    rows = images.rows("test", "labelled")
    pixels = Views(images, None, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels
    good = make_network(pixels)
    with torch.inference_mode():
        said = dict(zip(images.ids[rows].tolist(), good(pixels).argmax(1).tolist(), strict=True))
    assert set(said.values()) == {0, 1, 2}
    numbers = {int(images.source(row).split(".")[0]): said[int(images.ids[row])] for row in rows}
    images = write_images(data / "prepare", numbers.__getitem__)
    for folder, file, content in (
        ("teacher", "network.json", {"digest": "t" * 64}),
        ("cache", "cache.json", {"fingerprint": "c" * 64, "wanted_views": (24 + 5) * REPLICAS}),
    ):
        (data / folder).mkdir()
        (data / folder / file).write_text(json.dumps(content))
    lock = {"schema": "2.0", "stages": {"cache": {"outs": [{"path": "data/cache", "md5": "abc.dir"}]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert put_student(data, images, good) == 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow_store.connect(root)
    return SimpleNamespace(root=root, images=images, pixels=pixels, labels=numbers)


@pytest.fixture
def no_onnx(monkeypatch):
    """Making the file takes seconds; tests that are not about it do without."""
    monkeypatch.setattr(register, "_write_onnx", lambda *_: "not made in this test")


@pytest.fixture
def project(made_project, tmp_path, monkeypatch):
    """A copy of the project, as the working folder."""
    shutil.copytree(made_project.root, tmp_path, dirs_exist_ok=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, made_project.pixels)


@pytest.fixture(scope="module")
def made_registered(made_project, tmp_path_factory):
    """The project with its student registered."""
    root = tmp_path_factory.mktemp("registered")
    shutil.copytree(made_project.root, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        Project(root, made_project.pixels).register()
    return root


@pytest.fixture
def registered(made_project, made_registered, tmp_path, monkeypatch):
    """A copy of the project with its student registered, as the working folder."""
    shutil.copytree(made_registered, tmp_path, dirs_exist_ok=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, made_project.pixels)


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
    pixels = Views(registered.images, None, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels
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
    digest = weights.file_digest(project.data / "fixres" / "weights.safetensors")
    assert (
        version.tags.items()
        >= {
            "digest.weights": digest,
            "digest.data": project.images.digest,
            "digest.teacher": "t" * 64,
            "digest.cache": "c" * 64,
            "dvc.data/cache": "abc.dir",
            "top1": "1.0",
        }.items()
    )
    assert len(version.tags["digest.params"]) == 64
    assert "no champion" in version.tags["decision"]
    assert "distilled from ResNet152_vd" in version.description
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["register.name"] == NAME
    assert {f"{who}.top1" for who in ("teacher", "baseline", "student")} <= set(run.data.metrics)
    assert run.data.tags.items() >= {"digest.weights": digest, "digest.data": project.images.digest}.items()
    (logged,) = client.search_logged_models([run.info.experiment_id])  # what MLflow's pages show of it
    assert logged.status == "READY"
    assert {metric.key: metric.value for metric in logged.metrics}["student.top1"] == 1.0
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "1"}]
    assert [one.model_id for one in run.outputs.model_outputs] == [logged.model_id]

    import mlflow.artifacts

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", tracking_uri=client.tracking_uri))
    assert weights.file_digest(folder / "weights.safetensors") == digest
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
    assert "0 images in the pool, of which mining took 5" in text  # by what the cache of the fixture says

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
def test_only_a_better_student_becomes_champion(project):
    worse, best = project.student(spoilt=1.0), None
    assert worse < 1.0
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 1}

    worst = project.student(spoilt=100.0)
    assert worst < worse
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 2}
    assert project.versions()[2].tags["decision"].startswith("not promoted")

    best = project.student(spoilt=0.0)
    assert best == 1.0
    project.register(margin=0.99)
    assert project.aliases() == {"champion": 1, "challenger": 3}
    assert "margin of 0.99" in project.versions()[3].tags["decision"]
    project.register(margin=0.0)  # a smaller margin decides anew, and needs no new version
    assert project.aliases() == {"champion": 3, "challenger": 3}
    assert sorted(project.versions()) == [1, 2, 3]


@pytest.mark.usefixtures("no_onnx")
def test_an_equal_student_does_not_replace_the_champion(registered):
    assert registered.student(spoilt=1e-4) == 1.0
    registered.register()
    assert registered.aliases() == {"champion": 1, "challenger": 2}


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_of_other_test_images_is_tested_anew(registered, made_project, capfd):
    champion = make_network(made_project.pixels)
    # Labels in reverse order make no sense of these images: the champion must do badly on them.
    images = registered.images = write_images(registered.data / "prepare", lambda at: made_project.labels[47 - at])
    rows = images.rows("test")
    with torch.inference_mode():
        logits = champion(Views(images, None, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels)
    expected = (logits.argmax(1).numpy() == images.labels[rows]).mean()
    assert expected < 1.0
    registered.student(spoilt=0.5)
    registered.register()
    assert "the champion on these test images" in capfd.readouterr().err
    assert f"version 1's {expected:.4f}" in registered.versions()[2].tags["decision"]


@pytest.mark.parametrize(
    ("classes", "decision"),
    [(["owl", "cat", "dog"], "does not beat version 1's 1.0000"), (["cat", "dog", "yak"], "lacks (such as 'owl')")],
)
@pytest.mark.usefixtures("no_onnx")
def test_classes_are_compared_by_name(registered, made_project, classes, decision):
    """Another order of classes makes no difference; a champion that knows a class which the challenger lacks stays."""
    order = {old: classes.index(name) if name in classes else 2 for old, name in enumerate(CLASSES)}
    registered.images = write_images(
        registered.data / "prepare", lambda at: order[made_project.labels[at]], classes=classes
    )
    registered.student(spoilt=0.5)
    registered.register()
    assert registered.aliases()["champion"] == 1
    assert decision in registered.versions()[2].tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_that_knows_a_class_without_test_images_is_not_replaced(project, made_project):
    """The test split is the same for both, and does not show the class."""
    shown = {at: label for at, label in made_project.labels.items() if label != 2}

    def put(classes, spoilt):
        project.images = write_images(project.data / "prepare", lambda at: shown.get(at, 0), classes=classes, count=24)
        return project.student(spoilt)

    put(CLASSES, spoilt=0.5)
    project.register()
    put([*CLASSES[:2], "yak"], spoilt=0.0)
    project.register()
    first, second = (project.versions()[number] for number in (1, 2))
    assert first.tags["digest.test"] == second.tags["digest.test"]
    assert project.aliases() == {"champion": 1, "challenger": 2}
    assert "lacks (such as 'owl')" in second.tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_whose_files_are_gone_is_replaced_and_said_to_be(project, capfd):
    project.register()
    shutil.rmtree("mlartifacts")
    project.student(spoilt=1.0)
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 2}
    assert "of the champion before, version 1, the files are gone" in capfd.readouterr().out


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


@pytest.mark.usefixtures("no_onnx")
def test_a_version_that_predicts_something_else_is_refused(project):
    path = project.data / "evaluate" / "predictions.parquet"
    table = pyarrow.parquet.read_table(path)
    logits = np.stack(table["student_logits"].to_numpy())
    logits[3] += 0.01
    lists = pyarrow.FixedSizeListArray.from_arrays(logits.reshape(-1), 3)
    pyarrow.parquet.write_table(table.set_column(1, "student_logits", lists), path)
    with pytest.raises(ValueError, match="does not predict what data/evaluate recorded"):
        project.register()
    assert project.aliases() == {}
    assert not (project.data / "register").exists()
    (project.data / "evaluate/speed.json").write_text(json.dumps({"device": "cuda"}))  # which rounds more coarsely
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 1}


@pytest.mark.usefixtures("no_onnx")
def test_if_missing_registers_what_the_registry_lacks_and_nothing_else(project, capfd, tmp_path_factory, monkeypatch):
    with pytest.raises(ValueError, match="nothing was registered yet"):
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
    (project.data / "evaluate" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json: not there"):
        project.register()


def test_a_version_of_a_run_without_dvcs_record_has_no_tags_of_it(project):
    record = finished.describe(finished.read(project.data), NAME, 1.0)
    params = settings.load(ROOT / "params.yaml")
    assert finished.lineage(record, params, project.data)["dvc.data/cache"] == "abc.dir"
    Path("dvc.lock").write_text("")  # as while DVC writes it
    assert not any(tag.startswith("dvc.") for tag in finished.lineage(record, params, project.data))


def test_a_version_belongs_to_how_it_was_shown_which_images(project):
    def key(crop=1.0):
        return finished.describe(finished.read(project.data), NAME, crop)["key"]

    keys = {key(), key(crop=0.9)}
    write_images(project.data / "prepare", lambda at: 0)  # the same images under other labels
    assert len({*keys, key()}) == 3


@pytest.mark.parametrize(
    ("challenger", "champion", "margin", "promoted"),
    [
        (0.9, 0.8, 0.0, True),
        (0.8, 0.8, 0.0, False),
        (0.9, 0.8, 0.1, True),
        (0.9, 0.85, 0.1, False),
        (0.7, 0.8, -1.0, False),
    ],
)
def test_decide(challenger, champion, margin, promoted):
    assert register.decide(challenger, champion, margin) is promoted


def test_differ():
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 10)).astype(np.float32)
    assert register.differ(logits, logits, 1e-4) == ""
    assert register.differ(logits + 1e-5, logits, 1e-4) == ""
    assert "logits differ by up to 0.1" in register.differ(logits + 0.1, logits, 1e-4)
    assert "differ" in register.differ(np.full_like(logits, np.nan), logits, 1e-4)
    tie = np.array([[1.0, 1.0 + 1e-7]], np.float32)
    assert register.differ(tie[:, ::-1], tie, 1e-4) == ""  # which of two equals is the first says nothing
