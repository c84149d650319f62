"""Files of weights: from other programs, of other networks, damaged, and with more in them than data."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from pipeline.core import networks, weights
from pipeline.core.network_checks import check_takes


def test_weights_that_do_not_fit_say_what_to_do(tmp_path):
    classifier = networks.build("ResNet18_vd", 4, seed=3)
    networks.save(tmp_path, classifier, {"model": "ResNet18_vd", "classes": list("abcd"), "resolution": 16})
    file = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match=r"made for 4 classes, but the data has 6.*teacher.source: fit"):
        weights.load(networks.build("ResNet18_vd", 6, 0).network, file, ("ResNet18_vd", 6))
    with pytest.raises(ValueError, match="of another network"):
        weights.load(networks.build("ResNet34_vd", 4, 0).network, file, ("ResNet34_vd", 4))
    wider = {**classifier.network.state_dict(), "fc.weight": torch.zeros(6, 500), "fc.bias": torch.zeros(6)}
    torch.save(wider, tmp_path / "wider.pth")
    with pytest.raises(ValueError, match=r"of another network: fc.weight is \(6, 500\), not \(4, 512\)"):
        networks.build("ResNet18_vd", 4, seed=0, init=str(tmp_path / "wider.pth"))
    with pytest.raises(ValueError, match="no such file"):
        weights.load(classifier.network, Path("nowhere.pth"))
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.load(classifier.network, file)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        weights.load(classifier.network, tmp_path)
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match=r"not a state dict of tensors; it holds .*: save the network's state_dict"):
        weights.load(classifier.network, tmp_path / "numbers.pth")
    torch.save({**classifier.network.state_dict(), "fc.weight": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    with pytest.raises(ValueError, match=r"of another network: fc.weight is \(\), not \(4, 512\)"):
        weights.load(classifier.network, tmp_path / "scalar.pth", ("ResNet18_vd", 4))
    torch.save({**classifier.network.state_dict(), "fc.bias": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    with pytest.raises(ValueError, match=r"of another network: fc.bias is \(\), not \(4,\)"):
        weights.load(classifier.network, tmp_path / "scalar.pth", ("ResNet18_vd", 4))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("length", "words"),
    [
        (None, "it is a TorchScript program; save the network's state_dict() alone"),
        (0, "it is empty or cut short"),
        (100, "PytorchStreamReader failed reading zip archive: failed finding central directory"),
    ],
)
def test_a_program_and_what_was_left_of_a_file_are_no_weights(tmp_path, recwarn, length, words):
    file = tmp_path / "weights.pt"
    network = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.script(network), file)
    file.write_bytes(file.read_bytes()[:length])
    recwarn.clear()
    with pytest.raises(ValueError) as refused:
        weights.load(network, file)
    assert str(refused.value) == f"{file}: cannot be read as weights: {words}"
    assert not recwarn


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "student.model."])
def test_weights_of_a_wrapped_network_are_its_own(tmp_path, prefix):
    state = networks.build("test_resnet", 4, seed=3).network.state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pth")
    network = networks.build("test_resnet", 4, seed=0).network
    weights.load(network, tmp_path / "weights.pth")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_averaged_weights_may_stand_alone(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(networks.build("test_resnet", 4, seed=3).network)
    torch.save(average.state_dict(), tmp_path / "weights.pth")
    network = networks.build("test_resnet", 4, seed=0).network
    weights.load(network, tmp_path / "weights.pth")
    assert torch.equal(network.fc.weight, average.module.fc.weight)


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema")])  # timm's, torchvision's
def test_of_two_sets_of_weights_the_average_is_taken_and_named(tmp_path, capsys, names):
    plain, average = (networks.build("test_resnet", 4, seed).network.state_dict() for seed in (3, 4))
    wrapped = {"n_averaged": torch.tensor(9)} | {f"module.{key}": value for key, value in average.items()}
    others = {"epoch": 7, "args": argparse.Namespace(lr=0.1), "lr_scheduler": {"milestones": Counter([30])}}
    numpys = {"metric": np.float64(93.2), "best": np.float32(1), "random": np.random.get_state()}
    torch.save({names[0]: plain, names[1]: wrapped, **others, **numpys}, tmp_path / "weights.pth")
    network = networks.build("test_resnet", 4, seed=0).network
    weights.load(network, tmp_path / "weights.pth")
    assert all(torch.equal(value, average[key]) for key, value in network.state_dict().items())
    said = f"holds {names[1]}, {names[0]}; the weights are those of {names[1]}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_of_a_transformer_for_another_image_size_say_what_to_do(tmp_path, model):
    size = 96 if model.startswith("vit") else 128
    weights.save(tmp_path / "w.safetensors", timm.create_model(model, img_size=size, num_classes=4).state_dict())
    with pytest.raises(ValueError, match=r"of another network: .* is .*, not .*; if it is this network for another im"):
        networks.build(model, 4, 0, init=str(tmp_path / "w.safetensors"))
    built = networks.Classifier(timm.create_model(model, img_size=size, num_classes=4))
    with pytest.raises(ValueError, match=rf"does not take images of 32 pixels: .*; it was made for {size}$"):
        check_takes(built, model, 32, 4)


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_that_is_more_than_tensors_is_refused(tmp_path, capsys):
    classifier = networks.build("ResNet18_vd", 4, seed=3)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": classifier.network.state_dict(), "evil": Evil()}, file)
    with pytest.raises(ValueError, match="holds more than data"):
        weights.load(classifier.network, file)
    assert "this ran" not in capsys.readouterr().out
    torch.save({"state_dict": classifier.network.state_dict()}, file)
    weights.load(networks.build("ResNet18_vd", 4, seed=5).network, file)
