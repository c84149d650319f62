"""Importing PaddleClas' weights: against PaddleClas' own outputs, and with files and names that are wrong."""

import re

import numpy as np
import pytest
import torch
from pdparams import (
    LARGE,
    NAMES,
    REFERENCE,
    WITH_LOGITS,
    in_the_older_style,
    needs_reference,
    paddle_weights,
    run,
    small_weights,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file

import models
from models import import_paddle
from models.paddle_pickle import read_arrays


def outline(name, num_classes=1000):
    with torch.device("meta"):
        return models.build(name, num_classes=num_classes)


def logits_differ(name, state):
    """The largest difference from PaddleClas' logits for the same weights and input."""
    network = outline(name)
    network.load_state_dict(state, assign=True)
    x = np.random.Generator(np.random.PCG64(7)).standard_normal((2, 3, 97, 97)).astype(np.float32)
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(x)).numpy()
    return np.abs(found - np.load(REFERENCE / "logits.npz")[name]).max()


# --- against PaddleClas


@needs_reference
@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_its_place(name):
    network = outline(name)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items() if "num_batches" not in key}
    found = {import_paddle.timm_key(key, network): tuple(shape) for key, shape in NAMES[name]["state"].items()}
    found["fc.weight"] = found["fc.weight"][::-1]
    assert len(found) == len(NAMES[name]["state"])
    assert found == wanted


@needs_reference
@pytest.mark.parametrize("name", [name for name in WITH_LOGITS if name not in LARGE])
def test_logits_equal_paddleclas(name, tmp_path, capsys):
    protocol = 2 if name == "ResNet18" else 4
    file = write(tmp_path / "weights.pdparams", paddle_weights(name), protocol)
    assert run(file, name, tmp_path / "out.safetensors") == 0
    parameters = NAMES[name]["learnable_parameters"]
    assert f"{parameters:,} parameters, 1,000 classes" in capsys.readouterr().out
    assert logits_differ(name, load_file(tmp_path / "out.safetensors")) <= 1e-4


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_logits_of_large_networks_equal_paddleclas(name):
    # without files of up to 777 MB, which would say nothing more than the smaller networks' files
    state = import_paddle.convert(paddle_weights(name), outline(name))
    assert logits_differ(name, state) <= 1e-4


@needs_reference
def test_both_naming_styles_give_the_same():
    weights, network = paddle_weights("ResNet50_vd"), outline("ResNet50_vd")
    older = in_the_older_style(weights, (3, 4, 6, 3))
    assert "conv1_1._conv.weight" in older
    assert "bb_3_2.conv2._batch_norm._variance" in older
    one, other = import_paddle.convert(weights, network), import_paddle.convert(older, network)
    assert one.keys() == other.keys() == network.state_dict().keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@needs_reference
def test_files_of_paddle_itself_are_read():
    expected = np.load(REFERENCE / "sample.npz")
    sample = read_arrays(REFERENCE / "sample.pdparams")
    assert sample.keys() == set(expected.files)
    for key, value in sample.items():
        assert value.dtype == expected[key].dtype
        assert np.array_equal(value, expected[key])
    assert {key: value.shape for key, value in read_arrays(REFERENCE / "layer.pdparams").items()} == {
        "fc.weight": (8, 5),
        "fc.bias": (5,),
    }


def test_a_linear_layer_is_transposed_and_counters_are_made(tmp_path):
    if not NAMES:
        pytest.skip("no reference")
    weights = small_weights()
    file = write(tmp_path / "weights.pdparams", weights)
    assert run(file, "ResNet18", tmp_path / "new" / "out.safetensors") == 0
    state = load_file(tmp_path / "new" / "out.safetensors")
    assert np.array_equal(state["fc.weight"].numpy(), weights["fc.weight"].T)
    assert np.array_equal(state["bn1.running_var"].numpy(), weights["stem.0.bn._variance"])
    assert state["bn1.num_batches_tracked"] == 0
    models.build("ResNet18").load_state_dict(state)
    with safe_open(tmp_path / "new" / "out.safetensors", "pt") as opened:
        assert "ResNet18 from weights.pdparams, SHA-256 " in opened.metadata()["imported"]


@needs_reference
def test_the_same_file_gives_the_same_bytes_and_any_number_of_classes(tmp_path):
    weights = small_weights() | {"fc.weight": np.ones((512, 7), "f4"), "fc.bias": np.ones(7, "f4")}
    file = write(tmp_path / "weights.pdparams", weights)
    for name in ("a", "b"):
        assert run(file, "ResNet18", tmp_path / f"{name}.safetensors") == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_file(tmp_path / "a.safetensors")["fc.weight"].shape == (7, 512)


