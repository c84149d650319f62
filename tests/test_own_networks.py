"""Networks of one's own: what models/own.py asks of them is enough, and what is wrong with one is a line."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from images import tiny
from timm.models import register_model
from torch import nn

import models
from pipeline import teacher
from pipeline.core import networks, preflight


class Own(nn.Module):
    """As models/own.py says that a network must be which timm does not have."""

    def __init__(self, num_classes=4, answer=lambda logits: logits):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(24, num_classes)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.head(self.maps(x).flatten(1)))


ANSWERS = {
    "tensor": lambda logits: logits,
    "dict": lambda logits: {"loss": None, "logits": logits},
    "tuple": lambda logits: (logits, None),
    "object": lambda logits: SimpleNamespace(logits=logits),
}
for kind, answer in ANSWERS.items():

    def own_network(pretrained=False, num_classes=1000, answer=answer, **kwargs):
        return Own(num_classes, answer)

    own_network.__name__ = f"own_{kind}"
    register_model(own_network)


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_network_of_ones_own_may_teach(images, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(teacher, "ENOUGH_TO_TRY", 17)  # it guesses
    monkeypatch.chdir(tmp_path)
    own = Own()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    wanted = {"source": "checkpoint", "model": f"own_{kind}", "checkpoint": str(tmp_path / "own.pth")}
    with pytest.raises(ValueError, match=r"^own_.* does not say how its pixels are normalised: set teacher.mean and"):
        teacher.take(tiny(**{f"teacher.{key}": value for key, value in wanted.items()}), images, torch.device("cpu"))
    wanted |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    settings = tiny(**{f"teacher.{key}": value for key, value in wanted.items()})
    teacher.take(settings, images, torch.device("cpu"))
    taught, card = networks.load(Path("data/teacher"))
    assert (card["model"], card["mean"], card["std"]) == (f"own_{kind}", [0.5] * 3, [0.25] * 3)
    pixels = torch.rand(2, 3, 16, 16) * 255
    logits, features = taught.embed(pixels)
    assert torch.equal(features, own.maps(taught.normalise(pixels)).flatten(1))
    assert torch.equal(logits, own.head(features))
    assert torch.equal(taught(pixels), logits)
    assert not models.has_pretrained(f"own_{kind}")
    networks.check_takes(networks.build(f"own_{kind}", 4, seed=0), f"own_{kind}", 16, 4)  # as of a student


def wrong(name):
    """A function that makes a network of one's own, with something wrong with it."""
    own, later = Own(), []

    class Bad(Own):
        def __init__(self):
            super().__init__()
            self.kept = torch.zeros(24)

        def forward(self, x):
            maps = self.maps(x)
            if name == "view":
                return self.head(maps.view(len(x), -1))
            if name == "values" and maps.mean().item() > 0:
                maps = maps * 2
            features = maps.flatten(1) + (self.kept if name == "no buffer" else 0)
            return nn.functional.linear(features, self.head.weight) if name == "not called" else self.head(features)

    def with_none():
        own.get_classifier = lambda: None
        return own

    return {
        "no pretrained": lambda num_classes=1000: own,
        "no others": lambda pretrained=False, num_classes=1000: own,
        "nothing": lambda *args, **kwargs: later.append(own),
        "a class": lambda *args, **kwargs: Own,
        "other classes": lambda *args, **kwargs: Own(7),
        "another dict": lambda *args, **kwargs: Own(4, lambda logits: {"scores": logits}),
        "no classifier": lambda *args, **kwargs: with_none(),
        "grey": lambda *args, **kwargs: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(784, 4)),
    }.get(name, lambda *args, **kwargs: Bad())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("no pretrained", "cannot be built: *'pretrained'; its function takes (pretrained=False, num_classes=1000, *"),
        (
            "no others",
            "cannot be built: *; its function takes (pretrained=False, num_classes=1000, **kwargs), as timm*",
        ),
        ("nothing", "cannot be built: *"),
        ("a class", "cannot be built: *"),
        ("other classes", "gives (1, 7) for an image and 4 classes; mend it in models/own.py"),
        ("another dict", "cannot be asked (KeyError: 'logits'); mend it in models/own.py"),
        ("no classifier", "has not one classifier, but none; mend it in models/own.py"),
        ("grey", "does not take images of 16 pixels: *channel*"),
        ("values", "cannot be asked without computing (*): what it does must not depend on values of pixels*"),
        ("no buffer", "cannot be asked without computing (*): *, and its tensors must be parameters or buffers*"),
        ("not called", "cannot be asked (IndexError: *"),
    ],
)
def test_what_is_wrong_with_a_network_of_ones_own_is_a_line(monkeypatch, name, line):
    made = wrong(name)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "own_wrong", made)
    monkeypatch.setattr(timm, "list_models", lambda *args, **kwargs: ["own_wrong"])
    with pytest.raises(ValueError) as error:
        networks.check_takes(networks.build("own_wrong", 4, seed=0), "own_wrong", 16, 4)
    assert fnmatch.fnmatchcase(str(error.value), f"own_wrong {line}"), error.value
    assert "\n" not in str(error.value)


def test_a_view_of_maps_is_found_before_anything_runs(monkeypatch):
    """Made of contiguous maps it works, and nothing on the meta device shows what it is on channels-last ones."""
    preflight.try_out("own_tensor", 16)
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "own_wrong", wrong("view"))
    monkeypatch.setattr(timm, "list_models", lambda *args, **kwargs: ["own_wrong"])
    networks.check_takes(networks.build("own_wrong", 4, seed=0), "own_wrong", 16, 4)
    with pytest.raises(ValueError, match=r"^own_wrong fails on black images of 16 pixels \(RuntimeError: view size is"):
        preflight.try_out("own_wrong", 16)
