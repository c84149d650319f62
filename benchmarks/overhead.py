"""What DVC and Prefect add to a run: the seconds of `dvc repro`, and of the flow, in which no stage is at work.

In a clean clone of this project, with the default's images and networks, but with one epoch a stage and one view an
image: what DVC and Prefect do is the same in a short run and in a long one. Then what is up to date is run again. A
project's first flow makes Prefect's database. Prints a Markdown table. Run: python benchmarks/overhead.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machine import machine

from pipeline.core.running import dvc, params_file

ROOT = Path(__file__).resolve().parent.parent
LOOK_EVERY = 0.05  # seconds
SHORT = {f"{stage}.epochs": 1 for stage in ("teacher", "baseline", "distill", "finetune", "fixres")}
SHORT |= {"cache.replicas": 1, "baseline.warmup_epochs": 0, "teacher.warmup_epochs": 0, "distill.warmup_epochs": 0}
FLOW = [sys.executable, "-m", "pipeline.flow"]
RUNS = {
    "dvc repro": [sys.executable, "-m", "dvc", "repro"],
    "Prefect's flow, DVC included: the first": FLOW,
    "a later one": FLOW,
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    stages = {f"pipeline.{stage}" for stage in dvc.graph(ROOT)}
    print(f"one epoch a stage, one view an image; {machine()}\n")
    print("| run | s | of them without a stage at work | again, all up to date, s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        params_file.write(ROOT, Path(folder), SHORT)
        for name, command in RUNS.items():
            forget(Path(folder))
            took, idle = timed(command, folder, stages)
            again, _ = timed(command, folder, stages)
            print(f"| {name} | {took:.1f} | {idle:.1f} | {again:.1f} |", flush=True)


def forget(folder: Path) -> None:
    """Remove what runs have made in a clone of the project, but for Prefect's database and the flow's notes."""
    subprocess.run(
        ["git", "clean", "-ffdxq", "-e", "/.scratch/prefect", "-e", "/.scratch/*.json"], cwd=folder, check=True
    )
    (folder / "dvc.lock").unlink(missing_ok=True)


def timed(command: list[str], folder: str, stages: set[str]) -> tuple[float, float]:
    """Run a command; give the seconds that it took, and those in which none of the stages ran.

    Args:
        command: what to run.
        folder: where.
        stages: the modules that `python -m` runs as stages.
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    began = last = time.perf_counter()
    idle = 0.0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        program = psutil.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while program.poll() is None:
            time.sleep(LOOK_EVERY)
            at_work = any(is_one_of(process, stages) for process in program.children(recursive=True))
            now = time.perf_counter()
            idle, last = idle + (0 if at_work else now - last), now
        if program.returncode:
            said.seek(0)
            sys.exit(f"overhead: {' '.join(command)}: {said.read()[-2000:]}")
    return last - began, idle


def is_one_of(process: psutil.Process, stages: set[str]) -> bool:
    try:
        return not stages.isdisjoint(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


if __name__ == "__main__":
    main()
