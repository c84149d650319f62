"""What is looked at before anything starts: images, weights, networks, batches; each mistake is a line."""

import contextlib
from pathlib import Path

import pytest
import torch
import yaml
from images import tiny

import models
from pipeline.core import networks, params
from pipeline.core.running import preflight, timm_weights


def test_a_folder_without_git_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"in no Git repository.*`git init`$"):
        preflight.check_git(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    preflight.check_git(tmp_path)
    (tmp_path / "inner/.dvc").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    preflight.check_git(tmp_path / "inner")


def test_images_that_are_not_there_are_named_before_anything_runs(data, tmp_path):
    for folder in ("train", "val", "unlabelled"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
    data["prepare"] |= {"labelled_root": "photos", "unlabelled_root": str(tmp_path / "photos"), "test": None}
    preflight.check_files(params.check(data), tmp_path)
    data["prepare"]["test"] = "test"
    with pytest.raises(ValueError, match=r"^prepare.test: .*photos/test: no such .*; prepare.test: null takes a share"):
        preflight.check_files(params.check(data), tmp_path)
    data["prepare"]["test"] = None
    for root in (".", "data", "data/prepare/..", "data/mine", "data/mine/photos"):
        (tmp_path / "data/prepare").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/mine/photos").mkdir(parents=True, exist_ok=True)
        data["prepare"]["unlabelled_root"] = root
        with pytest.raises(ValueError, match=r"^prepare.unlabelled_root: .*: holds what the stages write;"):
            preflight.check_files(params.check(data), tmp_path)
    data["prepare"]["unlabelled_root"] = "heap"
    with pytest.raises(ValueError, match=r"^prepare.unlabelled_root: heap: no such folder or archive$"):
        preflight.check_files(params.check(data), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "teacher.model",
            "ResNet152_dv",
            r"^teacher.model: 'ResNet152_dv': no such network; the nearest are ResNet152_vd",
        ),
        (
            "student.model",
            "vit_tiny_patch16_224",
            "^student.model, views.resolution: vit_tiny_patch16_224 does not take images of 32 pixels",
        ),
        (
            "teacher.model",
            "vit_tiny_patch16_384",
            r"^teacher.model, views.resolution: vit_tiny_patch16_384 does not take images of 32 pixels: Input height "
            r"\(32\) doesn't match model \(384\); it was made for 384: set teacher.resolution to that$",
        ),
        (
            "teacher.model",
            "lambda_resnet26t",
            "^teacher.model, views.resolution: lambda_resnet26t has weights of five dimensions, .*; take another",
        ),
        (
            "student",
            {"model": "ResNet50_vd_ssld", "init": "timm"},
            "^student.init: timm has no pretrained weights of Re",
        ),
        ("student.init", "nowhere.safetensors", "^student.init: nowhere.safetensors: no such file$"),
        ("teacher.init", "nowhere.safetensors", "^teacher.init: nowhere.safetensors: no such file$"),
        (
            "teacher",
            {"model": "ResNet18_vd", "init": "timm"},
            "^teacher.init: timm has no pretrained weights of ResNet",
        ),
        pytest.param(
            *("machine.device", "cuda", "^machine.device is cuda, but torch sees no CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_networks_and_weights_are_looked_at_before_anything_runs(data, tmp_path, key, value, words):
    section, _, name = key.partition(".")
    data[section] |= {name: value} if name else value
    with pytest.raises(ValueError, match=words):
        preflight.check(params.check(data), tmp_path)


def test_timms_weights_are_fetched_before_anything_runs(data, tmp_path, monkeypatch):
    build, fetched = models.build, []

    def without_network(name, pretrained=False, **kwargs):
        if pretrained:
            fetched.append(name)
            raise ValueError(f"{name}: its pretrained weights cannot be had")
        return build(name, **kwargs)

    monkeypatch.setattr(models, "build", without_network)
    for section, model, key, instead in (
        ("teacher", "resnet18", "source", "checkpoint, and bring the file"),
        ("student", "resnet34", "init", "a file of weights, or to null"),
    ):
        before = dict(data[section])
        data[section] |= {"model": model, key: "timm"}
        words = (
            f"^{section}.{key}: {model}: its pretrained weights cannot be had; without a network, set it to {instead}$"
        )
        with pytest.raises(ValueError, match=words):
            preflight.check(params.check(data), tmp_path)
        data[section] = before
    assert fetched == ["resnet18", "resnet34"]
    data["student"] |= {"model": "resnet34", "init": "timm"}
    for stage in ("baseline", "distill"):
        (tmp_path / "data" / stage).mkdir(parents=True)
    for init in (None, "timm"):  # what they were made from
        made = {"params": {"params.yaml": {"student": {"model": "resnet34", "init": init}}}}
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"baseline": made, "distill": made}}))
        with contextlib.nullcontext() if init else pytest.raises(ValueError, match="cannot be had"):
            preflight.check(params.check(data), tmp_path)
    assert fetched == ["resnet18", "resnet34", "resnet34"]


