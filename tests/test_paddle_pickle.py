"""Reading pickles of arrays: as Paddle writes them, cut short, damaged and wicked; nothing of them is ever run."""

import builtins
import contextlib
import functools
import os
import pickle
import struct
import subprocess
from collections import OrderedDict

import numpy as np
import pytest
from pdparams import run, write

from models.paddle_pickle import read_arrays


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
