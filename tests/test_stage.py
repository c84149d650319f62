"""How a stage ends: errors are told in a line, which says what to do, by one of its processes."""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from images import ROOT, tiny
from torch._inductor import config as inductor

from pipeline.core import signals, stage
from pipeline.core.data import batches


def torchs_error():
    torch.empty(1 << 60, dtype=torch.uint8)


def gpus_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def pythons_error():
    raise MemoryError


@pytest.fixture
def said(monkeypatch, capsys):
    """What stage distill says of an error: give it what raises one."""
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.setattr(stage, "load", lambda path: tiny())
    monkeypatch.setattr(stage, "_exit", sys.exit)
    monkeypatch.setattr(stage.signals, "hear_ctrl_c", lambda: None)
    monkeypatch.setattr(stage.signals, "where_not_heard", lambda *_: None)
    codes = {"SIGTERM": 15, "SIGINT": 2, "SIGALRM": 14, "SIG_IGN": 1}
    monkeypatch.setattr(stage, "signal", SimpleNamespace(**codes, signal=lambda *_: None))

    def say(work):
        with pytest.raises(SystemExit):
            stage.main(lambda params: work(), None, resumes="shared")
        return capsys.readouterr().err

    return say


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize(
    ("name", "trains"),
    [("teacher", True), ("distill", True), ("fixres", True), ("prepare", False), ("score", False), ("register", False)],
)
def test_a_profile_is_of_stages_that_train(monkeypatch, name, trains):
    monkeypatch.setattr(sys, "argv", [name, "--profile"])
    ran = []
    with contextlib.nullcontext() if trains else pytest.raises(SystemExit, match="2"):
        stage.main(ran.append, None)
    assert [params.machine.profile_steps for params in ran] == [stage.PROFILE_STEPS] * trains


def too_many_files():
    raise RuntimeError("Too many open files. Communication with the workers is no longer possible.")  # torch's words


def too_long_a_path():
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/tmp/{'x' * 120}")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (too_many_files, r"distill: error: too many files are open: raise the limit \(ulimit -n\), or set machine.*\n"),
        (too_long_a_path, r"distill: error: AF_UNIX path too long: set TMPDIR to a folder with a shorter path\n"),
    ],
)
def test_what_a_machine_lacks_is_told_with_what_to_do(said, work, words):
    assert re.fullmatch(words, said(work))


@pytest.mark.parametrize("fill", [torchs_error, gpus_error, pythons_error])
def test_out_of_memory_names_what_to_halve(fill, said):
    assert said(fill) == (
        "distill: error: out of memory: halve distill.batch_size (now 8); or, for the same batches, double "
        "distill.accumulate (now 1) or set machine.checkpoint_activations to true\n"
    )


def test_out_of_memory_names_nothing_to_halve_of_a_teacher_that_is_taken(said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["teacher"])
    taken = tiny(**{"teacher.source": "timm", "machine.device": "auto"})
    monkeypatch.setattr(stage, "load", lambda path: taken)
    assert said(gpus_error) == "teacher: error: out of memory: set machine.device to cpu\n"


def pressed():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("rank", "told", "work", "line"),
    [
        ("0", False, pythons_error, "distill: error: out of memory"),
        ("1", False, pythons_error, "distill: error: out of memory"),
        ("0", True, pythons_error, ""),
        ("0", False, pressed, "distill: stopped; the same command goes on"),
        ("1", False, pressed, ""),
        ("0", True, pressed, ""),
    ],
)
def test_of_several_processes_one_says_what_has_ended_them(said, tmp_path, monkeypatch, rank, told, work, line):
    note, killed = tmp_path / "failed", []
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / rank / "error.json"),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stage, "_die_with_parents", lambda: None)
    monkeypatch.setattr(stage.os, "kill", lambda pid, signum: killed.append((pid, signum)))
    if told:
        note.touch()
    words = said(work)
    assert words.startswith(line)
    assert bool(words) == bool(line)
    refused = work is pythons_error
    assert note.exists() == (told or refused)
    assert killed == ([(os.getppid(), 15)] if refused and not told else [])


