"""Settings: what is wrong is one line that names the key and the nearest right one."""

import json
import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import load_yaml

from pipeline.core import params

FILE = Path(__file__).parent.parent / "params.yaml"


def test_the_projects_own_file_is_right(data):
    assert json.loads(params.load(FILE).model_dump_json(by_alias=True, include={"views", "mine"})) == {
        "views": data["views"],
        "mine": data["mine"],
    }


def test_every_key_has_a_comment():
    lines = [line for line in FILE.read_text().splitlines() if line.startswith("  ") and ":" in line.split("#")[0]]
    assert [line for line in lines if "#" not in line] == []
    assert len(lines) > 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.epoch": 2}, "distill.epoch: unknown key; did you mean distill.epochs?"),
        ({"distil": {"epochs": 2}}, "distil: unknown key; did you mean distill?"),
        ({"distill": {"epoch": 2}}, "distill.epoch: unknown key; did you mean distill.epochs?"),
        ({"sed": 1}, "sed: unknown key; did you mean seed?"),
        ({"student": 2}, "student: a section; name one of its keys: student.model, student.init"),
    ],
)
def test_a_change_of_an_unknown_key_names_the_nearest(data, changes, message):
    with pytest.raises(ValueError) as error:
        params.with_changes(data, changes)
    assert str(error.value) == message


@pytest.mark.parametrize("change", [{"seed": 5}, {"distill.epochs": 3}, {"distill": {"epochs": 3, "lr": 0.5}}])
def test_a_change_is_made_and_the_original_stays(data, change):
    changed = params.with_changes(data, change)
    assert changed != data
    assert data == yaml.safe_load(FILE.read_text())
    params.check(changed)


@pytest.mark.parametrize(("wrong", "right"), [("teacher.epoch", "teacher.epochs"), ("register.nme", "register.name")])
def test_a_misspelt_key_in_the_file_is_one_line(data, tmp_path, wrong, right):
    section, _, key = wrong.partition(".")
    data[section][key] = data[section].pop(right.partition(".")[2])
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError) as error:
        params.load(file)
    assert str(error.value) == f"{file}: {wrong}: unknown key; did you mean {right}?"


