"""What DVC records of a stage is what the stage's result is of, whatever is edited while it runs. On real DVC."""

import re
import shutil

import commands
import pytest
import yaml
from toy_project import ENVIRONMENT, ROOT

from pipeline.core import recorded

# A stage that edits, as it runs, what a file `edit` says: the file, and what to put for what.
STAGE = """
import pathlib
from pipeline.core import stage

def run(params):
    pathlib.Path("data").mkdir(exist_ok=True)
    pathlib.Path("data/distill").write_text(str(params.distill.epochs))
    edit = pathlib.Path("edit")
    if edit.exists():
        file, old, new = edit.read_text().split("|")
        text = pathlib.Path(file).read_text()
        assert old in text
        pathlib.Path(file).write_text(text.replace(old, new))

stage.main(run, None)
"""
GRAPH = """
stages:
  distill:
    cmd: python distill.py
    deps: [distill.py, models/own.py]
    params: [distill, seed, teacher.precision]
    outs: [data/distill]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A DVC project of one stage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for file, text in {"distill.py": STAGE, "dvc.yaml": GRAPH, "models/own.py": "", ".gitignore": "/edit"}.items():
        (tmp_path / file).write_text(text)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    for command in (("git", "init", "-q"), ("dvc", "init", "-q")):
        assert commands.run(tmp_path, command, ENVIRONMENT).returncode == 0
    return tmp_path


def repro(project, edit=""):
    (project / "edit").write_text(edit)
    if not edit:
        (project / "edit").unlink()
    return commands.run(project, ("dvc", "repro"), ENVIRONMENT)


def locked(project):
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["distill"]["params"]["params.yaml"]
    return lock["distill"]["epochs"]


def edit_epochs(before, after):
    return "params.yaml|{}|{}".format(*(f"epochs: {epochs}  " for epochs in (before, after)))


def set_epochs(project, epochs):
    text = (project / "params.yaml").read_text()
    start = text.index("\ndistill:")
    section = re.sub(r"epochs: \d+ ", f"epochs: {epochs} ", text[start:], count=1)
    (project / "params.yaml").write_text(text[:start] + section)


def test_settings_that_are_edited_meanwhile_are_not_recorded(project):
    set_epochs(project, 77)
    done = repro(project, edit_epochs(77, 78))
    assert done.returncode != 0
    said = re.search(r"(?m)^distill: error: (.*)", done.stdout)[1]
    assert said.startswith("params.yaml was edited while this ran: distill.epochs (was 77, is 78). DVC would record")
    assert not (project / "dvc.lock").exists()
    assert repro(project).returncode == 0
    assert (locked(project), (project / "data/distill").read_text()) == (78, "78")
    set_epochs(project, 77)
    done = repro(project)
    assert "is cached" not in done.stdout
    assert (locked(project), (project / "data/distill").read_text()) == (77, "77")


@pytest.mark.parametrize(
    "other", ["  batch_size: 64 |  batch_size: 32 ", "checkpoint_seconds: 60 |checkpoint_seconds: 9 "]
)
def test_settings_of_others_may_be_edited_meanwhile(project, other):
    """teacher's batch_size, and one of machine."""
    done = repro(project, f"params.yaml|{other}")
    assert done.returncode == 0, done.stdout
    assert locked(project) == 8


def test_a_setting_of_another_section_that_the_stage_reads_may_not(project):
    done = repro(project, "params.yaml|  precision: float32 |  precision: bfloat16 ")
    assert "teacher.precision (was float32, is bfloat16)" in done.stdout
    assert "baseline" not in done.stdout
    assert not (project / "dvc.lock").exists()


def test_code_that_is_edited_meanwhile_is_not_recorded_unless_the_user_says_so(project):
    (project / "models/own.py").write_text("# mine\n")
    done = repro(project, "models/own.py|mine|ours")
    assert done.returncode != 0
    assert "distill: error: models/own.py: edited while this ran. DVC would record the new code" in done.stdout
    assert not (project / "dvc.lock").exists()
    command = re.search("`(dvc commit .*?)`", done.stdout)[1]
    assert commands.run(project, tuple(command.split()), ENVIRONMENT).returncode == 0
    assert "didn't change, skipping" in repro(project).stdout


def test_a_stage_that_dvc_does_not_know_records_nothing(project):
    assert recorded.Recorded.now("score") == recorded.Recorded({}, {})
    recorded.check("score", recorded.Recorded.now("score"))


def test_settings_that_were_edited_after_a_stage_are_named(project):
    recorded.check_lock(("distill",))  # there is none
    assert repro(project).returncode == 0
    recorded.check_lock(("distill", "score"))
    set_epochs(project, 9)
    with pytest.raises(
        ValueError, match=r"edited since stage distill ran: distill.epochs \(was 8, is 9\)\. .*dvc repro"
    ):
        recorded.check_lock(("distill",))
    recorded.check_lock(("score",))
    (project / "dvc.yaml").write_text(GRAPH.replace("[distill, seed", "[seed"))
    recorded.check_lock(("distill",))  # DVC does not look at it any more
    (project / "dvc.yaml").write_text(GRAPH + "    frozen: true\n")
    recorded.check_lock(("distill",))
