"""The processes of a run: their output, their exit codes, and that nothing of them is left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from commands import listen

from pipeline.core import signals
from pipeline.core.running import commands, mlflow_pages, torchrun
from pipeline.core.running.programs import Programs

ROOT = Path(__file__).resolve().parent.parent
# A program with a child that SIGTERM does not end, in a session of its own, and that keeps the program's output open.
DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = (
    f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DEAF!r}], start_new_session={{}}); {{}}"
)


@pytest.fixture
def programs(tmp_path):
    with Programs(tmp_path, os.environ, grace=0.5) as programs:
        yield programs


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_output_comes_line_by_line_and_both_streams(programs):
    times = []
    code = "import sys, time; print('a', flush=True); time.sleep(2); sys.stderr.write('b'); sys.exit(7)"
    assert programs.run(python(code), lambda line: times.append((line, time.monotonic()))) == 7
    assert [line for line, _ in times] == ["a", "b"]
    assert times[1][1] - times[0][1] > 1


def test_a_child_that_a_program_leaves_behind_is_ended_and_not_waited_for(programs):
    lines = []
    begin = time.monotonic()
    assert programs.run(python(PARENT.format(False, "time.sleep(1)")), lines.append) == 0
    assert time.monotonic() - begin < 10
    assert gone(int(lines[0]))


def test_stop_ends_a_program_and_what_is_below_it(programs):
    lines, codes = [], []
    runner = threading.Thread(
        target=lambda: codes.append(programs.run(python(PARENT.format(True, "time.sleep(60)")), lines.append))
    )
    runner.start()
    while not lines:
        time.sleep(0.05)
    programs.stop()
    runner.join(timeout=30)
    assert codes == [-15]
    assert gone(int(lines[0]))


def test_nothing_starts_after_stop(programs):
    programs.stop()
    with pytest.raises(InterruptedError):
        programs.run(python("print('started')"), pytest.fail)


def plan_with_torch(folder, torch, *options, first=listen):
    """Run `python -m pipeline.plan digits`; importing torch does what is given, the process something first."""
    (folder / "torch.py").write_text(torch)
    command = [sys.executable, *options, "-m", "pipeline.plan", "digits"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=first)


PRESSED = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:  # as libraries do
    pass
"""


def test_a_program_stopped_while_it_imports_says_so_in_a_line(tmp_path):
    ended = plan_with_torch(tmp_path, PRESSED)
    assert (ended.returncode, ended.stderr) == (130, "plan: stopped\n")


def press_early():
    """Press Ctrl-C before Python has started, in a process of a torchrun's."""
    listen()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("rank", "said"), [("0", "plan: stopped\n"), ("1", "")])
def test_a_process_of_torchruns_hears_what_came_before_it_could_and_one_says_so(tmp_path, monkeypatch, rank, said):
    monkeypatch.setenv("LOCAL_RANK", rank)
    ended = plan_with_torch(tmp_path, "", first=press_early)
    assert (ended.returncode, ended.stderr) == (130, said)


def test_torchruns_processes_start_deaf_to_ctrl_c():
    blocked = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

    def start():
        torchrun._let_ctrl_c_wait_in_processes()
        return subprocess.run([sys.executable, "-S", "-c", blocked], capture_output=True, text=True).stdout

    with ThreadPoolExecutor(1) as another:  # what a thread blocks ends with it
        assert another.submit(start).result() == "True\n"


def test_a_python_without_the_projects_packages_is_told_in_a_line():
    other = sys._base_executable  # that .venv was made of; without its packages
    command = [other, "-S", "-m", "pipeline.plan", "digits"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"plan: error: {other} does not have ")
    assert ended.stderr.endswith(
        ": activate the project's environment (`. .venv/bin/activate`), which `make install` makes\n"
    )
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("no such\nrecipe"), "recipes: error: no such recipe", ""),
        (FileNotFoundError(2, "No such file", "a.yaml"), "recipes: error: a.yaml: No such file", ""),
        (KeyboardInterrupt(), 130, "recipes: stopped; nothing was written\n"),
    ],
)
def test_a_command_ends_in_a_line(error, code, said, capsys):
    with pytest.raises(SystemExit) as ended, commands.ending("recipes", stopped="stopped; nothing was written"):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_a_stopped_command_says_so_whatever_a_library_makes_of_it(monkeypatch, capsys):
    monkeypatch.setattr(signals, "_came", [])
    with pytest.raises(SystemExit, match="130"), commands.ending("audit"):
        assert signal.getsignal(signal.SIGINT) in (signals.stop, signal.SIG_IGN)
        try:
            signals.stop(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise ValueError("interrupted") from None
    assert capsys.readouterr().err == "audit: stopped\n"


def test_an_error_of_the_code_keeps_its_traceback():
    with pytest.raises(KeyError), commands.ending("recipes"):
        raise KeyError("width")


@pytest.fixture
def taken():
    """A port on which another program listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_mlflows_pages_are_not_shown_where_another_program_listens(taken, tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    command = [sys.executable, "-m", "pipeline.core.running.mlflow_pages", "--port", str(taken)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout == ""  # no links that lead to the other program
    error = f"mlflow_pages: error: port {taken} on 127.0.0.1: Address already in use; take another with `make ui PORT="
    assert ended.stderr.startswith(error)
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ValueError, match=f"^port {port}: ports are 1 to 65535; .*make ui PORT="):
        mlflow_pages.check_free(port)


def test_a_port_whose_connections_have_just_ended_is_free():
    """As after Ctrl-C while a page is open."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as all servers do
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = server.accept()
            connection.close()  # the side that closes first is the one that waits
            assert client.recv(1) == b""
    mlflow_pages.check_free(port)


@pytest.mark.parametrize("options", [[], ["-S"]])
def test_a_module_of_the_project_that_is_missing_is_an_error_of_the_project(tmp_path, options):
    for name in ("numpy", "pydantic", "yaml", "torch"):
        (tmp_path / f"{name}.py").write_text("import pipeline.core.no_such")
    ended = plan_with_torch(tmp_path, "import pipeline.core.no_such", *options)
    assert "Traceback" in ended.stderr
    assert ended.stderr.endswith("ModuleNotFoundError: No module named 'pipeline.core.no_such'\n")
