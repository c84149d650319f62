"""Processes that are killed under torchrun: the run goes down, or goes on from its checkpoint, to the same bytes."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from commands import ENVIRONMENT, launch, listen, wait_until
from images import ROOT, prepared, small_settings

from pipeline.core import params

SETTINGS = {
    **small_settings(),
    "machine.processes": 2,
    "machine.checkpoint_seconds": 0,
    "student.model": "test_resnet",
    "baseline.epochs": 10,  # 20 steps, a checkpoint after each
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with prepared images, to train a student in with two processes."""
    prepared(tmp_path, monkeypatch)
    return tmp_path


# As docs/running.md says, on each of two machines.
MEET = """
-m pipeline.core.running.torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:PORT
--rdzv-id baseline --local-addr 127.0.0.1 --max-restarts 3 -m pipeline.baseline
"""


def meet() -> list[str]:
    """The arguments of Python's to start one of two machines, which meet at a port that is free."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return MEET.replace("PORT", str(free.getsockname()[1])).split()


# As DVC starts a stage, and waits for it.
DVC = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'pipeline.baseline'])"


def write_settings(folder: Path, changes: dict[str, object]) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(params.with_changes(settings, SETTINGS | changes)))


def start(folder: Path, restarts: int, *command: str) -> subprocess.Popen:
    """Start stage baseline."""
    write_settings(folder, {"machine.restarts": restarts})
    variables = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *(command or ("-c", launch("baseline")))],
        cwd=folder,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=listen,
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for the stage; give what it said."""
    return process.communicate(timeout=300)[0]


def ranks(process: subprocess.Popen) -> dict[str, psutil.Process]:
    """The processes of a torchrun's, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # it is gone
            found[child.environ().get("RANK")] = child
    return found


def kill(process: subprocess.Popen, rank: int | None, folder: Path) -> None:
    """Kill one of a torchrun's processes (None: its only one), or itself (-1), at the stage's third checkpoint."""
    last = lambda: max((int(file.name[:9]) for file in folder.glob(".scratch/baseline/*/*.pt")), default=0)  # noqa: E731
    before = last()
    wait_until(lambda: process.poll() is not None or last() >= before + 3, seconds=120, every=0.02)
    assert process.poll() is None, finish(process)
    torchrun = psutil.Process(process.pid)
    found = ranks(process) | {"-1": torchrun}
    (found[str(rank)] if rank is not None else torchrun.children()[0]).send_signal(signal.SIGKILL)


def left(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue  # it is gone, or a zombie
    return found


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "data/baseline/weights.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_with_killed_processes_ends_in_the_same_bytes(folder):
    """Torchrun itself is killed; then the run goes on, as on two machines, of which one's process is killed."""
    assert "going on" not in finish(start(folder, restarts=0))
    expected = weights(folder)
    (folder / "data/baseline/weights.safetensors").unlink()
    shutil.rmtree(folder / ".scratch/baseline")

    killed = start(folder, restarts=3)
    kill(killed, -1, folder)
    said = finish(killed)
    assert killed.returncode != 0, said
    psutil.wait_procs(left(folder), timeout=20)
    assert left(folder) == []
    assert not (folder / "data/baseline/weights.safetensors").exists()

    command = meet()
    machines = [start(folder, 3, *command) for _ in range(2)]
    kill(machines[0], None, folder)
    said = [finish(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "".join(said).count("baseline: going on from step") == 2
    assert weights(folder) == expected


def test_machines_with_different_settings_train_nothing_together(folder):
    command = meet()
    first = start(folder, 3, *command)
    settings = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "others.yaml").write_text(yaml.safe_dump(params.with_changes(settings, {"baseline.lr": 0.1})))
    machines = [first, start(folder, 3, *command, "--params", "others.yaml")]
    said = [finish(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1], said
    assert (
        "".join(said).count("baseline: error: the processes have not the same recipe: start them in one folder") == 2
    ), said
    assert "waiting for the processes of the other machines" in "".join(said)
    assert "Traceback" not in "".join(said)
    assert not (folder / "data/baseline").exists()


def test_a_dvc_that_is_killed_takes_torchrun_and_its_processes_down(folder):
    """Torchrun would take those that it sees end for lost, and start them again."""
    write_settings(folder, {"machine.restarts": 3, "baseline.epochs": 1000})
    dvc = subprocess.Popen(
        [sys.executable, "-c", DVC],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DVC_STAGE": "baseline"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: [*folder.glob(".scratch/baseline/*/*.pt")] or dvc.poll() is not None, seconds=120)
    dvc.kill()
    said = finish(dvc)  # once none of them can write any more
    assert said.count("baseline: stopped") == 1, said
    assert "going on from step" not in said
    assert left(folder) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_while_torchruns_processes_start_stops_them_in_a_line(folder, rank):
    """As soon as there is one: those that torchrun was about to note see that it has ended; others hear it from it."""
    process = start(folder, 3)
    wait_until(lambda: rank in ranks(process), seconds=120, every=0.002)
    process.send_signal(signal.SIGINT)
    said = finish(process)
    assert process.returncode == 130, said
    assert said.startswith("baseline: stopped"), said
    assert said.count("\n") == 1, said
    psutil.wait_procs(left(folder), timeout=20)
    assert left(folder) == []
    assert [*(folder / "tmp").glob("*torchelastic*"), *(folder / "tmp").glob("ssld*")] == []


def test_an_error_that_would_come_again_restarts_nothing(folder):
    (folder / "data/prepare/images/known/classes.json").unlink()
    process = start(folder, 3, "-m", "pipeline.baseline")
    said = finish(process)
    assert process.returncode != 0
    assert said.startswith("baseline: error: "), said
    assert "classes.json: missing; make it again with" in said
    assert said.count("\n") == 1, said  # one of the two processes says it, and nothing comes from torchrun
