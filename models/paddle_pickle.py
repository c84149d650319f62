"""Read the arrays of a .pdparams file, which is a pickle, without running anything of it.

A pickle is a program: it may name any function and call it. This reader knows the few instructions that `paddle.save`
needs for a dict of arrays (pickle protocols 2 to 4), and puts stand-ins of its own for the few names that such a file
uses. Anything else is refused before it happens; numpy itself never sees what the file says about an array until it
has been checked.
"""

import codecs
import math
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

NAMES = "StructuredToParameterName@@"  # Paddle's own table of parameter names, which says nothing about the arrays

INSTRUCTIONS = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


class _Refused(Exception):
    """A file is whole, as far as is known, and holds what is not taken."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays that a file holds, by their keys. They may be read-only.

    Raises:
        ValueError: it is no such file, it is cut short or damaged, or it holds anything but arrays.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as handle:
        try:
            content = _Reader(handle, encoding="latin1").load()  # latin1: how Python 2 wrote bytes
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from None
        except OSError:
            raise
        except MemoryError:  # damaged bytes may say anything of an array's size
            raise ValueError(f"{path}: asks for more memory than is free: too large, or damaged") from None
        except Exception as error:  # such bytes end in every kind of error there is
            raise ValueError(
                f"{path}: cut short, damaged, or not a .pdparams file of arrays; fetch it again"
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dict of arrays")
    content.pop(NAMES, None)
    return {key: _array(key, value, path) for key, value in content.items()}


def _array(key: str, value: Any, path: Path) -> np.ndarray:
    if isinstance(value, tuple) and len(value) == 2:  # how Paddle saves a tensor that is not in a state dict
        value = value[1]
    if not isinstance(value, _Array) or value.array is None:
        raise ValueError(f"{path}: {key[:100]} is no array; a state dict of a network is wanted")
    return value.array


class _DType:
    """Stands in for numpy.dtype: plain numbers only."""

    def __init__(self, code: str, align: Any = False, copy: Any = True):
        if not re.fullmatch(r"[fiub]\d{1,2}", code):
            raise _Refused(f"holds an array of {code[:20]!r}, not of numbers: refused")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *parts = state
        if parts[:3] != [None, None, None]:
            raise _Refused("holds an array of records, not of numbers: refused")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for numpy.ndarray, as pickle builds it: first empty, then filled."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _DType) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise _Refused("holds an array of an impossible type or shape: refused")
        content = content.encode("latin1") if isinstance(content, str) else content
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise _Refused(f"an array of shape {shape} has {len(content)} bytes: damaged")
        flat = np.frombuffer(content, kind.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


_NDARRAY = object()  # what a file hands to _reconstruct; it is never called


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("holds another kind of array: refused")
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _Refused(f"holds bytes encoded as {str(encoding)[:20]!r}: refused")
    return codecs.latin_1_encode(text)[0]  # how protocol 2 writes bytes


def _bytes() -> bytes:
    return b""  # how protocol 2 writes no bytes at all


def _dict(pairs: Any = ()) -> dict[str, Any]:
    return {_key(key): value for key, value in pairs}


def _key(key: Any) -> str:
    # before it is hashed: nested tuples could be made to take for ever
    if not isinstance(key, str):
        raise _Refused("holds a dict whose keys are no text: refused")
    return key


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _dict,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,
}


def _refuse(reader: "_Reader") -> None:
    raise _Refused("holds more than arrays: refused, and nothing of it was run")


_KNOWN = {getattr(pickle, name)[0] for name in INSTRUCTIONS}


class _Reader(pickle._Unpickler):  # the one in Python: its table can be cut down, and its memory grows as it is used
    dispatch: ClassVar[dict[int, Any]] = {
        code: run if code in _KNOWN else _refuse for code, run in pickle._Unpickler.dispatch.items()
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(f"wants {module}.{name}"[:120] + ": refused, and nothing of it was run")
        return ALLOWED[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType):
            raise _Refused("wants to change what is no array: refused, and nothing of it was run")
        self.stack[-1].__setstate__(state)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_dict(zip(items[::2], items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update({_key(key): value})

    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem}
