"""What DVC and Prefect add to a run: the stages as plain commands, one after another, through DVC, and as a flow.

Each way begins with a clean clone of this project, with the default's images and networks, but with one epoch a stage
and one view an image: what DVC and Prefect do is the same in a short run and in a long one. Then what is up to date is
run again. Prints a Markdown table. Run: python benchmarks/overhead.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine

from pipeline.core import dvc, workspace

ROOT = Path(__file__).resolve().parent.parent
SHORT = {f"{stage}.epochs": 1 for stage in ("teacher", "baseline", "distill", "finetune", "fixres")}
SHORT |= {"cache.replicas": 1, "baseline.warmup_epochs": 0, "teacher.warmup_epochs": 0, "distill.warmup_epochs": 0}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    plain = [[sys.executable, "-m", f"pipeline.{stage}"] for stage in dvc.graph(ROOT)]
    ways = {
        "its stages as plain commands": plain,
        "dvc repro": [[sys.executable, "-m", "dvc", "repro"]],
        "Prefect's flow": [[sys.executable, "-m", "pipeline.flow"]],
    }
    print(f"one epoch a stage, one view an image; {machine()}\n")
    print("| run | s | more than the stages alone, s | again, all up to date, s |\n|---|---|---|---|")
    alone = None
    for name, commands in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            clone(Path(folder))
            took = timed(commands, folder)
            alone = alone or took
            more, again = ("", "") if commands is plain else (f"{took - alone:.1f}", f"{timed(commands, folder):.1f}")
        print(f"| {name} | {took:.1f} | {more} | {again} |", flush=True)


def clone(folder: Path) -> None:
    """Clone the project as it was committed, with short settings, and nothing made yet."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    workspace.write_params(ROOT, folder, SHORT)


def timed(commands: list[list[str]], folder: str) -> float:
    """Run commands one after another; give the seconds they took together."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    began = time.perf_counter()
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"overhead: {' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
