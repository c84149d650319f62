"""The flow, with a real Prefect server and the real DVC, on a toy project of five stages.

Everything here shares one server: it takes some ten seconds to start.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import toy_project
from commands import listen, wait_until
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelling

from pipeline import flow
from pipeline.core.running import dvc, prefect_server

pytestmark = pytest.mark.slow
CANCELLED_WITHIN = 5  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a Prefect server, which this process uses, too."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PYTHONPATH", str(toy_project.ROOT))
        patch.delenv("PREFECT_API_URL", raising=False)
        with temporary_settings({PREFECT_HOME: home}):
            url = prefect_server.ready()
            with temporary_settings({PREFECT_API_URL: url}):
                yield url


@pytest.fixture(scope="module")
def client(server):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    toy = toy_project.make(tmp_path_factory.mktemp("reproduced"))
    toy_project.execute(toy, "dvc", "repro", "--quiet")
    return toy


@pytest.fixture
def run(server, client, monkeypatch):
    """Run the flow in a folder; give its final state, and the task runs as the server has them."""

    def run(folder, *args, **kwargs):
        monkeypatch.chdir(folder)
        state = flow.ssld(*args, return_state=True, **kwargs)
        return state, tasks_of(client, state.state_details.flow_run_id)

    return run


def tasks_of(client, flow_run_id):
    """The task runs of a flow run, once the server has noted the end of all."""
    for _ in range(100):
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}))
        if all(task.state.is_final() or task.state.name == "NotReady" for task in tasks):
            break
        time.sleep(0.1)
    return {task.name: task for task in tasks}


def log_of(client, flow_run_id):
    logs = client.read_logs(LogFilter(flow_run_id={"any_": [flow_run_id]}))
    return [log.message for log in sorted(logs, key=lambda log: log.timestamp)]


def test_no_proxy_is_asked_for_a_server_on_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing answers
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    assert prefect_server.ready() == server  # and no other was started
    assert os.environ["no_proxy"] == "example.org,127.0.0.1,localhost"


def test_a_server_whose_port_is_taken_starts_on_another(server, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"did not start \(.*{port}.*\); all that it said is in "):
            prefect_server._start(port, lambda: None)
        url = prefect_server._start(port, lambda: None, tries=2)
    assert str(port) not in url
    assert prefect_server.answers(url)


def test_a_run_is_dvcs_graph(run, client, tmp_path, monkeypatch):
    toy = toy_project.make(tmp_path)
    (tmp_path / "teacher").write_text("killed")  # once
    monkeypatch.setenv("TOY_BROKEN", str(tmp_path))
    state, tasks = run(toy)
    assert state.is_completed(), state.message

    names = {task.id: name for name, task in tasks.items()}
    edges = {name: {names[it.id] for it in task.task_inputs.get("wait_for", [])} for name, task in tasks.items()}
    assert edges == toy_project.EDGES == {stage: set(reads) for stage, reads in dvc.graph(toy).items()}

    teacher, baseline = tasks["teacher"], tasks["baseline"]  # side by side
    assert max(teacher.start_time, baseline.start_time) < min(teacher.end_time, baseline.end_time)
    assert teacher.run_count == 2  # tried again
    assert {task.state.name for task in tasks.values()} == {"Completed"}

    run_id = state.state_details.flow_run_id
    wait_until(lambda: any("stages are up to date" in line for line in log_of(client, run_id)), 30)  # sent in batches
    log = log_of(client, run_id)
    assert log.count("teacher begins") == 2
    for line in ("teacher ends", "evaluate ends"):
        assert log.count(line) == 1
    assert "Updating lock file 'dvc.lock'" in log
    assert not any(words in line for line in log for words in ("git add", "core.autostage", "dvc push"))  # DVC's advice

    artifacts = {artifact.key: artifact for artifact in client.read_artifacts() if artifact.flow_run_id == run_id}
    assert json.loads(artifacts["metrics"].data)[1] == {
        "network": "student", "top1": 0.75, "top5": 1.0, "nll": 2.0, "ece": 0.25
    }  # fmt: skip
    assert (toy / "data/evaluate/report.html").as_uri() in artifacts["report"].data
    assert "| student | 0.75 |" in artifacts["report"].data
    assert "up to date" in toy_project.execute(toy, "dvc", "repro")  # and the other way round


def test_after_dvc_repro_every_task_is_up_to_date(run, reproduced):
    state, tasks = run(reproduced)
    assert state.is_completed()
    assert {task.state.name for task in tasks.values()} == {"Up to date"}
    assert tasks["teacher"].state.message == "teacher: up to date"
    assert set(tasks) == set(toy_project.EDGES)


def test_the_registry_is_asked_where_its_stage_did_not_run(run, tmp_path):
    toy = toy_project.make(tmp_path)
    register = "  register:\n    cmd: python toy.py register 1 data/evaluate\n    deps: [data/evaluate]\n"
    (toy / "dvc.yaml").write_text(toy_project.DVC_YAML + register)
    state, tasks = run(toy)
    assert state.is_completed(), state.message
    assert tasks["registry"].state.name == "Up to date"
    state, tasks = run(toy)  # and as the toy's stage makes no version, asking fails
    assert tasks["register"].state.name == "Up to date"
    assert "so that nothing is known to be registered" in state.message


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["x.cpp:12:3: error: no member", "ERROR: failed to reproduce 'teacher': exited with -9"], "ERROR: failed"),
        (["teacher: error: it is broken", "ERROR: failed to reproduce 'teacher'"], "teacher: error: it is broken"),
        (["distill: cut short: a worker", "ERROR: failed to reproduce 'distill'"], "distill: cut short: a worker"),
        (["ERROR: 'data' is busy, it is being blocked by:", "  (PID 7): dvc repro"], "ERROR: 'data' is busy, it is "),
        (["step 3"], None),
    ],
)
def test_a_stages_own_error_is_the_line_that_begins_with_its_name(lines, error):
    found = flow.error_in(lines)
    assert found is error is None or found.startswith(error)
    assert not (found or "").endswith(":")
    assert bool(flow.STAGES_OWN_ERROR.match(found or "")) == (error == "teacher: error: it is broken")


def test_a_part_of_the_graph(run, reproduced):
    state, tasks = run(reproduced, stages=["distill"])
    assert state.is_completed()
    assert set(tasks) == {"prepare", "teacher", "distill"}
    state, tasks = run(reproduced, stages=["distil"])
    assert state.is_failed()
    assert state.message.startswith("distil: no such stage")
    assert not tasks


def test_a_failing_stage_stops_what_follows_and_says_why(run, tmp_path, monkeypatch):
    toy = toy_project.make(tmp_path)
    (tmp_path / "teacher").write_text("refuses")
    monkeypatch.setenv("TOY_BROKEN", str(tmp_path))
    state, tasks = run(toy)
    assert state.is_failed()
    assert state.message == "teacher: error: it is broken"
    assert tasks["teacher"].run_count == 1  # it would only refuse again
    assert {name for name, task in tasks.items() if task.state.is_completed()} == {"prepare", "baseline"}
    assert tasks["distill"].state.name == "NotReady"


def test_a_wrong_key_fails_before_anything_starts(run, reproduced):
    before = set(reproduced.rglob("*"))
    state, tasks = run(reproduced, {"distill.epoch": 2})
    assert state.is_failed()
    assert state.message == "distill.epoch: unknown key; did you mean distill.epochs?"
    assert not tasks
    assert set(reproduced.rglob("*")) == before


def test_a_wrong_key_on_the_command_line_is_one_line(reproduced):
    command = [sys.executable, "-m", "pipeline.flow", "-S", "distill.epoch=2"]
    done = subprocess.run(command, cwd=reproduced, env=toy_project.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "flow: error: distill.epoch: unknown key; did you mean distill.epochs?\n"


@pytest.fixture(scope="module")
def served(server, client, reproduced):
    """`make serve` in the toy project; gives the process. Leaving, it is stopped as Ctrl-C does."""
    log = reproduced / ".scratch/serve.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.flow", "serve"],
            cwd=reproduced,
            env={**toy_project.ENVIRONMENT, "PREFECT_API_URL": server},
            stdout=output,
            stderr=output,
        )

    def is_up():
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(ObjectNotFound):
            return client.read_deployment_by_name("ssld/local") is not None

    wait_until(is_up, 60)
    yield process
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(30)
    assert not [member for member in family if alive(member)]


def trigger(**changes):
    """Do what `prefect deployment run ssld/local --param changes=...` does."""
    return run_deployment("ssld/local", parameters={"changes": changes}, timeout=0)


def test_two_runs_at_once_do_not_disturb_each_other(served, client, reproduced):
    before = toy_project.execute(reproduced, "git", "status", "--short")
    runs = {epochs: trigger(**{"distill.epochs": epochs}) for epochs in (3, 4)}
    for epochs, run in runs.items():
        wait_until(lambda run=run: client.read_flow_run(run.id).state.is_final(), 120)
        state = client.read_flow_run(run.id).state
        assert state.is_completed(), state.message
        tasks = tasks_of(client, run.id)
        assert {name for name, task in tasks.items() if task.state.name == "Completed"} == {"distill", "evaluate"}
        kept = reproduced / ".scratch/runs" / run.name
        assert f"distill {epochs} " in (kept / "dvc.lock").read_text()
        assert f"{run.name}: distill - distill begins" in (reproduced / ".scratch/serve.log").read_text()
    assert toy_project.execute(reproduced, "git", "status", "--short") == before
    assert not [path for path in (reproduced / ".scratch/workspaces").iterdir() if path.is_dir()]


def test_a_cancelled_run_leaves_no_process(served, client, reproduced):
    others = set(psutil.Process(served.pid).children(recursive=True))
    run = trigger(**{"distill.epochs": 999})
    wait_until(lambda: "distill begins" in log_of(client, run.id), 60)
    time.sleep(0.5)  # its deaf child starts
    family = set(psutil.Process(served.pid).children(recursive=True)) - others
    assert any("toy.py" in " ".join(member.cmdline()) for member in family)
    # What the server of the deployment itself has Python start at the first run, for all runs.
    family = {member for member in family if "resource_tracker" not in " ".join(member.cmdline())}
    client.set_flow_run_state(run.id, Cancelling())
    begin = time.monotonic()
    wait_until(lambda: not any(map(alive, family)), 30)
    took = time.monotonic() - begin
    wait_until(lambda: client.read_flow_run(run.id).state.is_final(), 30)
    assert client.read_flow_run(run.id).state.is_cancelled()
    assert took < CANCELLED_WITHIN, "seconds until the last process of the run was gone"


@pytest.mark.parametrize("how", ["on Prefect's pages", "with Ctrl-C"])
def test_a_run_that_no_deployment_started_can_be_cancelled_too(server, client, reproduced, tmp_path, how):
    known = {run.id for run in client.read_flow_runs()}
    command = [sys.executable, "-m", "pipeline.flow", "-S", "distill.epochs=999"]
    variables = {**toy_project.ENVIRONMENT, "PREFECT_API_URL": server}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, cwd=reproduced, env=variables, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=listen
        )
    try:
        wait_until(lambda: {run.id for run in client.read_flow_runs()} - known, 60)
        (run,) = {run.id for run in client.read_flow_runs()} - known
        wait_until(lambda: "distill begins" in log_of(client, run), 60)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("toy.py" in " ".join(member.cmdline()) for member in family)
        if how == "with Ctrl-C":
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            said = (tmp_path / "said").read_text()
            assert said.splitlines()[-1] == "flow: stopped; the same command goes on from here"
            assert "Traceback" not in said
            assert "Crash" not in said
        else:
            client.set_flow_run_state(run, Cancelling())
            assert process.wait(30) == 1
    finally:
        process.kill()
        process.wait()
    assert not any(map(alive, family))
    assert client.read_flow_run(run).state.is_cancelled()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_relative_store_is_the_users_own_in_a_workspace_too(tmp_path, monkeypatch):
    for uri in ("", "sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert flow.environment(tmp_path)["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite+pysqlite:///mlflow.db")
    assert flow.environment(tmp_path)["MLFLOW_TRACKING_URI"] == f"sqlite+pysqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite+pysqlite:///mlflow.db")
    assert flow.environment(tmp_path)["MLFLOW_REGISTRY_URI"] == f"sqlite+pysqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert flow.environment(tmp_path)["MLFLOW_TRACKING_URI"] == "http://localhost:5000"
