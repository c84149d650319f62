"""The whole pipeline on a few shapes, through DVC: what reruns, what a kill leaves, what a clone gets."""

import csv
import hashlib
import json
import subprocess
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import psutil
import pytest
from commands import wait_until
from images import CLASSES, write_folder
from made_images import png
from prepare_kit import files_of, write
from project import ENVIRONMENT, change, execute, make

STUDENTS = ("distill", "finetune", "fixres")
STAGES = ("prepare", "teacher", "score", "mine", "cache", "baseline", *STUDENTS, "evaluate")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which everything has run once."""
    folder = make(tmp_path_factory.mktemp("pipeline") / "project")
    write_folder(folder / "photos", train=10, val=4, test=5, unlabelled=3)
    execute(folder, "dvc", "add", "--quiet", "photos")
    done = execute(folder, "dvc", "repro")
    folder.joinpath("first.log").write_text(done.stdout)
    return folder


def out_of_date(project):
    """The stages of which DVC says that something that they read has changed; stages after those are not looked at."""
    return json.loads(execute(project, "dvc", "status", "--json").stdout).keys() - {"photos.dvc"}


def restore(project):
    """Bring back everything that git and DVC keep."""
    execute(project, "git", "checkout", "--quiet", "--force", "HEAD")
    execute(project, "dvc", "checkout", "--quiet", "--force")


def ran(output):
    """The stages that a `dvc repro` ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def test_every_network_is_scored(project):
    metrics = json.loads((project / "data/evaluate/metrics.json").read_text())
    for name in ("teacher", "baseline", "distill", "finetune", "fixres", "student"):
        assert {"top1", "top5", "nll", "ece"} <= metrics[name].keys()
        assert 0 <= metrics[name]["top1"] <= metrics[name]["top5"] <= 1
    assert metrics["student"] == metrics["fixres"]


def test_each_network_names_the_one_that_it_started_from(project):
    cards = {name: json.loads((project / f"data/{name}/network.json").read_text()) for name in STUDENTS}
    for before, name in pairwise(STUDENTS):
        if cards[name]["kept"]:
            assert cards[name] | {"kept": None} == cards[before] | {"kept": None}
        else:
            assert cards[name]["identities"]["start"] == cards[before]["digest"]


def test_the_report_needs_nothing_else(project):
    page = (project / "data/evaluate/report.html").read_text()
    assert all(name in page for name in CLASSES)
    assert 'src="http' not in page
    assert "<script src" not in page
    assert "<link" not in page


def test_again_nothing_runs(project):
    assert ran(execute(project, "dvc", "repro").stdout) == []


@contextmanager
def kept(file):
    """Put a file back as it was, whatever happens."""
    content = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("key", "value", "reads_it"),
    [
        ("fixres.lr", 0.002, {"fixres", "evaluate"}),
        ("prepare.val_share", 0.2, {"prepare", "evaluate"}),  # whose report has all settings
        ("register.margin", 0.5, {"register"}),
    ],
)
def test_a_parameter_makes_those_stages_out_of_date_that_read_it(project, key, value, reads_it):
    with kept(project / "params.yaml"):
        change(project, **{key: value})
        assert out_of_date(project) == reads_it
    assert out_of_date(project) == set()


def test_what_has_run_before_comes_out_of_dvcs_cache(project):
    with kept(project / "params.yaml"):
        change(project, **{"mine.per_class": 1})
        assert ran(execute(project, "dvc", "repro", "mine").stdout) == ["mine"]
    assert ran(execute(project, "dvc", "repro", "mine").stdout) == []
    assert out_of_date(project) == set()


def test_a_comment_in_the_flow_reruns_nothing(project):
    flow = project / "pipeline/flow.py"
    with kept(flow):
        flow.write_text(flow.read_text() + "# a thought\n")
        assert execute(project, "dvc", "status", "--json").stdout.strip() == "{}"


def test_machine_settings_rerun_nothing(project):
    with kept(project / "params.yaml"):
        change(project, **{"machine.workers": 3})
        assert execute(project, "dvc", "status", "--json").stdout.strip() == "{}"


def test_a_typo_is_one_line_that_names_the_key(project):
    settings = project / "params.yaml"
    with kept(settings):
        settings.write_text(settings.read_text().replace("  min_score:", "  min_scores:"))
        done = execute(project, "python", "-m", "pipeline.mine", check=False)
    assert done.returncode == 1
    expected = "mine: error: params.yaml: mine.min_scores: unknown key; did you mean mine.min_score?"
    assert done.stdout.strip() == expected


def test_soft_labels_that_are_killed_go_on_and_end_in_the_same_bytes(project, tmp_path):
    """As do trainings (test_restarts.py); benchmarks/kill.py kills every stage."""
    clone = tmp_path / "killed"
    execute(project, "cp", "-r", str(project), str(clone))
    expected = files_of(clone / "data/cache")
    execute(clone, "rm", "-rf", "data/cache", ".scratch/cache")
    killed = subprocess.Popen(["python", "-m", "pipeline.cache"], cwd=clone, env=ENVIRONMENT)
    wait_until(lambda: any(clone.glob("data/cache/labels-*.sl")), 120, every=0.02)
    assert killed.poll() is None, "it ended before it could be killed"
    killed.kill()
    killed.wait()
    execute(clone, "python", "-m", "pipeline.cache")
    assert files_of(clone / "data/cache") == expected