@pytest.mark.parametrize(
    ("resumes", "variables", "words"),
    [
        ("shared", {"RANK": "0"}, "in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun"),
        ("shared", {"RANK": "0", "WORLD_SIZE": ""}, "in the environment, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("no", {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "runs in one process"),
    ],
)
def test_what_torchrun_did_not_start_or_should_not_have_is_refused(monkeypatch, resumes, variables, words):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        stage._check_launcher(resumes)


class Fatal(torch.utils.data.Dataset):
    """Does something in the worker process that is asked for a batch, which is of a megabyte."""

    def __init__(self, work):
        self.work = work

    def __getitem__(self, batch):
        self.work()
        return torch.zeros(2**20, dtype=torch.uint8)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def with_files_open():
    """Open files until no more can be, and close two: enough to make a batch, and too few to hand it over."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    with contextlib.suppress(OSError):
        while True:
            HELD.append(os.open(os.devnull, os.O_RDONLY))
    for descriptor in HELD[-2:]:
        os.close(descriptor)


HELD = []


def short_of_room():
    """Let files, as which batches are handed over, be of a kilobyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (killed, r"distill: cut short: DataLoader worker \(pid\(s\) \d+\) exited unexpectedly, for a reason above"),
        (with_files_open, r"distill: cut short: DataLoader worker \(pid\(s\) \d+\) exited unexpectedly, for a reason"),
        (short_of_room, r"distill: error: worker processes have no shared memory: .* too large .*: set machine"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="torch hands batches over in another way there")
def test_a_worker_process_that_fails_is_a_line(said, work, words):
    """But for one without shared memory it is not the stage's own error: the flow, and torchrun, start it again."""
    assert re.match(words, said(lambda: list(batches.load(Fatal(work), [0], 1, torch.device("cpu")))))


def test_what_cannot_be_computed_the_same_way_every_time_is_named(said):
    torch.use_deterministic_algorithms(True)
    try:
        line = said(lambda: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert line == (
        "distill: error: put_ does not have a deterministic implementation: set machine.deterministic to false\n"
    )


def test_a_missing_compiler_is_a_line(said, monkeypatch):
    monkeypatch.setattr(stage, "load", lambda path: tiny(**{"machine.compile": True}))
    with inductor.patch({"cpp.cxx": ("/nonexistent/g++",)}):
        line = said(lambda: torch.compile(lambda x: x.sin() + 1)(torch.ones(8)))
    assert re.fullmatch(
        r"distill: error: the network cannot be compiled \(InvalidCxxCompiler: No working C\+\+ compiler found .*"
        r"g\+\+.*\): set machine.compile to false\n",
        line,
    )


@pytest.mark.usefixtures("alone")
def test_weights_that_several_processes_cannot_learn_are_a_line(said):
    class Auxiliary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    def two_steps():
        network = torch.nn.parallel.DistributedDataParallel(Auxiliary())
        for _ in range(2):
            network(torch.ones(1, 2)).sum().backward()

    assert said(two_steps).startswith("distill: error: the network has weights that take no part in its logits: set ma")


def test_a_stop_while_an_error_is_told_is_told_as_a_stop(said, monkeypatch):
    """As by torchrun, when several processes meet the same error."""

    def wrong():
        raise ValueError("wrong")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_explained", stopped)
    assert said(wrong) == "distill: stopped; the same command goes on from what is saved so far, if anything\n"


@pytest.mark.parametrize("error", [ImportError, ValueError, OSError, RuntimeError])
def test_an_error_of_a_library_that_was_interrupted_is_told_as_a_stop(said, monkeypatch, error):
    monkeypatch.setattr(signals, "_came", [])

    def imports():
        try:
            signals.stop(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise error("cannot import name 'EvaluationDataset'") from None

    assert said(imports) == "distill: stopped; the same command goes on from what is saved so far, if anything\n"


LEAVING = """
import atexit
from pipeline.core import stage

class Last:
    def __del__(self):
        print("taken down")

last = Last()
atexit.register(print, "at exit")
stage.main(lambda params: print("done"), "")
"""


@pytest.mark.parametrize(
    ("variables", "said"), [({}, "done\nat exit\ntaken down\n"), ({"DVC_STAGE": "baseline"}, "done\nat exit\n")]
)
def test_a_stage_that_dvc_has_started_leaves_without_being_taken_down(variables, said):
    command = [sys.executable, "-c", LEAVING]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
