"""params.yaml with changes: written as DVC and the stages read it, and a wrong change named."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import toy_project
import yaml
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from pipeline import recipes
from pipeline.core import params
from pipeline.core.running import params_file


def test_a_changed_table_takes_the_place_of_the_one_before(tmp_path):
    toy = toy_project.make(tmp_path / "toy")
    params_file.write(toy, toy, {"distill.loss": {"ssld": 1.0, "hard": 0.1}})
    params_file.write(toy, toy, {"distill.loss": {"kl": 1.0}})
    assert params.load(toy / "params.yaml").distill.loss == {"kl": 1.0}
    assert "loss: {kl: 1.0}" in (toy / "params.yaml").read_text()


@pytest.mark.parametrize("shared", ["finetune: *one", "finetune: {<<: *one, epochs: 4}"])
def test_sections_that_share_values_are_left_as_they_are(tmp_path, shared):
    toy = toy_project.make(tmp_path / "toy")
    settings = yaml.safe_load((toy / "params.yaml").read_text())
    del settings["finetune"]
    text = yaml.safe_dump(settings).replace("distill:\n", "distill: &one\n") + shared + "\n"
    (toy / "params.yaml").write_text(text)
    assert params.with_changes(yaml.safe_load(text), {})["finetune"]["lr"] == settings["distill"]["lr"]
    with pytest.raises(ValueError, match=r"^params.yaml: what its sections share .* cannot be changed in one of them"):
        params_file.write(toy, toy, {"distill.lr": 0.5})
    assert (toy / "params.yaml").read_text() == text


@pytest.mark.parametrize(
    "text", ["yes", "no", "1:30", "7e-5", "a: b", "'", "null", "{", "2024-13-01", "a\x85b", "photos"]
)
def test_a_text_stays_a_text(tmp_path, text):
    toy = toy_project.make(tmp_path / "toy")
    for changes in ({"prepare.train": text}, {"distill.epochs": 3}):  # what stands there already is kept
        params_file.write(toy, toy, changes)
    settings = params_file.read(toy)
    assert settings["prepare"]["train"] == text
    assert settings["distill"]["epochs"] == 3


@pytest.mark.parametrize("spelt", ["1e-4", "7e-05", "0x10", "010", "1_000", "1.50", "'no'", "yes"])
def test_what_is_not_changed_stays_as_it_is_spelt(tmp_path, spelt):
    before = re.sub("weight_decay: [^ ]+", f"weight_decay: {spelt}", (toy_project.ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(before)
    params_file.write(tmp_path, tmp_path, {"seed": 5})
    assert (tmp_path / "params.yaml").read_text() == before.replace("\nseed: 0 ", "\nseed: 5 ")


def test_it_leaves_ruamels_own_writing_alone(tmp_path):
    """DVC writes with ruamel in the same process."""
    params_file.write(toy_project.ROOT, tmp_path, {"seed": 5})
    text = io.StringIO()
    YAML().dump({"lr": 5e-05}, text)
    assert text.getvalue() == "lr: 5e-05\n"


def test_it_is_utf_8_in_any_locale(tmp_path):
    before = "# für alle\n" + (toy_project.ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(before, encoding="utf-8")
    code = "from pathlib import Path; from pipeline.core.running import params_file as file"
    command = [sys.executable, "-X", "utf8=0", "-c", f"{code}; file.write(Path(), Path(), {{'seed': 5}})"]
    variables = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(toy_project.ROOT)}
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, check=True)
    after = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert after == before.replace("\nseed: 0 ", "\nseed: 5 ")


@pytest.mark.parametrize("recipe", recipes.names(toy_project.ROOT))
def test_recipes_apply_to_a_file_that_dvc_has_written(tmp_path, recipe):
    """`dvc exp run -S` gives a line to each number of a list, and writes 0.00005 as 5e-05."""
    (tmp_path / "recipes").symlink_to(toy_project.ROOT / "recipes")
    file = tmp_path / "params.yaml"
    shutil.copy(toy_project.ROOT / "params.yaml", file)
    recipes.apply(recipe, tmp_path)
    wanted = file.read_text()
    shutil.copy(toy_project.ROOT / "params.yaml", file)
    apply_overrides(file, ["seed=3", "finetune.lr=5e-05"])
    recipes.apply(recipe, tmp_path)
    assert params_file.read(tmp_path) == params.parse(wanted) | {"seed": 3}
    comments = [re.findall("# (.*)", text) for text in (wanted, file.read_text())]
    assert comments[0] == comments[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill.epoch": 2}, "distill.epoch: unknown key; did you mean distill.epochs?"),
        ({"distill": {"epochs": -1}}, "distill.epochs: should be greater than or equal to 1"),
    ],
)
def test_a_wrong_change_is_one_line_that_names_it(changes, words):
    with pytest.raises(ValueError, match=f"^.*{re.escape(words)}.*$"):
        params_file.check(toy_project.ROOT, changes)
