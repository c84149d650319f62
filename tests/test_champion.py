"""The champion: which student takes its place, and how two are compared."""

import io
import shutil
from pathlib import Path

import pytest
import student_project
import torch
from made_images import encode
from PIL import Image
from student_project import CLASSES, NAME, RESOLUTION, make_network, picture, write_images

from pipeline import register
from pipeline.core.data.batches import CleanViews, in_order
from pipeline.core.results import mlflow_store, registry


@pytest.mark.usefixtures("no_onnx")
def test_only_a_better_student_becomes_champion(project):
    worse, best = project.student(spoilt=1.0), None
    assert worse < 1.0
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 1}

    worst = project.student(spoilt=100.0)
    assert worst < worse
    project.register()
    assert project.aliases() == {"champion": 1, "challenger": 2}
    assert project.versions()[2].tags["decision"].startswith("not promoted")

    best = project.student(spoilt=0.0)
    assert best == 1.0
    project.register(margin=0.99)
    assert project.aliases() == {"champion": 1, "challenger": 3}
    assert "margin of 0.99" in project.versions()[3].tags["decision"]
    project.register(margin=0.0)  # a smaller margin decides anew, and needs no new version
    assert project.aliases() == {"champion": 3, "challenger": 3}
    assert sorted(project.versions()) == [1, 2, 3]


@pytest.mark.usefixtures("no_onnx")
def test_one_that_became_champion_elsewhere_meanwhile_is_compared_with(project, monkeypatch):
    project.student(spoilt=1.0)
    project.register()
    project.student(spoilt=0.0)
    project.register()
    client = mlflow_store.connect()
    client.set_registered_model_alias(NAME, "champion", "1")
    compare = register._compare

    def slowly(*arguments, **named):
        found = compare(*arguments, **named)
        client.set_registered_model_alias(NAME, "champion", "2")
        return found

    monkeypatch.setattr(register, "_compare", slowly)
    assert project.student(spoilt=1e-4) == 1.0  # better than version 1, and as good as version 2
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 3}
    assert "does not beat version 2" in project.versions()[3].tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_an_equal_student_does_not_replace_the_champion(registered):
    assert registered.student(spoilt=1e-4) == 1.0
    registered.register()
    assert registered.aliases() == {"champion": 1, "challenger": 2}


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_of_other_test_images_is_tested_anew(registered, made_project, capfd):
    champion = make_network(made_project.pixels)
    # Labels in reverse order make no sense of these images: the champion must do badly on them.
    images = registered.images = write_images(registered.data / "prepare", lambda at: made_project.labels[47 - at])
    rows = images.rows("test")
    with torch.inference_mode():
        logits = champion(CleanViews(images, RESOLUTION, 1.0)[in_order(rows, 1000)[0]].pixels)
    expected = (logits.argmax(1).numpy() == images.labels[rows]).mean()
    assert expected < 1.0
    registered.student(spoilt=0.5)
    registered.register()
    assert "the champion on these test images" in capfd.readouterr().err
    assert f"version 1's {expected:.4f}; that one had other test images" in registered.versions()[2].tags["decision"]


def framed(number):
    """A picture with another around it."""
    frame, middle = (Image.open(io.BytesIO(picture(each))) for each in (number, 1000 + number))
    frame.paste(middle.resize((20, 18)), (10, 9))
    return encode(frame, "PNG")


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_is_tested_anew_at_its_own_resolution_and_crop(registered, made_project, monkeypatch):
    """Of framed images that are labelled as it names their middle it names all rightly, shown as much of them."""
    mlflow_store.connect().set_model_version_tag(NAME, "1", "test_crop", "0.5")
    monkeypatch.setattr(student_project, "picture", framed)
    images, champion = write_images(registered.data / "prepare", lambda at: 0), make_network(made_project.pixels)
    rows = images.rows("test")
    with torch.inference_mode():
        whole, middle = (
            champion(CleanViews(images, RESOLUTION, crop)[in_order(rows, 1000)[0]].pixels).argmax(1).tolist()
            for crop in (1.0, 0.5)
        )
    assert whole != middle
    names = dict(zip(map(images.source, rows), middle, strict=True))
    registered.images = write_images(registered.data / "prepare", lambda at: names.get(f"{at}.png", 0))
    monkeypatch.setattr(student_project, "RESOLUTION", 24)
    registered.student(spoilt=0.5)
    registered.register()
    assert "does not beat version 1's 1.0000" in registered.versions()[2].tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_that_was_never_tested_is_tested_now(registered, capfd):
    """The alias was set by hand, on a version whose registering was broken off."""
    mlflow_store.connect().delete_model_version_tag(NAME, "1", "top1")
    registered.student(spoilt=1.0)
    registered.register()
    assert "the champion on these test images" in capfd.readouterr().err
    assert "does not beat version 1's 1.0000" in registered.versions()[2].tags["decision"]
    assert "other test images" not in registered.versions()[2].tags["decision"]


