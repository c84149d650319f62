"""The command `python -m pipeline.flow`, as far as it needs no Prefect server."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy_project

from pipeline import flow
from pipeline.core.running import prefect_server

pytestmark = pytest.mark.slow


def test_help_names_the_commands():
    command = [sys.executable, "-m", "pipeline.flow", "--help"]
    shown = subprocess.run(command, cwd=Path(toy_project.ROOT), env=os.environ, capture_output=True, text=True).stdout
    assert "python -m pipeline.flow serve" in shown
    assert "prefect deployment run ssld/local" in shown


def test_a_server_that_is_gone_is_one_line(monkeypatch):
    def lost(*arguments, **options):
        raise RuntimeError("All connection attempts failed")

    monkeypatch.setattr(sys, "argv", ["flow"])
    monkeypatch.setattr(prefect_server, "ready", lambda port, meanwhile: "http://127.0.0.1:9/api")
    monkeypatch.setattr(flow, "ssld", lost)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        with pytest.raises(
            SystemExit, match=r"^flow: error: no Prefect server answers at http://127\.0\.0\.1:9/api any"
        ):
            flow.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("option", [["-S", "seed=1"], ["--recipe", "cifar10"], ["--stages", "mine"]])
def test_a_deployment_takes_no_settings(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flow", "serve", *option])
    with pytest.raises(SystemExit):
        flow.main()
    assert "-S, --recipe and --stages are of a run" in capsys.readouterr().err
