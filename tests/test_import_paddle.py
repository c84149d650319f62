"""Importing PaddleClas' weights: against PaddleClas' own outputs, and against files that are wrong or wicked."""

import contextlib
import json
import math
import os
import pickle
import re
import struct
import zlib
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import models
from models import import_paddle
from models.paddle_pickle import read_arrays

DATA = Path(os.environ.get("SSLD_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
REFERENCE = DATA.parent / "paddleclas_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=f"{REFERENCE} is not there")
NAMES = json.loads((REFERENCE / "state_dicts.json").read_text()) if REFERENCE.exists() else {}
WITH_LOGITS = sorted(np.load(REFERENCE / "logits.npz").files) if REFERENCE.exists() else []
LARGE = ("ResNet152_vd", "ResNet200_vd", "ResNeXt101_32x16d_wsl")


def paddle_weight(key, shape):
    """One tensor of the rule by which the reference's weights are made."""
    g = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if key.endswith("_variance"):
        value = g.uniform(0.5, 1.5, shape)
    elif key.endswith("_mean"):
        value = 0.1 * g.standard_normal(shape)
    elif len(shape) == 1 and key.endswith("weight"):
        value = 0.5 * g.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:
        value = 0.1 * g.standard_normal(shape)
    elif len(shape) == 4:
        value = g.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
    else:
        value = g.standard_normal(shape) * math.sqrt(1 / shape[0])
    return value.astype(np.float32)


def paddle_weights(name):
    return {key: paddle_weight(key, shape) for key, shape in NAMES[name]["state"].items()}


@cache
def small_weights():
    """ResNet18's, for whatever needs a whole network and no figures."""
    return paddle_weights("ResNet18")


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def run(file, model, output):
    return import_paddle.main([str(file), "--model", model, "-o", str(output)])


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


def in_the_older_style(weights, depths):
    """Rename `stem.0.conv.weight` to `conv1_1._conv.weight`, and so on."""

    def block(found):
        index = int(found[1])
        for stage, depth in enumerate(depths):
            if index < depth:
                return f"bb_{stage}_{index}."
            index -= depth
        raise AssertionError(found)

    renamed = {}
    for key, value in weights.items():
        new = re.sub(r"^stem\.(\d)", lambda found: f"conv1_{int(found[1]) + 1}", key)
        new = re.sub(r"^blocks\.(\d+)\.", block, new)
        new = re.sub(r"^fc\.", "out.", new)
        renamed[new.replace(".conv.", "._conv.").replace(".bn.", "._batch_norm.")] = value
    return renamed


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


# --- ways in which arrays are pickled


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i8", "|b1"])
def test_arrays_come_back_as_they_were(tmp_path, protocol, dtype):
    values = {
        "one": np.arange(24).reshape(2, 3, 4).astype(dtype),
        "transposed": np.asfortranarray(np.arange(6).reshape(2, 3)).astype(dtype, order="K"),
        "number": np.array(3, dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    for content in (values, OrderedDict(values), {key: (f"tensor_{key}", value) for key, value in values.items()}):
        found = read_arrays(write(tmp_path / "file.pdparams", content, protocol))
        assert list(found) == list(values)
        assert all(np.array_equal(found[key], values[key]) for key in values)
        assert all(found[key].dtype == values[key].dtype for key in values)


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
    "no classifier": (lambda w: {"a": w["fc.bias"]}, "ResNet18", r"has no classifier"),
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


def sample_bytes():
    return pickle.dumps({"fc.weight": np.ones((3, 4), "f4"), "fc.bias": np.arange(4, dtype="f4")}, 4)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole, file = sample_bytes(), tmp_path / "cut.pdparams"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pdparams: "):
            read_arrays(file)


def test_damaged_bytes_end_in_an_error_or_in_arrays(tmp_path):
    whole, file, g = sample_bytes(), tmp_path / "damaged.pdparams", np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for place in g.integers(len(whole), size=g.integers(1, 4)):
            damaged[place] = g.integers(256)
        file.write_bytes(damaged)
        try:
            found = read_arrays(file)
        except ValueError:
            continue
        assert all(isinstance(value, np.ndarray) for value in found.values())


# --- wicked files


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def wicked(mark):
    """Give pickles that would make the file `mark` if anything of them were run, or do other harm."""
    touch = f"open({str(mark)!r}, 'w')"
    array = np.zeros(3, "f4")
    import builtins
    import functools
    import subprocess

    yield from (
        pickle.dumps({"fc.bias": call}, protocol)
        for protocol in (0, 2, 4)
        for call in (
            Calls(os.system, f"touch {mark}"),
            Calls(os.mkdir, str(mark)),
            Calls(builtins.eval, touch),
            Calls(builtins.exec, touch),
            Calls(builtins.open, str(mark), "w"),
            Calls(subprocess.Popen, ["touch", str(mark)]),
            Calls(builtins.getattr, array, "tofile"),
            Calls(builtins.__import__, "os"),
            Calls(functools.partial, os.system),
            Calls(np.save, str(mark), array),
            Calls(OrderedDict, (), state=(None, {"__class__": dict})),
            [Calls(os.system, f"touch {mark}")],
            (Calls(os.system, f"touch {mark}"), array),
        )
    )
    # Paddle itself writes a static-graph tensor as eval("data", {"data": array}): not read, for it is still eval
    yield pickle.dumps({"fc.bias": Calls(builtins.eval, "data", {"data": array})}, 4)
    yield pickle.dumps({"fc.bias": np.array([Calls(os.system, f"touch {mark}")], object)}, 4)
    yield pickle.dumps({"fc.bias": np.zeros(2, [("a", "f4")])}, 4)
    yield pickle.dumps({"fc.bias": np.array(["text"])}, 4)
    yield f"(S'touch {mark}'\nios\nsystem\n.".encode()  # the instruction INST
    yield f"(cos\nsystem\nS'touch {mark}'\no.".encode()  # OBJ
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93" + f"S'touch {mark}'\n\x85R.".encode()
    yield b"\x80\x04\x8c\x05numpy\x8c\x10core.os.system\x93."  # a name with dots, which reaches into modules
    yield b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93."
    yield b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}X\x08\x00\x00\x00__code__K\x01sb."  # changes the reader
    yield b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + b"cbuiltins\ntuple\nK\x00\x85C\x01b\x87R."
    yield b"\x80\x02cnumpy\nndarray\nK\x01\x85R."
    yield b"\x80\x02P1\n."  # persistent ids
    yield b"\x80\x02\x82\x01."  # extension registry
    yield b"\x80\x04]\x94h\x00a000."  # nothing left to give
    yield b"\x80\x04}K\x01K\x02s."  # a key that is no text


@pytest.mark.parametrize("number", range(len(list(wicked("/nowhere")))))
def test_a_wicked_file_is_refused_and_not_run(number, tmp_path, capsys):
    mark, file = tmp_path / "mark", tmp_path / "wicked.pdparams"
    file.write_bytes(list(wicked(mark))[number])
    assert run(file, "ResNet18", tmp_path / "out.safetensors") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["wicked.pdparams"]


def test_a_refusal_names_what_was_wanted(tmp_path):
    file = write(tmp_path / "wicked.pdparams", {"fc.bias": Calls(os.system, "true")})
    with pytest.raises(ValueError, match=r"wants posix\.system: refused, and nothing of it was run"):
        read_arrays(file)


def test_a_small_file_cannot_ask_for_much_memory_or_time(tmp_path):
    def array_of(shape, content):
        reconstruct, dtype = np.zeros(1).__reduce__()[0], np.dtype("f4")
        return Calls(reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))

    nested = b"\x80\x04}N\x94" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(200))
    for content in (
        pickle.dumps({"fc.bias": array_of((10**6, 10**6), b"1234")}, 4),
        pickle.dumps({"fc.bias": array_of((-1,), b"1234")}, 4),
        pickle.dumps({"fc.bias": array_of((10**5000,), b"1234")}, 4),
        b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"short",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"short",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"short",
        b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
        nested + b"K\x01s.",  # a key whose hash would take 2 ** 200 steps
    ):
        file = tmp_path / "wicked.pdparams"
        file.write_bytes(content)
        with contextlib.suppress(ValueError):
            assert read_arrays(file) == {}
