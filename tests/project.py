"""A project of its own for a test: the code as it stands here, small settings, real Git and real DVC."""

import shutil
import subprocess
from pathlib import Path

import commands
import yaml
from images import ROOT, small_settings

from pipeline.core import params

CODE = ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore", "pipeline", "models", "data/.gitignore", "data/weights")
ENVIRONMENT = {**commands.ENVIRONMENT, "OMP_NUM_THREADS": "1"}


def execute(folder: Path, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project; what it printed, both streams together, is in `stdout`."""
    done = commands.run(folder, command, {**ENVIRONMENT, **environment})
    assert done.returncode == 0 or not check, done.stdout
    return done


def change(folder: Path, **changes: object) -> None:
    """Change keys of the project's params.yaml, dotted ones in a dict: change(folder, **{"distill.epochs": 2})."""
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(params.with_changes(yaml.safe_load(file.read_text()), changes), sort_keys=False))


def make(folder: Path, **changes: object) -> Path:
    """Copy the code to a new folder, commit it, and set it to a tiny run on the shapes in its folder `photos`."""
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    change(folder, **{**small_settings(), **changes})
    execute(folder, "git", "init", "--quiet")
    execute(folder, "dvc", "init", "--quiet")
    execute(folder, "git", "add", "--all")
    execute(folder, "git", "commit", "--quiet", "--message", "start")
    return folder
