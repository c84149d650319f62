"""Commands that tests run in a project of their own."""

import subprocess
from pathlib import Path


def run(folder: Path, command: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a command in a folder; what it printed, both streams together, is in `stdout`."""
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
