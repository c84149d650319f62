"""A toy project with the shape of the real one: five stages with a diamond, under git and DVC, photos beside it.

    prepare -> teacher -> distill -> evaluate
            -> baseline ----------->

It has the real params.yaml, so that changes are checked as they are for the real stages. A stage with more than 300
epochs lasts, so that a test can stop it.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import commands

ROOT = Path(__file__).parent.parent

EDGES = {
    "prepare": set(),
    "teacher": {"prepare"},
    "baseline": {"prepare"},
    "distill": {"teacher"},
    "evaluate": {"baseline", "distill"},
}

ENVIRONMENT = {**commands.ENVIRONMENT, "PYTHONPATH": str(ROOT)}

DVC_YAML = """
stages:
  prepare:
    cmd: python toy.py prepare 1 ${prepare.labelled_root}
    deps: [toy.py, "${prepare.labelled_root}"]
    outs: [data/prepare]
  teacher:
    cmd: python toy.py teacher ${teacher.epochs} data/prepare
    deps: [toy.py, data/prepare]
    params: [seed, teacher, views]
    outs: [data/teacher]
  baseline:
    cmd: python toy.py baseline ${baseline.epochs} data/prepare
    deps: [toy.py, data/prepare]
    outs: [data/baseline]
  distill:
    cmd: python toy.py distill ${distill.epochs} data/teacher
    deps: [toy.py, data/teacher]
    outs: [data/distill]
  evaluate:
    cmd: python toy.py evaluate 1 data/distill data/baseline
    deps: [toy.py, data/distill, data/baseline]
    outs: [data/evaluate]
"""

# A stage that is to last has a child which SIGTERM does not end, in a session of its own: as torchrun's workers are.
# A file of the stage's name in $TOY_BROKEN makes it fail once: by its own error (`refuses`), or by SIGKILL (`killed`).
TOY = """
import json, os, pathlib, signal, subprocess, sys, time
name, epochs, *inputs = sys.argv[1:]
print(f"{name} begins", flush=True)
broken = pathlib.Path(os.environ.get("TOY_BROKEN", "none"), name)
if broken.exists():
    how = broken.read_text()
    broken.unlink()
    sys.exit(f"{name}: error: it is broken") if how == "refuses" else os.kill(os.getpid(), signal.SIGKILL)
if int(epochs) > 300:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    time.sleep(99)
files = [file for folder in inputs for file in sorted(pathlib.Path(folder).rglob("*.txt"))]
read = "".join(file.read_text() for file in files)
out = pathlib.Path("data", name)
out.mkdir(parents=True, exist_ok=True)
(out / "said.txt").write_text(f"{name} {epochs}; {read}")
if name == "evaluate":
    scores = {"top1": 0.5, "top5": 1.0, "nll": 2.0, "ece": 0.25}
    (out / "metrics.json").write_text(json.dumps({"teacher": scores, "student": {**scores, "top1": 0.75}, "images": 3}))
    (out / "report.html").write_text("<h1>Report</h1>")
print(f"{name} ends", flush=True)
"""


def execute(folder: Path, *command: str, **environment: str) -> str:
    """Run a command in the project; give what it printed, both streams together."""
    done = commands.run(folder, command, {**ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stdout
    return done.stdout


def make(folder: Path) -> Path:
    """Write the toy project to folder/toy, and photos to folder/photos; give the project's folder."""
    shutil.copytree(_made(), folder, dirs_exist_ok=True)
    return folder / "toy"


@cache
def _made() -> Path:
    """A folder with both, to copy, as DVC and Git take a second to begin; it is gone when the tests end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    photos, toy = folder / "photos", folder / "toy"
    for new in (photos, toy):
        new.mkdir(parents=True)
    (photos / "one.txt").write_text("one\n")
    for split in ("train", "val", "test", "unlabelled"):  # which a flow looks for before it starts
        (photos / split).mkdir()
    (toy / "toy.py").write_text(TOY)
    (toy / "dvc.yaml").write_text(DVC_YAML)
    (toy / ".gitignore").write_text("/.scratch/\n/mlflow.db*\n/data/ignored/\n/data/kept/weights\n")
    settings = (ROOT / "params.yaml").read_text().replace("labelled_root: data/digits ", "labelled_root: ../photos ")
    (toy / "params.yaml").write_text(settings)
    execute(toy, "git", "init", "--quiet")
    execute(toy, "dvc", "init", "--quiet")
    execute(toy, "git", "add", "--all")
    execute(toy, "git", "commit", "--quiet", "--message", "start")
    return folder