def test_a_teacher_may_see_larger_images_and_start_from_timms_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_weights, "fetch", lambda *_: None)
    data["teacher"] |= {"model": "vit_tiny_patch16_384", "resolution": 384, "init": "timm"}
    data["student"]["init"] = "timm"
    preflight.check(params.check(data), tmp_path)
    data["teacher"]["resolution"] = 224
    with pytest.raises(ValueError, match="does not take images of 224 pixels"):
        preflight.check(params.check(data), tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "more"),
    [("student", "init", {}), ("teacher", "init", {}), ("teacher", "checkpoint", {"source": "checkpoint"})],
)
def test_weights_that_dvc_does_not_watch_are_refused(data, tmp_path, section, key, more):
    inside, outside = f"data/weights/{section}/w.safetensors", "w.safetensors"
    for file in (inside, outside):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    for good in (inside, str(tmp_path / inside)):
        data[section] |= {key: good, **more}
        preflight.check_files(params.check(data), tmp_path)
    data[section][key] = outside
    with pytest.raises(ValueError, match=rf"^{section}.{key}: w.safetensors: not in data/weights/{section}, where DVC"):
        preflight.check_files(params.check(data), tmp_path)


@pytest.mark.parametrize("what", ["params.yaml", "photos"])
def test_what_cannot_be_read_is_a_line(data, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    if what == "photos":
        data["prepare"]["labelled_root"] = "a" * 300  # longer than names may be: as an unreadable folder, also for root
        Path("params.yaml").write_text(yaml.safe_dump(data))
    else:
        Path("params.yaml").mkdir()
    with pytest.raises(SystemExit, match=r"^preflight: error: .*"):
        preflight.main()


def test_multipliers_are_looked_at_with_the_network(data, tmp_path):
    data["student"]["model"], data["distill"]["lr_multipliers"] = "vgg11", [0.1] * 5
    with pytest.raises(ValueError, match=r"^distill: lr_multipliers has 5 numbers"):
        preflight.check(params.check(data), tmp_path)


def test_networks_that_were_right_are_not_built_again(data, tmp_path, monkeypatch):
    data["student"]["model"] = "vit_tiny_patch16_224"
    for _ in range(2):  # what is wrong is not noted as right
        with pytest.raises(ValueError, match=r"does not take images of 32 pixels"):
            preflight.check(params.check(data), tmp_path)
    data["student"]["model"] = "ResNet50_vd"
    preflight.check(params.check(data), tmp_path)
    monkeypatch.setattr(networks, "build", None)
    preflight.check(params.check(data), tmp_path)
    data["student"]["model"] = "ResNet34_vd"
    with pytest.raises(TypeError):
        preflight.check(params.check(data), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine.processes": 4}, None),
        ({"machine.processes": 3, "teacher.source": "timm"}, "distill: a batch of 32 images"),
        (
            {"machine.processes": 3},
            "teacher: a batch of 64 images .* to 3 processes: set the stage's batch_size to 63, or",
        ),
        (
            {"machine.processes": 16},
            "baseline: a batch of 24 images .* to 16 processes: set the stage's batch_size to 32, or",
        ),
        (
            {"machine.processes": 4, "fixres.accumulate": 4},
            "fixres: .* 4 parts each: set the stage's batch_size to 32, or accumulate or",
        ),
        ({"machine.processes": "auto", "machine.device": "cpu"}, None),
    ],
)
def test_batches_that_processes_cannot_share_are_named_before_anything_starts(data, changes, words):
    settings = params.check(params.with_changes(data, changes))
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        preflight.check_batches(settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"distill.loss": "dkd"}, "distill.loss dkd"),
        ({"finetune.loss": {"ssld": 1.0, "nckd": 0.5}}, "finetune.loss nckd"),
        ({"distill.loss": {"ssld": 1.0, "nckd": 0.0}}, ""),
        ({"distill.temperature": 4}, "distill.temperature 4"),
        ({"distill.temperature": 2}, ""),
        ({"distill.loss": "dkd", "distill.online": True}, ""),
        ({"distill.loss": "dkd", "cache.min_probability": 1e-9}, ""),
    ],
)
def test_a_loss_of_classes_that_are_not_stored_is_named(capsys, changes, said):
    preflight.warn_of_tails(tiny(**{"cache.min_probability": 1e-5, **changes}))
    out = capsys.readouterr().out
    assert out.startswith(f"preflight: warning: {said} weighs") if said else not out
