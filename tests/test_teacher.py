"""Teachers made elsewhere: taken as they are, or refused with what is wrong with them."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from images import tiny
from runs import MODEL

from pipeline import teacher
from pipeline.core import networks, teaching
from pipeline.core.data.views import ViewSpec, draw
from pipeline.core.devices import Processes


def taken(tmp_path, monkeypatch, bias, **changes):
    """Make a checkpoint of a teacher that says the same of every image; give what `teacher.take` needs to take it."""
    classifier = networks.build(MODEL, 4, 0)
    head = classifier.network.get_classifier()
    torch.nn.init.zeros_(head.weight)
    head.bias.data.copy_(torch.tensor(bias))
    networks.save(tmp_path / "made", classifier, {"model": MODEL, "classes": list("abcd"), "resolution": 16})
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 10)
    wanted = {"source": "checkpoint", "model": MODEL, "checkpoint": str(tmp_path / "made/weights.safetensors")}
    params = tiny(**{f"teacher.{key}": value for key, value in {**wanted, **changes}.items()})
    return params, torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_teacher_is_fitted_to_none_of_the_views_it_is_asked_about(images, monkeypatch, seed):
    tasks, params = [], tiny(seed=seed)
    monkeypatch.setattr(teacher.training, "train", lambda task, *_: tasks.append(task))
    teacher.fit(params, images, Processes(torch.device("cpu")))
    fitted, asked = tasks[0].views.spec, ViewSpec.of(seed, params.views)
    assert dataclasses.replace(fitted, seed=seed) == asked, "alike in all else"
    assert fitted.seed not in range(2**32), "a seed of no run"
    crops = [draw(spec, 7, replica, images.ids[:5]).crops.box(32, 32) for spec in (fitted, asked) for replica in (0, 1)]
    assert len(set(crops)) == 4


def test_a_teacher_that_guesses_is_refused(images, tmp_path, monkeypatch, capsys):
    params, device = taken(tmp_path, monkeypatch, [2.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"guesses: validation top-1 0.2500 of 16 images of 4 classes.*in this order"):
        teacher.take(params, images, device)
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)  # of so few, nobody can tell
    monkeypatch.chdir(tmp_path)
    teacher.take(params, images, device)
    said = capsys.readouterr().out
    assert ": validation top-1 0.2500; 16 images are too few" in said
    assert "in order: " + ", ".join(f"'{name}'" for name in images.classes) + "\n" in said


def test_a_teacher_that_gives_one_answer_to_all_is_refused_however_common_that_class(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [2.0, 0.0, 0.0, 0.0])
    labels = images.labels.copy()
    rows = images.rows("val")
    labels[rows[:9]], labels[rows[9:]] = 0, 1
    monkeypatch.setattr(images, "labels", labels)
    with pytest.raises(
        ValueError, match=rf"guesses: to it, all 16 validation images are '{images.classes[0]}'\. Its classes"
    ):
        teacher.take(params, images, device)
    labels[rows[9:-3]] = 0  # of three, one that knows half of that class may miss all
    monkeypatch.chdir(tmp_path)
    teacher.take(params, images, device)


def test_a_teacher_that_answers_with_probabilities_is_refused(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [0.5, 0.2, 0.2, 0.1])
    with pytest.raises(ValueError, match=f"^{MODEL} answers with probabilities, not with logits: leave out the"):
        teacher.take(params, images, device)


def answered(places, correct, each, seed):
    """Labels, and answers of a teacher whose classes stand in other places, with so many right; the rest guessed."""
    chance, count = np.random.default_rng(seed), len(places) * each
    labels = np.repeat(np.arange(len(places)), each)
    right = chance.random(count) < correct
    return labels, np.where(right, np.array(places)[labels], chance.integers(0, len(places), count))


@pytest.mark.parametrize(
    ("places", "named"),
    [([0, 2, 1, 3, 4], "bc"), ([0, 2, 3, 1, 4], "bcd"), ([1, 0, 2, 4, 3], "abde")],
)
def test_classes_in_each_others_place_are_seen(places, named):
    said = teacher.swapped(*answered(places, 0.9, 20, seed=0), "abcde")
    assert "".join(sorted(re.findall("images of '(.)'", said))) == named
    said = teacher.swapped(np.repeat([0, 1], 20), np.array([1] * 18 + [0] * 22), "ab")
    assert said == "18 of 20 images of 'a' are to it 'b'; 20 of 20 images of 'b' are to it 'a'"


@pytest.mark.parametrize(
    ("places", "correct", "each"),
    [
        ([0, 1, 2, 3, 4], 0.6, 20),
        ([0, 1, 1, 3, 4], 0.9, 20),  # it takes one class for another, but not that one for it
        (range(100), 0.2, 5),
        (range(100), 0.7, 1),
        ([0] * 100, 0.0, 5),  # it guesses
    ],
)
def test_a_sound_teacher_is_never_taken_for_one_with_classes_in_other_places(places, correct, each):
    names = [str(at) for at in range(len(places))]
    assert {teacher.swapped(*answered(places, correct, each, seed), names) for seed in range(50)} == {""}


def test_a_teacher_whose_answers_are_not_finite_is_refused(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [float("nan"), 0.0, 0.0, 0.0])
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)
    with pytest.raises(ValueError, match=f"^{MODEL}: its answers to validation images are not finite$"):
        teacher.take(params, images, device)


def test_few_images_show_a_teacher_that_is_worse_than_guessing(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [2.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)
    monkeypatch.setattr(teacher.training, "validator", lambda *asked: lambda classifier: {"val_top1": 1 / 16})
    with pytest.raises(ValueError, match=r"guesses: validation top-1 0.0625 of 16 images of 4 classes"):
        teacher.take(params, images, device)


def test_a_taken_teacher_sees_pixels_as_it_was_trained_with(images, tmp_path, monkeypatch):
    params, device = taken(tmp_path, monkeypatch, [0.0] * 4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)
    monkeypatch.chdir(tmp_path)
    teacher.take(params, images, device)
    card = networks.read_card(tmp_path / "data/teacher")
    assert (card["mean"], card["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])


def test_a_teacher_that_does_not_take_the_resolution_is_refused(images, tmp_path, monkeypatch):
    network = networks.build("vit_tiny_patch16_224", 4, 0)
    networks.save(tmp_path, network, {"model": "vit", "classes": list("abcd"), "resolution": 224})
    monkeypatch.chdir(tmp_path)
    wanted = {
        "source": "checkpoint",
        "model": "vit_tiny_patch16_224",
        "checkpoint": str(tmp_path / "weights.safetensors"),
    }
    with pytest.raises(ValueError, match=r"does not take images of 16 pixels.*for 224: set teacher.resolution"):
        teacher.take(tiny(**{f"teacher.{key}": value for key, value in wanted.items()}), images, torch.device("cpu"))
    assert not (tmp_path / "data/teacher").exists()
    settings = tiny(**{f"teacher.{key}": value for key, value in {**wanted, "resolution": 224}.items()})
    teacher.take(settings, images, torch.device("cpu"))
    card = networks.read_card(tmp_path / "data/teacher")
    plain = {key: value for key, value in card.items() if key != "resized_to"}
    asked, without = (teaching.description(settings, it) for it in (card, plain))
    assert asked.difference(without) == "teacher.resized_to"  # so that answers to other pixels are refused
