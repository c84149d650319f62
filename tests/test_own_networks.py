"""Networks of one's own: what models/own.py asks of them is enough, and what is wrong with one is a line."""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow.pytorch
import pytest
import timm
import torch
import yaml
from images import ROOT, tiny
from runs import MODEL, run
from timm.models import register_model
from torch import nn

import models
from pipeline import teacher
from pipeline.core import networks, weights
from pipeline.core.network_checks import check_takes
from pipeline.core.results import registry
from pipeline.core.running import preflight


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
    torch.manual_seed(0)
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
    # close: convolutions of small maps are computed in another way
    torch.testing.assert_close(features, own.maps(taught.normalise(pixels)).flatten(1))
    assert torch.equal(logits, own.head(features))
    assert torch.equal(taught(pixels), logits)
    assert not models.has_pretrained(f"own_{kind}")
    check_takes(networks.build(f"own_{kind}", 4, seed=0), f"own_{kind}", 16, 4)  # as of a student


def test_a_network_of_ones_own_learns_and_is_packed(images, tmp_path):
    training = run(images, tmp_path / "run", model="own_dict", epochs=6, lr=0.01)
    training.train()
    assert training.history[-1]["train_loss"] < 0.97 * training.history[0]["train_loss"]
    registry.pack(tmp_path / "packed", training.classifier, 16, list(images.classes))
    packed = mlflow.pytorch.load_model(str(tmp_path / "packed"))
    pixels = torch.rand(3, 3, 16, 16) * 255
    torch.testing.assert_close(packed(pixels), training.classifier(pixels), rtol=1e-4, atol=1e-4)


def test_features_of_several_positions_are_averaged():
    class Squeeze(nn.Module):
        """Its classifier is a convolution of all positions, as SqueezeNet's."""

        def __init__(self):
            super().__init__()
            self.maps, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return self.head(self.maps(x)).mean((2, 3))

    classifier = networks.Classifier(Squeeze())
    pixels = torch.rand(2, 3, 8, 8) * 255
    logits, features = classifier.embed(pixels)
    torch.testing.assert_close(features, classifier.network.maps(classifier.normalise(pixels)).mean((2, 3)))
    assert torch.equal(logits, classifier(pixels))


class View(Own):
    def forward(self, x):
        return self.head(self.maps(x).view(len(x), -1))


class ByValues(Own):
    def forward(self, x):
        maps = self.maps(x)
        return self.head(maps.flatten(1)) * (2 if maps.mean().item() > 0 else 1)


class NoBuffer(Own):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.kept = torch.zeros(24)

    def forward(self, x):
        return self.head(self.maps(x).flatten(1) + self.kept)


class HeadNotCalled(Own):
    def forward(self, x):
        return nn.functional.linear(self.maps(x).flatten(1), self.head.weight)


class OtherLinearLast(Own):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.before = nn.Linear(24, 24)

    def forward(self, x):
        return self.head(self.before(self.maps(x).flatten(1)))


class NoClassifier(Own):
    def get_classifier(self):
        return None


class Grey(Own):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.maps[0] = nn.Conv2d(1, 6, 3, stride=2)


class Broken(Own):
    def __init__(self, num_classes):
        raise KeyError("cfg")


class OneByOne(Own):
    def forward(self, x):
        return torch.cat([self.head(self.maps(image[None]).flatten(1)) for image in x])


