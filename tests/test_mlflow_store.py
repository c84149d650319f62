"""MLflow's store: made once, opened by many, named and refused in a line."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import yaml

from pipeline.core.results import mlflow_store, tracking

ROOT = Path(__file__).parent.parent


def test_the_address_is_a_file_in_the_root_unless_the_environment_names_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_store.default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert mlflow_store.default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert mlflow_store.default_uri(tmp_path) == "http://mlflow.example:5000"


@pytest.mark.parametrize("folder", ["what?", "100%25"])
def test_a_path_that_cannot_stand_in_an_address_is_named(tmp_path, monkeypatch, folder):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match=r"mlflow.db: MLflow takes a \? and a % with two hex.* move the project"):
        mlflow_store.connect(tmp_path / folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert mlflow_store.default_uri(tmp_path / folder) == "sqlite:///elsewhere.db"


def test_an_address_may_have_encoded_characters(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/my%20runs/mlflow.db")
    folder = tmp_path / "my runs"
    folder.mkdir()
    client = mlflow_store.connect(tmp_path)
    place = client.get_experiment(mlflow_store.experiment(client, tmp_path)).artifact_location
    assert place == (folder / "mlartifacts").as_uri()
    assert (folder / "mlflow.db").stat().st_size


def test_what_the_environment_tells_mlflow_goes_before_this_projects_defaults(root, monkeypatch):
    for name in mlflow_store.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    mlflow_store.connect(root)
    found = {name: os.environ[name] for name in mlflow_store.DEFAULTS}
    assert found == mlflow_store.DEFAULTS | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "7"}


def test_a_store_named_with_options_is_made_where_it_is_named_to_be(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/new/runs.db?timeout=20"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow_store.connect(tmp_path)
    found = client.get_experiment(mlflow_store.experiment(client, tmp_path))
    assert found.artifact_location == (tmp_path / "new/mlartifacts").as_uri()
    assert found.tags["mlflow.experimentKind"] == "custom_model_development"
    with mlflow_store.exclusively(uri, "register"):
        assert {"runs.db", "runs.db.register.lock"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert not [path for path in tmp_path.rglob("*") if "?" in path.name]


def test_a_store_that_another_process_has_made_meanwhile_stays(made_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = []

    @contextlib.contextmanager
    def late(uri, what):
        made.append(os.stat(shutil.copy(made_store, tmp_path)).st_ino)
        yield

    monkeypatch.setattr(mlflow_store, "exclusively", late)
    mlflow_store.connect(tmp_path)
    assert [(tmp_path / "mlflow.db").stat().st_ino] == made


@pytest.mark.parametrize("uri", ["http://mlflow.example/", "https://mlflow.example:5000"])
def test_a_server_keeps_files_where_it_likes(tmp_path, uri):
    made, found = [], []
    client = SimpleNamespace(
        tracking_uri=uri,
        get_experiment_by_name=lambda name: found[0] if found else None,
        create_experiment=lambda *arguments: made.append(arguments) or "1",
    )
    assert mlflow_store.experiment(client, tmp_path) == "1"
    assert made == [("ssld", None, mlflow_store.KIND)]
    place = "file:///a/folder/of/the/server"
    found.append(SimpleNamespace(lifecycle_stage="active", artifact_location=place, experiment_id="2"))
    assert mlflow_store.experiment(client, tmp_path) == "2"


def test_an_experiment_that_another_process_has_made_meanwhile_is_taken(tmp_path):
    from mlflow.exceptions import MlflowException

    def refuse(*_):
        raise MlflowException("it exists already")

    other = SimpleNamespace(lifecycle_stage="active", artifact_location="s3://runs", experiment_id="3")
    answers = [None, other, None, None]
    client = SimpleNamespace(
        tracking_uri="http://host", get_experiment_by_name=lambda name: answers.pop(0), create_experiment=refuse
    )
    assert mlflow_store.experiment(client, tmp_path) == "3"
    with pytest.raises(ValueError, match=r"^MLflow at http://host: it exists already$"):
        mlflow_store.experiment(client, tmp_path)


@pytest.mark.parametrize("uri", ["http://host:5000", "http://host:5000/"])
def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch, uri):
    asked = []
    monkeypatch.setattr("requests.get", lambda *arguments, **options: asked.append((arguments, options)))
    mlflow_store._reach_server(uri)
    assert asked == [(("http://host:5000/health",), {"timeout": mlflow_store.PROBE_SECONDS})]


def test_a_databases_error_is_told_without_its_query_and_with_what_to_do(tmp_path):
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    def told(uri, error):
        with pytest.raises(ValueError) as raised, mlflow_store.speaking_plainly(uri):
            raise error
        return str(raised.value)

    file = f"{tmp_path}/mlflow.db"
    uri = f"sqlite:///{file}?timeout=9"
    for words, hint in {
        "database is locked": "",
        "no such table: runs": f"; {file} is damaged: move it away, and a new one is made",
    }.items():
        error = OperationalError("SELECT 1", {}, Exception(words))
        assert told(uri, error) == f"MLflow at {uri}: (builtins.Exception) {words}{hint}"
        assert told("mysql://me:secret@h/runs", error) == f"MLflow at mysql://h/runs: (builtins.Exception) {words}"
    error = MlflowException("of <database_uri>: " + 1000 * "no ")
    long = told("mysql://me:secret@host/runs", error)
    assert long.startswith("MLflow at mysql://host/runs: of mysql://host/runs: no no")
    assert len(long) < 550


def track(root):
    os.chdir(root)
    with tracking.run("teacher", {}, {}) as run:
        run.log(1, {"loss": 1.0})
    return mlflow_store.connect().get_run(run.id).info.status


def test_many_processes_may_open_a_new_store_at_once(tmp_path, monkeypatch):
    """MLflow itself leaves a broken file behind when they do."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store"])  # imported once, not in each
    with concurrent.futures.ProcessPoolExecutor(4, processes) as pool:
        assert list(pool.map(track, [tmp_path] * 4)) == ["FINISHED"] * 4
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (4,)
        assert database.execute("select count(*) from experiments where name = 'ssld'").fetchone() == (1,)