def test_all_that_is_wrong_is_told_in_one_line(data):
    data["teacher"]["epoch"] = data["teacher"].pop("epochs")
    data["views"]["crop_scale"] = [0.5]
    data["mine"]["per_class"] = "all"
    del data["seed"], data["finetune"]["lr"], data["finetune"]["precision"]
    with pytest.raises(ValueError) as error:
        params.check(data)
    assert sorted(str(error.value).removeprefix("params.yaml: ").split("; also ")) == [
        "mine.per_class: should be a whole number, not 'all'",
        "seed, finetune.lr, finetune.precision: missing; every key must be there",
        "teacher.epoch: unknown key; did you mean teacher.epochs?",
        "views.crop_scale: should be 2 numbers, not 1",
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher.source", "hub", "'fit', 'timm' or 'checkpoint'"),
        ("machine.workers", "many", "machine.workers: should be auto or a whole number, not 'many'"),
        ("machine.processes", 0, "machine.processes: should be auto or a whole number from 1 on, not 0"),
        ("teacher.lr", 0, "greater than 0"),
        ("distill.epochs", "many", "whole number"),
        ("views.crop_scale", [0.9, 0.5], "crop_scale"),
        ("views.flip", 1.5, "less than or equal to 1"),
        ("prepare.labelled_root", "~/photos", "labelled_root begins with ~: write the path out"),
        ("baseline", {"epochs": 60, "warmup_epochs": 61}, "warmup_epochs, 61, must not be more than epochs, 60"),
        ("teacher.mean", [123.675, 116.28, 103.53], "teacher.mean.0: should be less than or equal to 1"),
        ("teacher.std", [0.2, 0.2, 0.2], "set them to null to fit one here"),
        ("register.name", "photos/1", "register.name: should be letters"),
        ("machine", {"cudnn_benchmark": True, "deterministic": True}, "not both"),
        ("prepare.labelled_root", "", "prepare.labelled_root: should not be empty"),
        ("mine", None, "mine: should be a section with keys, not None"),
        ("distill.epochs", True, "distill.epochs: should be a number, not true"),
        ("distill.loss", {"ssld": True}, "distill.loss: should be a number, not true"),
        ("views.crop_scale", [True, True], "views.crop_scale: should be a number, not true"),
        ("views.crop_scale", [0.1, 0.5, 1.0], "views.crop_scale: should be 2 numbers, not 3"),
        ("distill.online", 2, "distill.online: should be true or false, not 2"),
        ("teacher.model", 5, "teacher.model: should be text, not 5"),
        ("student.model", True, "student.model: should be text, not True"),
        ("teacher.source", True, "'fit', 'timm' or 'checkpoint', not True"),
        ("distill.epochs", 2.5, "distill.epochs: should be a whole number, not 2.5"),
        ("teacher.checkpoint", "mine.safetensors", "set source to checkpoint, or checkpoint to null"),
        ("student.init", "", "student.init: should not be empty"),
        ("teacher", {"source": "timm", "init": "timm"}, "set source to fit to train it further, or init to null"),
        ("prepare", {"val": None, "test": None, "val_share": 0.5, "test_share": 0.5}, "must be below 1"),
        ("prepare", {"val": None, "test": "test", "val_share": 1.0}, "val_share take all of train"),
        ("register.margin", 5, "register.margin: should be less than or equal to 1, not 5"),
        ("views.crop_scale", [0.5], "views.crop_scale: should be 2 numbers, not 1"),
        ("baseline.lr_multipliers", [0.1, 0.2], "baseline.lr_multipliers: should be 5 numbers, not 2"),
    ],
)
def test_a_wrong_value_names_its_key(data, key, value, words):
    section, _, name = key.partition(".")
    if name:
        data[section][name] = value
    else:
        data[section] = {**data[section], **value} if value else value
    with pytest.raises(ValueError, match=section) as error:
        params.check(data)
    assert str(error.value).count(words) == 1
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "weights"),
    [("kl", {"kl": 1.0}), ({"ssld": 1, "hard": 0.1}, {"ssld": 1.0, "hard": 0.1}), ({"ssld": 1, "kl": 0}, None)],
)
def test_a_loss_is_a_name_or_weights(data, value, weights):
    data["finetune"]["loss"] = value
    assert params.check(data).finetune.loss == (weights or value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sslld", "p.yaml: distill.loss: no loss is called 'sslld'; did you mean ssld?"),
        ({"ssld": 1.0, "hrd": 0.1}, "p.yaml: distill.loss: no loss is called 'hrd'; did you mean hard?"),
        ({"ssld": -1.0}, "p.yaml: distill.loss.ssld: should be greater than or equal to 0, not -1.0"),
        ({"ssld": None}, "p.yaml: distill.loss.ssld: should be a number, not None"),
        (["ssld"], "p.yaml: distill.loss: should be the name of a loss, or weights of several such as {ssld: 1.0, "),
        ({"hard": 1.0, "ssld": 0}, "p.yaml: distill.loss: a weight above 0 is needed of a loss other than hard: "),
        ({}, "p.yaml: distill.loss: a weight above 0 is needed of a loss other than hard: "),
    ],
)
def test_a_wrong_loss_is_named(data, value, message):
    data["distill"]["loss"] = value
    with pytest.raises(ValueError) as error:
        params.check(data, "p.yaml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path):
    file = tmp_path / "p.yaml"
    for content, words in (
        ("seed: 0\nmine: {}\nseed: 1\n", "seed: stands twice, the second time in line 3; remove one"),
        ("mine:\n  per_class: 1\n  per_class: 2\n", "per_class: stands twice, the second time in line 3; remove one"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError) as error:
            params.load(file)
        assert str(error.value) == f"{file}: {words}"


@pytest.mark.parametrize(("spelt", "value"), [("1e1", 10), ("010", 10), ("1_0", 10), ("0o10", 8)])
def test_a_number_is_read_as_dvc_reads_it(tmp_path, spelt, value):
    file = tmp_path / "params.yaml"
    file.write_text(re.sub("randaugment_magnitude: [^ ]+", f"randaugment_magnitude: {spelt}", FILE.read_text()))
    assert params.load(file).views.randaugment_magnitude == load_yaml(file)["views"]["randaugment_magnitude"] == value


@pytest.mark.parametrize(
    "content", ["[1, 2", "just words", "!!bool maybe", "", "- a\n- b", "{[a]: 1}", "{[a]: 1, [a]: 1}"]
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, content):
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        params.load(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(ValueError, match="no such file; run from the project's root"):
        params.load(tmp_path / "params.yaml")