# Three stages in the same processes: starting these takes longer than their work.
IN_TWO_PROCESSES = """
import importlib
from pipeline.core import devices, params

# Imported in turn: where other files of the project are loaded, too, `score` asks about all images again.
for stage in ("score", "cache", "distill"):
    importlib.import_module(f"pipeline.{stage}").run(params.load())
devices.leave()
"""


def test_two_processes_leave_the_same_soft_labels_and_learn_from_them_alike(project, tmp_path):
    clone = tmp_path / "two"
    execute(project, "cp", "-r", str(project), str(clone))
    alone, losses, scores = files_of(clone / "data/cache"), training_losses(clone), read_scores(clone)
    execute(clone, "rm", "-rf", "data/cache", "data/score", "data/distill", ".scratch/distill", "mlflow.db")
    forget_a_score(clone / ".scratch/scored")
    (clone / "two.py").write_text(IN_TWO_PROCESSES)
    done = execute(clone, "torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "two.py")
    assert " 1 images to ask the teacher about" in done.stdout
    for before, now in zip(scores, read_scores(clone), strict=True):
        assert np.array_equal(now[1:], before[1:])
        assert now[:1] == pytest.approx(before[:1], abs=1e-3)  # asked alone, it is rounded otherwise
    assert files_of(clone / "data/cache") == alone
    assert training_losses(clone) == pytest.approx(losses, abs=1e-5)  # 5e-7 was seen; test_restarts.py kills them


def read_scores(folder):
    """The columns that `score` wrote."""
    return [np.load(file) for file in sorted((folder / "data/score").glob("*.npy"))]


def forget_a_score(scored):
    """Leave out the first image of what the last run of `score` has kept."""
    note = json.loads((scored / "answers.json").read_text())
    for column in note["digests"]:
        file = scored / f"{column}.npy"
        np.save(file, np.load(file)[1:])
        note["digests"][column] = hashlib.sha256(file.read_bytes()).hexdigest()
    (scored / "answers.json").write_text(json.dumps(note))


def training_losses(folder):
    """The mean loss of each epoch of distillation."""
    with (folder / "data/distill/history.csv").open() as rows:
        return [float(row["train_loss"]) for row in csv.DictReader(rows)]


def test_a_second_writer_is_told_so(project, tmp_path):
    program = (
        "import time; from pipeline.core import resume\n"
        "with resume.only_writer('distill'): print('in', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(["python", "-c", program], cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    second = execute(project, "python", "-c", program, check=False)
    first.kill()
    first.wait()
    assert f"process {first.pid} is already at work on distill here" in second.stdout


CHILD = """
import os, time
from pipeline.core import stage
stage._die_with_parents()
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


def test_a_stage_ends_with_the_dvc_that_started_it(project):
    variables = {**ENVIRONMENT, "DVC_STAGE": "distill"}  # as DVC sets it
    parent = subprocess.Popen(["python", "-c", PARENT], cwd=project, env=variables, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=8, every=0.02)


def test_push_clone_pull_leaves_nothing_to_do(project, tmp_path):
    execute(project, "dvc", "remote", "add", "--default", "--force", "there", str(tmp_path / "remote"))
    execute(project, "git", "add", "--all")
    execute(project, "git", "commit", "--quiet", "--message", "ran")
    execute(project, "dvc", "push", "--quiet")
    execute(tmp_path, "git", "clone", "--quiet", str(project), "clone")
    execute(tmp_path / "clone", "dvc", "pull", "--quiet")
    assert ran(execute(tmp_path / "clone", "dvc", "repro").stdout) == []


def test_more_labels_and_back(project):
    """A changed data set, its metrics beside those before, and the images before brought back."""
    execute(project, "git", "add", "--all")
    execute(project, "git", "commit", "--quiet", "--allow-empty", "--message", "before")
    before = files_of(project / "photos"), files_of(project / "data/prepare")
    summary = json.loads((project / "data/prepare/summary.json").read_text())
    write_folder(project / "photos", train=12, val=0, test=0, unlabelled=0)
    change(project, **{"prepare.labels_per_class": 6})
    execute(project, "dvc", "add", "--quiet", "photos")
    execute(project, "dvc", "repro", "prepare")
    assert (files_of(project / "photos"), files_of(project / "data/prepare")) != before
    more = json.loads((project / "data/prepare/summary.json").read_text())
    assert more["splits"]["labelled"]["images"] == summary["splits"]["labelled"]["images"] * 6 // 4
    restore(project)
    assert (files_of(project / "photos"), files_of(project / "data/prepare")) == before
    assert np.isfinite(json.loads((project / "data/evaluate/metrics.json").read_text())["student"]["nll"])


def test_a_larger_pool_leaves_teacher_and_baseline_as_they_are(project):
    execute(project, "git", "add", "--all")
    execute(project, "git", "commit", "--quiet", "--allow-empty", "--message", "before")
    assert out_of_date(project) == set()
    for name, content, reads_it in (
        ("notes.txt", b"no image", {"evaluate", "register"}),  # which tell of what was refused
        ("new.png", png(7), {"score", "mine", "cache", "distill", "evaluate", "register"}),
    ):
        write(project / "photos/unlabelled", {name: content})
        execute(project, "dvc", "add", "--quiet", "photos")
        execute(project, "dvc", "repro", "prepare")
        found = out_of_date(project)
        refused = (project / "data/prepare/refused.csv").read_text()
        restore(project)
        assert found == reads_it
        assert ("notes.txt" in refused) == (name == "notes.txt")
