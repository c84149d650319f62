"""The model card: what it says of the student, and that its lines do what they say."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from student_project import NAME, RESOLUTION, ROOT, make_network, put_student, write_images

import models
from pipeline.core import params as settings
from pipeline.core.data import images, views
from pipeline.core.data.batches import CleanViews, in_order
from pipeline.core.results import model_card

IMAGES = {"labelled": 24, "unlabelled": 0, "val": 0, "test": 24}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """What network.json and metrics.json say of a student that stands evaluated."""
    data = tmp_path_factory.mktemp("project") / "data"
    made = write_images(data / "prepare", lambda at: at % 3)
    rows = made.rows("test", "labelled")
    put_student(data, made, make_network(CleanViews(made, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels))
    files = data / "fixres/network.json", data / "evaluate/metrics.json"
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("ResNet50_vd", '`timm.create_model("resnet50d", num_classes=10)` takes them'),
        ("ResNeXt101_32x8d_wsl", '`timm.create_model("resnext101_32x8d", num_classes=10)` takes them'),
        ("ResNet18_vd", "nothing takes them: timm has no ResNet18_vd"),
        ("resnet18d.ra2_in1k", '`timm.create_model("resnet18d", num_classes=10)` takes them'),
    ],
)
def test_the_card_says_what_else_takes_the_weights(student, model, words):
    network, figures = student
    network = network | {"model": model, "num_classes": 10}
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    assert f"Without it, {words}" in model_card.in_full(NAME, network, figures, params, IMAGES, 0, {})


def test_the_card_says_where_the_code_of_ones_own_network_is(student, monkeypatch):
    monkeypatch.setattr(models, "is_own", lambda name: name == "mine")
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    text = model_card.in_full(NAME, student[0] | {"model": "mine"}, student[1], params, IMAGES, 0, {})
    assert "Without it, code of its makers takes them: `mine`, in `models/own.py` of that commit." in text


def test_near_copies_are_told(student):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    told = "1,200 of them are near-copies of labelled images, from which this network learned"
    for count in (0, 1200):
        text = model_card.in_full(NAME, network, figures | {"near_copies": count}, params, IMAGES, 0, {})
        assert (told in text) == ("near-cop" in text.partition("## What goes in")[0]) == (count > 0)


def test_each_networks_figures_are_its_own(student):
    network, figures = student
    figures = {
        who: {key: (100 * number + place) / 1000 for place, key in enumerate(("top1", "top5", "nll", "ece"))}
        | {"agreement": number / 10, "parameters": 1000 * number}
        for number, who in enumerate(("teacher", "baseline", "student"), 1)
    }
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    text = model_card.in_full(
        NAME, network, figures, params, {"labelled": 12, "unlabelled": 0, "val": 5, "test": 24}, 0, {}
    )
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "." in line]
    assert rows == [
        ["teacher", "0.1000", "0.1010", "0.1020", "0.1030", "1,000"],
        ["student on labels alone", "0.2000", "0.2010", "0.2020", "0.2030", "2,000"],
        ["**this network**", "0.3000", "0.3010", "0.3020", "0.3030", "3,000"],
    ]
    assert "| | top-1 | top-5 | NLL | ECE | parameters |\n" in text
    assert "0.3000 (the teacher 0.1000, the same network on labels alone 0.2000)" in text
    assert "agrees with the teacher on 30.0% of the test images" in text
    assert "On the 24 images of the test split:" in text
    for words in ("12 images with labels", "5 images for validation", "24 images for the numbers above"):
        assert f"- {words}" in text
    assert f"models:/{NAME}/7" in model_card.description(NAME, "7", network, figures, "ResNet152_vd")


def test_the_card_has_the_recipe_and_each_stages_settings_of_it(student):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    text = model_card.in_full(NAME, network, figures, params, IMAGES, 0, {})
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    not_of_it = {"prepare", "score", "baseline", "evaluate", "register", "machine", "digits"}
    assert recipe == {name: section for name, section in params.items() if name not in not_of_it}
    assert list(recipe) == [name for name in params if name in recipe]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"fit_on": "withheld"}, "The teacher was fitted here, with the labels of all training images"),
        ({"fit_on": "labelled"}, "The teacher was fitted here, with the same labels."),
        ({"init": "timm"}, "The teacher was fitted here from timm's pretrained weights, with the"),
        ({"init": "a.pth"}, "The teacher was fitted here from `a.pth`, with the"),
        ({"source": "timm"}, "The teacher has timm's pretrained weights."),
        ({"source": "checkpoint", "checkpoint": "b.pth"}, "The teacher's weights came from a checkpoint, `b.pth`."),
    ],
)
def test_the_card_says_where_the_teacher_comes_from(student, teacher, words):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    params["teacher"] |= {"source": "fit", "init": None} | teacher
    text = model_card.in_full(NAME, network, figures, params, IMAGES, 0, {})
    assert words in text
    assert text.count("The teacher was") + text.count("The teacher has") + text.count("The teacher's weights") == 1


def test_the_card_says_what_validation_images_were_for_and_which_stages_network_it_is(student):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    for rank_by, ranked in (("likeness", True), ("probability", False)):
        params["mine"] |= {"rank_by": rank_by}
        text = model_card.in_full(NAME, network, figures, params, IMAGES, 0, {})
        assert ("to rank the pool" in text) == ranked
        assert "near-copies of them out of it; no network learned" in text
    assert "no better" not in text
    kept = network | {"kept": {"stage": "finetune", "val_top1": 0.9, "instead_of": 0.8}}
    text = model_card.in_full(NAME, kept, figures, params, IMAGES, 0, {})
    assert "What fixres trained was no better on the validation images: this is the network of finetune." in text


def test_the_card_shows_names_with_backticks(student):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    network = network | {"classes": ["cat", "a`b``"]}
    assert "`cat`, ``` a`b`` ```" in model_card.in_full(NAME, network, figures, params, IMAGES, 0, {})


def test_the_card_fits_the_registry(student):
    """MLflow keeps 5,000 characters of a description, and the card must say how its own network is loaded."""
    network, figures = student
    network = network | {"classes": [f"class {i}" for i in range(1000)], "num_classes": 1000}
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    text = model_card.in_full(NAME, network, figures, params, IMAGES, 0, {"digest.data": "d"})
    assert f"models:/{NAME}@champion" in text
    assert "and 980 more" in text
    assert "logits, shape (B, 1000)." in text
    assert len(model_card.description(NAME, "7", network, figures, "ResNet152_vd")) < 2000


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (None, "what the teacher says. The teacher was"),
        ("timm", "But it started from timm's pretrained weights,"),
        ("data/weights/student/a.pth", "from the weights in `data/weights/student/a.pth`,"),
    ],
)
@pytest.mark.parametrize(
    ("dirty", "leads_back"),
    [
        ({"git.dirty": "false"}, "Check out the commit"),
        ({"git.dirty": "true"}, "had changes that are in no commit (`git.dirty`)"),
        ({"git.dirty": "unknown"}, "changes that are in no commit is not known (`git.dirty`)."),
        ({}, "in no commit"),
    ],
)
def test_the_card_says_what_the_student_started_from_and_whether_the_commit_is_all(
    student, init, words, dirty, leads_back
):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    params["student"]["init"] = init
    text = model_card.in_full(NAME, network, figures, params, IMAGES, 0, dirty)
    assert words in text
    assert leads_back in text


@pytest.mark.parametrize(("crop", "words"), [(1.0, "the largest centre square"), (0.875, "square of 0.875 of the")])
def test_the_card_makes_an_input_of_a_file(student, tmp_path, crop, words):
    network, figures = student
    params = settings.load(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    params["views"]["test_crop"] = crop
    text = model_card.in_full(NAME, network, figures, params, IMAGES, 0, {})
    assert words in text
    found = {}
    exec(next(block for block in text.split("```") if "def pixels_of" in block).removeprefix("python"), found)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 4), np.uint8), "RGBA")
    image.save(tmp_path / "image.png")
    wanted = views.render_test(images.decode((tmp_path / "image.png").read_bytes()), network["resolution"], crop)
    assert np.array_equal(found["pixels_of"](tmp_path / "image.png")[0], wanted)
