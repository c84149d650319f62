"""MLflow's runs: resumed, ended as they should be, and never in training's way."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cached_project import go

from pipeline import teacher
from pipeline.core.results import mlflow_store, tracking

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_the_root(root, monkeypatch):
    monkeypatch.chdir(root)


def look(run):
    return mlflow_store.connect().get_run(run.id)


def history(run, key):
    return [(metric.step, metric.value) for metric in mlflow_store.connect().get_metric_history(run.id, key)]


def test_importing_it_does_not_import_mlflow():
    code = "import sys, pipeline.core.results.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_run_holds_parameters_metrics_tags_and_ends_finished(root, monkeypatch):
    monkeypatch.setenv(tracking.FLOW_RUN, "brave-otter")
    many = {f"key{number}": number for number in range(250)}  # more than MLflow takes in one request
    params, identities = {"distill": {"epochs": 2}, "seed": 0, "many": many}, {"data": "d1", "cache": "c1"}
    with tracking.run("distill", params, identities) as run:
        run.log(1, {"train_loss": 2.0, "val_top1": 0.5})
        run.log(2, {"train_loss": 1.0, "val_top1": 0.75})
        run.tag({"words": "of a person"})
    found = look(run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "distill"
    assert found.data.params == {"distill.epochs": "2", "seed": "0", **{f"many.{key}": str(many[key]) for key in many}}
    assert found.data.metrics == {"train_loss": 1.0, "val_top1": 0.75}
    assert found.data.tags.items() >= {"stage": "distill", "digest.data": "d1", "digest.cache": "c1"}.items()
    assert found.data.tags["words"] == "of a person"
    assert found.data.tags["flow_run"] == "brave-otter"
    assert not [tag for tag in found.data.tags if tag.startswith("resumed.")]
    assert found.info.artifact_uri.startswith((root / "mlartifacts").as_uri())


def test_the_commit_and_whether_the_code_differs_from_it_are_tags(root, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=root, check=True)

    assert tracking.git_tags() == {}
    (root / "pipeline").mkdir()
    (root / "pipeline" / "code.py").write_text("1")
    git("init", "--quiet")
    git("add", "pipeline")
    git("commit", "--quiet", "--message", "first")
    clean = tracking.git_tags()
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"  # what is not code, such as the store's file, does not count
    settings = ("params.yaml", "dvc.yaml", "requirements.txt", ".dvc/config", "data/photos.dvc")
    for file in ("pipeline/code.py", "models/own.py", *settings):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("2")
        assert tracking.git_tags() == {**clean, "git.dirty": "true"}, file
        git("stash", "--quiet", "--include-untracked", "--", file)
        assert tracking.git_tags() == clean
    monkeypatch.setenv("PATH", str(root))  # where no git is
    assert tracking.git_tags() == {}


def test_files_that_git_cannot_compare_are_not_said_to_be_those_of_the_commit(root, monkeypatch, capfd):
    subprocess.run(["git", "init", "--quiet"], check=True)
    author = ("-c", "user.name=n", "-c", "user.email=e")
    subprocess.run(["git", *author, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    clean = tracking.git_tags()
    assert clean["git.dirty"] == "false"
    (root / ".git" / "index").write_text("damaged")
    assert tracking.git_tags() == {**clean, "git.dirty": "unknown"}
    said = capfd.readouterr().err
    assert said.startswith("whether anything differs from the commit is not known: ")
    assert "index" in said

    run = subprocess.run

    def take_too_long(command, **how):
        if "status" in command:
            raise subprocess.TimeoutExpired(command, how["timeout"])
        return run(command, **how)

    monkeypatch.setattr(subprocess, "run", take_too_long)
    assert tracking.git_tags() == {**clean, "git.dirty": "unknown"}
    assert "timed out after 60 seconds" in capfd.readouterr().err


def test_why_git_says_nothing_is_said(root, monkeypatch, capfd):
    git = root / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\necho 'fatal: detected dubious ownership in repository' >&2\nexit 128\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent), prepend=os.pathsep)
    assert tracking.git_tags() == {}
    assert capfd.readouterr().err == "the commit is not noted: fatal: detected dubious ownership in repository\n"


def test_a_run_that_cannot_be_described_has_failed(monkeypatch):
    from mlflow.exceptions import MlflowException

    def refuse(*_):
        raise MlflowException("the server is away")

    monkeypatch.setattr(tracking, "_describe", refuse)
    with pytest.raises(ValueError, match="the server is away"), tracking.run("teacher", {}, {}):
        pass
    client = mlflow_store.connect()
    (found,) = client.search_runs([mlflow_store.experiment(client)])
    assert found.info.status == "FAILED"


def test_a_resumed_training_goes_on_in_the_same_run(root, monkeypatch):
    resume = root / "scratch" / "mlflow-run"
    monkeypatch.setenv(tracking.FLOW_RUN, "brave-otter")
    with contextlib.suppress(KeyboardInterrupt), tracking.run("distill", {"workers": 0}, {}, resume) as killed:
        killed.log(1, {"loss": 3.0})
        killed.log(2, {"loss": 2.0})
        raise KeyboardInterrupt
    assert look(killed).info.status == "KILLED"

    monkeypatch.setenv(tracking.FLOW_RUN, "calm-heron")
    with tracking.run("distill", {"workers": 2}, {}, resume) as resumed:
        assert look(resumed).info.status == "RUNNING"
        resumed.log(2, {"loss": 2.0})  # the checkpoint was older than the last metric
        resumed.log(3, {"loss": 1.0})
    assert resumed.id == killed.id
    assert history(resumed, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    found = look(resumed)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"workers": "0"}
    assert found.data.tags["resumed.workers"] == "2"
    assert found.data.tags["flow_run"] == "calm-heron"  # whose results these are


@pytest.mark.parametrize("kept", ["", "{}", json.dumps({"uri": "sqlite:////elsewhere.db", "run_id": "1"})])
def test_a_run_that_the_store_does_not_know_is_begun_anew(root, kept):
    resume = root / "mlflow-run"
    resume.write_text(kept)
    with tracking.run("distill", {}, {}, resume) as run:
        run.log(1, {"loss": 1.0})
    assert history(run, "loss") == [(1, 1.0)]
    assert json.loads(resume.read_text())["run_id"] == run.id
    resume.write_text(json.dumps({"uri": mlflow_store.default_uri(root), "run_id": "0" * 32}))
    with tracking.run("distill", {}, {}, resume) as another:
        assert another.id != run.id


def test_a_training_that_has_ended_and_is_done_again_is_another_run(cached_project):
    for _ in range(2):
        go(teacher)  # which is over before a checkpoint is due
    client = mlflow_store.connect()
    runs = client.search_runs([mlflow_store.experiment(client)])
    assert [run.info.run_name for run in runs] == ["teacher", "teacher"]
    assert all("val_top1" in run.data.metrics for run in runs)


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_the_status_says_how_the_stage_ended(error, status):
    with pytest.raises(type(error)), tracking.run("teacher", {}, {}) as run:
        raise error
    assert look(run).info.status == status


def test_a_stopped_process_leaves_a_killed_run(root):
    code = (
        "import pathlib, signal, sys, time\n"
        "from pipeline.core.results import tracking\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "with tracking.run('teacher', {}, {}, pathlib.Path('mlflow-run')) as run:\n"
        "    print('running', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout.readline() == b"running\n"  # and nothing of MLflow's own before it
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    run_id = json.loads((root / "mlflow-run").read_text())["run_id"]
    assert mlflow_store.connect().get_run(run_id).info.status == "KILLED"


def test_what_the_store_did_not_take_is_sent_with_the_next_step_or_at_the_end(capfd, monkeypatch):
    from mlflow.exceptions import MlflowException

    def refuse(*_, **__):
        raise MlflowException("the server is away")

    def log_in_vain(step, loss):
        with monkeypatch.context() as patch:
            patch.setattr(run.client, "log_batch", refuse)
            run.log(step, {"loss": loss})

    with tracking.run("teacher", {}, {}) as run:
        log_in_vain(1, 2.0)
        log_in_vain(2, math.nan)
        run.log(3, {"loss": 1.0})
        log_in_vain(4, 1.0)
    assert [step for step, _ in history(run, "loss")] == [1, 2, 3, 4]
    assert "the server is away" in capfd.readouterr().err
