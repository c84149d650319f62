"""A stage that is stopped in its first seconds: while it imports, becomes torchrun, or waits for other processes."""

import os
import signal
import subprocess
import sys

from commands import ENVIRONMENT, listen
from images import ROOT, tiny

from pipeline.core import stage

# MLflow, in whose import Ctrl-C is pressed.
PRESSED = """
import signal
signal.raise_signal(signal.SIGINT)
print("imported")
class MlflowClient:
    pass
"""


def test_ctrl_c_while_mlflow_is_imported_is_heard_after_that(tmp_path):
    for name, content in {
        "lib/mlflow/__init__.py": PRESSED,
        "data/register/version.json": "{}",
        "params.yaml": (ROOT / "params.yaml").read_text(),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.register", "--if-missing"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}/lib{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        preexec_fn=listen,
    )
    assert (done.returncode, done.stdout) == (130, "imported\n")
    assert done.stderr == "register: stopped; the same command starts it anew\n"


# As torch waits for processes that do not come: with a lock that is held, and that no signal interrupts.
WAITS = """
import ctypes, os, signal, threading
from pipeline.core import stage

def wait(params):
    lock = ctypes.create_string_buffer(64)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)

stage.PATIENCE = 0.2
stage.main(wait, "", resumes="shared")
"""


def test_one_process_of_several_stops_though_python_does_not_hear_the_signal():
    done = subprocess.run(
        [sys.executable, "-c", WAITS],
        cwd=ROOT,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=listen,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "-c: stopped; the same command goes on from what is saved so far, if anything\n"


def test_ctrl_c_waits_while_a_stage_becomes_torchrun(monkeypatch):
    """Until the new program of this process hears it."""
    blocked = []
    monkeypatch.setattr(stage.os, "execv", lambda *_: blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    monkeypatch.delenv("RANK", raising=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        stage._relaunch_with_torchrun(tiny(**{"machine.processes": 2}), "baseline")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert blocked == [before | {signal.SIGINT}]
