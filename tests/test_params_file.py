"""params.yaml with changes: written as PyYAML reads it, and a wrong change named."""

import re

import pytest
import toy_project
import yaml

from pipeline.core import params, params_file


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
    settings = yaml.safe_load((toy / "params.yaml").read_text())
    assert settings["prepare"]["train"] == text
    assert settings["distill"]["epochs"] == 3


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