# --- mistakes: one line, and status 1


def without(weights, key):
    return {name: value for name, value in weights.items() if name != key}


MISTAKES = {
    "another model": (lambda w: w, "ResNet50_vd", r"not the weights of ResNet50_vd: .*it fits ResNet18$"),
    "a deeper model": (lambda w: w, "ResNet34", r"15 tensors too many .*lacks 95 .*it fits ResNet18$"),
    "no such model": (lambda w: w, "ResNet81", r"'ResNet81': no such network; the nearest are ResNet18"),
    "a model of another kind": (lambda w: w, "vit_tiny_patch16_224", r"vit_tiny_patch16_224: no network that"),
    "a missing key": (lambda w: without(w, "stem.0.bn._mean"), "ResNet18", r"lacks 1 .*bn1\.running_mean"),
    "a surplus key": (lambda w: w | {"extra.weight": w["fc.bias"]}, "ResNet18", r"1 tensors too many .*extra\.weight"),
    "a block too many": (
        lambda w: w | {"blocks.8.conv0.conv.weight": w["fc.bias"]}, "ResNet18", r"too many .*blocks\.8\.conv0"
    ),
    "a wrong shape": (
        lambda w: w | {"stem.0.bn.bias": np.zeros(65, "f4")}, "ResNet18", r"stem\.0\.bn\.bias of shape \(65,\).*\(64,\)"
    ),
    "a classifier not transposed": (
        lambda w: w | {"fc.weight": w["fc.weight"].T}, "ResNet18", r"fc\.weight of shape \(1000, 512\).*\(512, 1000\)"
    ),
    "two of one": (
        lambda w: w | {"out.bias": w["fc.bias"]}, "ResNet18", r"two tensors for the same place, one of them out\.bias"
    ),
    "whole numbers": (lambda w: w | {"fc.bias": np.zeros(1000, "i8")}, "ResNet18", r"fc\.bias of type int64"),
    "no last layer": (lambda w: {"a": w["fc.bias"]}, "ResNet18", r"has no last layer"),
    "values that are not finite": (
        lambda w: w | {"fc.bias": np.full(1000, np.nan, "f4")}, "ResNet18", r"fc\.bias has values that are not finite$"
    ),
    "no arrays": (lambda w: {"fc.bias": "text"}, "ResNet18", r"fc\.bias is no array"),
    "no dict": (lambda w: [1, 2], "ResNet18", r"holds a list"),
}  # fmt: skip


@needs_reference
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, tmp_path, capsys):
    change, model, message = MISTAKES[mistake]
    file = write(tmp_path / "weights.pdparams", change(dict(small_weights())))
    assert run(file, model, tmp_path / "out.safetensors") == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("import_paddle: error: ")
    assert error.count("\n") == 1
    assert re.search(message, error.strip()), error
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pdparams"], "something was written"


@needs_reference
def test_a_network_that_differs_in_shapes_alone_is_told_apart():
    weights = {
        key: np.broadcast_to(np.float32(0), shape) for key, shape in NAMES["ResNeXt101_32x8d_wsl"]["state"].items()
    }
    with pytest.raises(
        ValueError, match=r"_conv1_0\._conv0\._conv\.weight of shape \(256, .*\(512, 64, 1, 1\) is wanted"
    ):
        import_paddle.convert(weights, outline("ResNeXt101_32x16d_wsl"))
    assert import_paddle.fitting(weights, 1000) == ["ResNeXt101_32x8d_wsl"]


def test_files_that_are_not_there_or_no_pdparams(tmp_path, capsys):
    (tmp_path / "text.pdparams").write_text("hello")
    (tmp_path / "empty.pdparams").write_bytes(b"")
    (tmp_path / "page.pdparams").write_text("<html>404</html>")
    for name in ("missing.pdparams", "text.pdparams", "empty.pdparams", "page.pdparams", "."):
        assert run(tmp_path / name, "ResNet18", tmp_path / "out.safetensors") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(tmp_path) in error
    write(tmp_path / "fine.pdparams", {"fc.bias": np.zeros(3, "f4")})
    assert run(tmp_path / "fine.pdparams", "ResNet18", tmp_path / "out.pth") == 1
    assert ".safetensors" in capsys.readouterr().err


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as stopped:
        import_paddle.main(["--help"])
    assert stopped.value.code == 0
    assert "ResNet50_vd_ssld_pretrained.pdparams --model ResNet50_vd_ssld" in capsys.readouterr().out