def test_a_store_whose_making_was_cut_short_is_made_anew(made_store):
    assert mlflow_store.connect(made_store.parent).search_experiments()
    assert not (made_store.parent / ".mlflow.db.part").exists()


def test_a_registry_elsewhere_is_refused(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", mlflow_store.default_uri(root))
    mlflow_store.connect(root)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{root}/other.db")
    with pytest.raises(ValueError, match=r"^MLFLOW_REGISTRY_URI names another store.*: unset it$"):
        mlflow_store.connect(root)


def test_a_deleted_experiment_is_named_and_how_to_have_it_back(root):
    client = mlflow_store.connect(root)
    client.delete_experiment(mlflow_store.experiment(client, root))
    with pytest.raises(ValueError, match=r"ssld was deleted.*restore --experiment-id \d") as told:
        mlflow_store.experiment(client, root)
    command = str(told.value).partition("have it back: ")[2]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert mlflow_store.experiment(client, root)


def test_a_moved_project_is_told_that_its_versions_files_are_not_beside_it(root, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(root, before)
    client = mlflow_store.connect(before)
    assert mlflow_store.experiment(client, before) == mlflow_store.experiment(client, before)
    before.rename(after)
    with pytest.raises(ValueError, match=f"belong into {before}, which is gone") as told:
        mlflow_store.experiment(mlflow_store.connect(after), after)
    subprocess.run(str(told.value).split("`")[1], shell=True, check=True)
    assert mlflow_store.experiment(mlflow_store.connect(after), after)


def test_a_copied_project_does_not_write_among_the_files_of_the_first(root, tmp_path, monkeypatch):
    first, copy = tmp_path / "first", tmp_path / "copy"
    shutil.copytree(root, first)
    one = mlflow_store.experiment(mlflow_store.connect(first), first)
    shutil.copytree(first, copy)
    with pytest.raises(ValueError, match=f"belong into {first}, not beside it, as in a copy of the project") as told:
        mlflow_store.experiment(mlflow_store.connect(copy), copy)
    (address,) = shlex.split(re.search("MLFLOW_TRACKING_URI=(.*?);", str(told.value))[1])
    with monkeypatch.context() as context:
        context.setenv("MLFLOW_TRACKING_URI", address)
        assert mlflow_store.experiment(mlflow_store.connect(copy), copy) == one
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "mlflow.db").symlink_to(first / "mlflow.db")
    assert mlflow_store.experiment(mlflow_store.connect(linked), linked) == one
    another = tmp_path / "another"
    shutil.copytree(first, another)
    (another / "mlflow.db").rename(another / "old.db")
    client = mlflow_store.connect(another)
    place = client.get_experiment(mlflow_store.experiment(client, another)).artifact_location
    assert place == (another / "mlartifacts").as_uri()


def test_a_database_s_files_are_the_project_s_also_of_a_run_in_a_workspace(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite+pysqlite:///{root}/mlflow.db")
    monkeypatch.setenv(mlflow_store.PROJECT, str(tmp_path / "project"))
    client = mlflow_store.connect(tmp_path / "workspace")
    found = client.get_experiment(mlflow_store.experiment(client, tmp_path / "workspace"))
    assert found.artifact_location == (tmp_path / "project/mlartifacts").as_uri()


@pytest.mark.parametrize("uri", ["http://mlflow.example:5000", "sqlite:///{folder}/mlflow.db"])
def test_two_that_register_at_a_store_take_turns(tmp_path, uri):
    uri = uri.format(folder=tmp_path)
    with mlflow_store.exclusively(uri, "register"), pytest.raises(filelock.Timeout):
        mlflow_store.exclusively(uri, "register").acquire(timeout=0)
    for other in ((f"{uri}1", "register"), (uri, "init")):
        with mlflow_store.exclusively(uri, "register"):
            mlflow_store.exclusively(*other).acquire(timeout=0).lock.release()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("http://user:p@ss@127.0.0.1:9", "http://127.0.0.1:9"),
        (
            "to https://user:secret@host/api and sqlite:////me@home/x.db",
            "to https://host/api and sqlite:////me@home/x.db",
        ),
        ("postgresql://host/runs?user=u&password=secret&ssl=1", "postgresql://host/runs?user=u&password=***&ssl=1"),
        ("mssql://host/runs?PWD=secret", "mssql://host/runs?PWD=***"),
        ("mysql://host/runs?passwd=secret", "mysql://host/runs?passwd=***"),
        (
            "postgresql://host/runs?sslpassword=secret&sslmode=verify",
            "postgresql://host/runs?sslpassword=***&sslmode=verify",
        ),
        ("mssql+pyodbc://?odbc_connect=DRIVER%3Dx%3BPWD%3Dsecret", "mssql+pyodbc://?odbc_connect=***"),
        ("https://host/api?token=secret", "https://host/api?token=***"),
    ],
)
def test_passwords_are_not_shown(words, shown):
    from mlflow.exceptions import MlflowException

    assert mlflow_store.shown(words) == shown
    with pytest.raises(ValueError) as error, mlflow_store.speaking_plainly("http://host"):
        raise MlflowException(words)
    assert str(error.value) == f"MLflow at http://host: {shown}"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:9", "no MLflow server answers at http://127.0.0.1:9"),
        ("http://user:secret@127.0.0.1:9", "no MLflow server answers at http://127.0.0.1:9"),
        ("sqlite:///{folder}/not-one.db", "file is not a database"),
        ("nonsense://127.0.0.1", "Supported URI schemes"),
        ("postgresql://user:secret@127.0.0.1/runs", "this kind of store needs a package: psycopg"),
        ("sqlite://", "names no file, so that nothing would last"),
        ("sqlite:///", "names no file, so that nothing would last"),
        ("sqlite:///:memory:", "names no file, so that nothing would last"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_at_once(tmp_path, monkeypatch, uri, words):
    (tmp_path / "not-one.db").write_text("no database at all, " * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    began = time.monotonic()
    with pytest.raises(ValueError, match=words) as raised, tracking.run("teacher", {}, {}):
        pass
    assert time.monotonic() - began < 10
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_pages_show_the_registry_of_the_settings(tmp_path):
    """`make ui`, up to its first page; where a server is named, its address is all there is to say."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["register"]["name"] = "photos"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.core.running.mlflow_pages", "--port", str(port)]
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    variables |= {"PYTHONPATH": str(ROOT)}
    pages = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert pages.stdout.readline() == f"The student's versions: http://127.0.0.1:{port}/#/models/photos\n"
        server = f"http://127.0.0.1:{port}"
        assert pages.stdout.readline() == f"The training runs: {server}/#/experiments/1/runs\n"
        for _ in range(600):
            with contextlib.suppress(OSError):
                assert "MLflow" in urllib.request.urlopen(server, timeout=5).read().decode()
                break
            assert pages.poll() is None
            time.sleep(0.1)
        told = subprocess.run(
            command, cwd=tmp_path, env={**variables, "MLFLOW_TRACKING_URI": server}, capture_output=True, text=True
        )
        assert told.stdout.splitlines() == [
            f"The student's versions: {server}/#/models/photos",
            f"The training runs: {server}/#/experiments/1/runs",
        ]
        assert told.returncode == 0
    finally:
        pages.terminate()
        pages.wait(timeout=30)