WRONG = {
    "without pretrained": (
        lambda num_classes=1000: Own(num_classes),
        "cannot be built (TypeError: *'pretrained'*): it takes (pretrained=False, num_classes=1000, **kwargs), *",
    ),
    "without the rest": (
        lambda pretrained=False, num_classes=1000: Own(num_classes),
        "cannot be built (TypeError: *): it takes (pretrained=False, num_classes=1000, **kwargs), as timm calls it*",
    ),
    "gives nothing": (lambda **_: None, "cannot be built (AttributeError: *, and gives a network"),
    "gives a class": (lambda **_: Own, "cannot be built (TypeError: *, and gives a network"),
    "breaks": (lambda **_: Broken(10), "cannot be built (KeyError: 'cfg'): *"),
    "other classes": (
        lambda **_: Own(7),
        "*: its last nn.Linear makes 7 numbers, not 10: pass num_classes on, or give *",
    ),
    "another Linear last": (lambda **_: OtherLinearLast(10), "*: its last nn.Linear makes 24 numbers, not 10: *"),
    "no classifier": (
        lambda **_: NoClassifier(10),
        "has no last layer, no nn.Linear nor a method get_classifier; mend *",
    ),
    "a dict without logits": (
        lambda **_: Own(10, lambda logits: {"scores": logits}),
        "cannot be asked (KeyError: 'logits'); mend it in models/own.py, which says what a network must be",
    ),
    "an object without logits": (
        lambda **_: Own(10, lambda logits: SimpleNamespace(scores=logits)),
        "cannot be asked (TypeError: it answers with SimpleNamespace, not with logits); mend it*",
    ),
    "logits second": (
        lambda **_: Own(10, lambda logits: (None, logits)),
        "cannot be asked (TypeError: it answers with NoneType, not with logits); mend it*",
    ),
    "grey": (lambda **_: Grey(10), "does not take images of 16 pixels: *channel*"),
    "a view of maps": (lambda **_: View(10), "fails on black images of 16 pixels (RuntimeError: view size is not *"),
    "ends in a softmax": (
        lambda **_: Own(10, lambda logits: logits.softmax(1)),
        "answers with probabilities, not with logits: leave out the softmax at its end",
    ),
    "depends on values": (
        lambda **_: ByValues(10),
        "cannot be asked without computing (*): what it does must not depend on values of pixels*",
    ),
    "a tensor that is no buffer": (
        lambda **_: NoBuffer(10),
        "cannot be asked without computing (*): *, and its tensors must be parameters or buffers*",
    ),
    "breaks when asked": (lambda **_: Own(10, lambda logits: 1 // 0), "cannot be asked (ZeroDivisionError: *"),
    "an image at a time": (
        lambda **_: OneByOne(10),
        "cannot be exported, so it could not be registered (*specialized*)",
    ),
    "last layer not called": (lambda **_: HeadNotCalled(10), "cannot be asked (LookupError: its last layer is not *"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_network_of_ones_own_is_found_before_anything_runs(tmp_path, monkeypatch, name):
    function, line = WRONG[name]
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "own_wrong", function)
    monkeypatch.setattr(timm, "list_models", lambda *args, **kwargs: ["own_wrong", MODEL])
    settings = tiny(**{"teacher.model": MODEL, "student.model": "own_wrong"})
    with pytest.raises(ValueError) as error:
        preflight.check_networks(settings, tmp_path)
    said = str(error.value)
    assert said.startswith(("student.model: own_wrong", "student.model, views.resolution: own_wrong"))
    assert fnmatch.fnmatchcase(said.partition("own_wrong")[2], f"{'' if line[0] == '*' else ' '}{line}"), said
    assert "\n" not in said


def test_what_is_right_passes(tmp_path):
    preflight.check_networks(tiny(**{"teacher.model": "own_object", "student.model": "own_dict"}), tmp_path)


def test_first_weights_of_a_network_that_does_not_say_how_pixels_are_normalised_are_refused(tmp_path):
    torch.save(Own().state_dict(), tmp_path / "own.pth")
    with pytest.raises(
        ValueError, match=r"^own_tensor does not say how pixels are normalised .*: give it pretrained_cfg$"
    ):
        networks.build("own_tensor", 4, seed=0, init=str(tmp_path / "own.pth"))


@pytest.mark.parametrize(
    "line", ["import mynets", "from mynets import Net", "from models.mine import Net", "from .mine import Net"]
)
def test_code_that_dvc_would_not_see_is_refused(tmp_path, line):
    for name in ("mynets.py", "models/mine.py", "models/blocks.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with_it = {"deps": ["models/own.py", "models/blocks.py"]}
    stages = {"teacher": with_it, "score": with_it, "mine": {"deps": ["models/mine.py"]}, "digits": {"cmd": "true"}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "models/own.py").write_text("import torchvision\nfrom models import blocks\n")
    preflight.check_own_file(tmp_path)
    (tmp_path / "models/own.py").write_text(f"import torchvision\n{line}\n")
    (tmp_path / "dvc.yaml").write_text("<<<<<<< HEAD\nstages: {}\n")
    with pytest.raises(ValueError, match=r"^dvc.yaml: not YAML: .*$"):
        preflight.check_own_file(tmp_path)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(
        ValueError, match=r"^models/own.py imports m.*, whose changes DVC would not see: have its code in"
    ):
        preflight.check_own_file(tmp_path)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("teacher", "import no_such_module"),
        ("core.running.preflight", "def network(:"),
        ("core.running.preflight", "raise KeyError('x')"),
    ],
)
def test_what_keeps_the_file_from_being_imported_is_a_line(tmp_path, module, line):
    for name in ("pipeline", "models", "params.yaml", "dvc.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "models/own.py").open("a") as file:
        file.write(f"\n{line}\n")
    command = [sys.executable, "-m", f"pipeline.{module}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = f"{module.rpartition('.')[2]}: error: models/own.py cannot be imported: "
    assert re.fullmatch(re.escape(said) + r"\w+Error: .*\n", done.stderr), done.stderr


def test_features_of_a_linear_layer_are_its_last_dimension():
    class Pooled(Own):
        """Its last layer sees maps, channels last, which are pooled behind it."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.maps(x).permute(0, 2, 3, 1)).mean((1, 2))

    classifier = networks.Classifier(Pooled())
    pixels = torch.rand(2, 3, 16, 16) * 255
    features = classifier.embed(pixels)[1]
    torch.testing.assert_close(features, classifier.network.maps(classifier.normalise(pixels)).mean((2, 3)))


def test_a_network_whose_own_keys_are_as_a_wrappers_reads_its_weights(tmp_path):
    class Wrapped(Own):
        def state_dict(self, *args, **kwargs):
            return {f"module.{key}": value for key, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state, *args, **kwargs):
            return super().load_state_dict({key.removeprefix("module."): value for key, value in state.items()})

    made, other = Wrapped(), Wrapped()
    weights.save(tmp_path / "w.safetensors", made.state_dict())
    weights.load(other, tmp_path / "w.safetensors")
    assert torch.equal(other.head.weight, made.head.weight)


def test_an_error_while_a_network_runs_is_none_of_its_import(tmp_path):
    (tmp_path / "models").mkdir()
    program = (
        "import sys; sys.argv = ['-m']; import pipeline, pathlib\n"
        f"pipeline.OWN = pathlib.Path({str(tmp_path / 'models/own.py')!r})\n"
        "code = compile('def forward(): raise KeyError(1)', str(pipeline.OWN), 'exec'); found = {}\n"
        "exec(code, found); found['forward']()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "cannot be imported" not in done.stderr
    assert "KeyError" in done.stderr


def test_a_forgotten_decorator_is_named(monkeypatch):
    monkeypatch.setattr(models.own, "forgotten", Own, raising=False)
    with pytest.raises(ValueError, match=r"^'forgotten': is in models/own.py, but .* takes @register_model above it$"):
        models.build("forgotten")