@pytest.mark.parametrize(
    ("classes", "decision"),
    [(["owl", "cat", "dog"], "does not beat version 1's 1.0000"), (["cat", "dog", "yak"], "lacks (1, such as 'owl')")],
)
@pytest.mark.usefixtures("no_onnx")
def test_classes_are_compared_by_name(registered, made_project, classes, decision):
    """Another order of classes makes no difference; a champion that knows a class which the challenger lacks stays."""
    order = {old: classes.index(name) if name in classes else 2 for old, name in enumerate(CLASSES)}
    registered.images = write_images(
        registered.data / "prepare", lambda at: order[made_project.labels[at]], classes=classes
    )
    registered.student(spoilt=0.5)
    registered.register()
    assert registered.aliases()["champion"] == 1
    assert decision in registered.versions()[2].tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_that_knows_a_class_without_test_images_is_not_replaced(project, made_project):
    """The test split is the same for both, and does not show the class."""
    shown = {at: label for at, label in made_project.labels.items() if label != 2}

    def put(classes, spoilt):
        project.images = write_images(project.data / "prepare", lambda at: shown.get(at, 0), classes=classes, count=24)
        return project.student(spoilt)

    put(CLASSES, spoilt=0.5)
    project.register()
    put([*CLASSES[:2], "yak"], spoilt=0.0)
    project.register()
    first, second = (project.versions()[number] for number in (1, 2))
    assert first.tags["digest.test"] == second.tags["digest.test"]
    assert project.aliases() == {"champion": 1, "challenger": 2}
    assert "knows classes that this one lacks (1, such as 'owl')" in second.tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_a_champion_whose_files_are_gone_is_replaced_and_said_to_be(project, capfd):
    project.register()
    shutil.rmtree("mlartifacts")
    project.student(spoilt=1.0)
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 2}
    assert "of the champion before, version 1, the files are gone" in capfd.readouterr().out


@pytest.mark.usefixtures("no_onnx")
def test_where_the_champion_was_deleted_the_best_of_the_others_takes_its_place(project, capfd):
    tops = []
    for spoilt in (0.0, 1.0, 100.0):
        tops.append(project.student(spoilt=spoilt))
        project.register()
    assert tops == sorted(tops, reverse=True)
    mlflow_store.connect().delete_model_version(NAME, "1")
    assert "champion" not in project.aliases()
    capfd.readouterr()
    project.register(if_missing=True)  # of the third, which is there
    assert project.aliases() == {"champion": 2, "challenger": 3}
    said = capfd.readouterr().out
    assert "lacks a champion" in said
    assert "version 2 is the champion now: there was none, and" in said
    assert "not promoted" in project.versions()[3].tags["decision"]

    mlflow_store.connect().delete_model_version(NAME, "2")
    assert project.student(spoilt=0.0) == 1.0
    project.register()
    assert project.aliases() == {"champion": 4, "challenger": 4}
    assert "beats version 3's" in project.versions()[4].tags["decision"]


@pytest.mark.usefixtures("no_onnx")
def test_a_version_without_a_card_is_not_the_best_of_those_that_are_left(project):
    project.register()
    mlflow_store.connect().delete_registered_model_alias(NAME, "champion")
    next(Path("mlartifacts").rglob("network.json")).unlink()
    project.student(spoilt=1.0)
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 2}


@pytest.mark.usefixtures("no_onnx")
def test_a_version_that_knows_other_classes_is_passed_over_and_one_that_cannot_be_asked_is_not(project, monkeypatch):
    project.register()
    mlflow_store.connect().delete_registered_model_alias(NAME, "champion")
    project.student(spoilt=1.0)

    def silent(client, version):
        raise ValueError("MLflow does not answer")

    monkeypatch.setattr(registry, "card_of", silent)
    with pytest.raises(ValueError, match="does not answer"):
        project.register()
    assert "champion" not in project.aliases()
    monkeypatch.setattr(registry, "card_of", lambda client, version: {"classes": [*CLASSES, "yak"]})
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 2}


@pytest.mark.usefixtures("no_onnx")
def test_the_margin_protects_a_champion_alone(project):
    project.student(spoilt=1.0)
    project.register()
    mlflow_store.connect().delete_registered_model_alias(NAME, "champion")
    assert project.student(spoilt=0.0) == 1.0
    project.register(margin=0.99)
    assert project.aliases() == {"champion": 2, "challenger": 2}


@pytest.mark.usefixtures("no_onnx")
def test_one_that_became_champion_meanwhile_stays_it_where_there_was_none(project, monkeypatch):
    for spoilt in (0.0, 1.0, 100.0):
        project.student(spoilt=spoilt)
        project.register()
    client, compare = mlflow_store.connect(), register._compare
    client.delete_registered_model_alias(NAME, "champion")

    def slowly(*arguments, **named):
        client.set_registered_model_alias(NAME, "champion", "2")
        return compare(*arguments, **named)

    monkeypatch.setattr(register, "_compare", slowly)
    project.register()
    assert project.aliases() == {"champion": 2, "challenger": 3}


@pytest.mark.parametrize(
    ("challenger", "champion", "margin", "promoted"),
    [
        (0.9, 0.8, 0.0, True),
        (0.8, 0.8, 0.0, False),
        (0.9, 0.8, 0.1, True),
        (0.9, 0.85, 0.1, False),
        (0.7, 0.8, -1.0, False),
    ],
)
def test_decide(challenger, champion, margin, promoted):
    assert register.decide(challenger, champion, margin) is promoted
