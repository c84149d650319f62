"""State dicts as files: what comes from outside is checked, and nothing of it is run."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from pipeline.core import atomic, errors

# Keys under which checkpoints of trainings hold the weights; first the averaged ones, which timm and torchvision score.
HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
COUNTED = "n_averaged"  # what torch's AveragedModel has beside the weights
# What trainings put beside the weights, of no use here: numpy's numbers and arrays; torch unpickles none by itself.
NUMPYS = [f"numpy.{core}.multiarray.{it}" for core in ("core", "_core") for it in ("scalar", "_reconstruct")]
UNREAD = ("numpy.dtype", "numpy.ndarray", *NUMPYS)


def save(file: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict of contiguous tensors as a .safetensors file.

    Raises:
        OSError: the disk is full or the folder cannot be written; the file is then as it was.
    """
    with atomic.replacing(file) as beside:
        try:
            save_file(state, beside, metadata)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{file}: cannot be written: {error}") from None


def load(network: nn.Module, file: Path, built_as: tuple[str, int] | None = None, new_last_layer: bool = False) -> None:
    """Load a state dict from a .safetensors file, or from a PyTorch file that holds nothing but data.

    Args:
        built_as: name and number of classes, of which `models.build` made the network: they tell a file for other
            classes from one of another network; without them, any shape that differs means another network.
        new_last_layer: leave the network's last layer as it is, and say so, where the file's is for other classes.

    Raises:
        ValueError: the file is missing, unreadable, unsafe, or of another network; it says what to do.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            beside = [argparse.Namespace, *((_Unread, name) for name in UNREAD)]
            with torch.serialization.safe_globals(beside), warnings.catch_warnings(action="ignore"):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, EOFError, MemoryError) as error:
        if errors.out_of_memory(error):
            raise
        raise ValueError(f"{file}: cannot be read as weights: {_words(error)}") from None
    except Exception as error:  # torch.load raises pickle's many errors: whatever it is, the file is refused
        raise ValueError(
            f"{file}: holds more than data, or is no PyTorch file ({type(error).__name__}); nothing of it was run. "
            "Save the state dict alone, best as .safetensors"
        ) from None
    if isinstance(state, dict):
        held = [key for key in HOLDERS if isinstance(state.get(key), dict)]
        if len(held) > 1:
            print(f"{file}: holds {', '.join(held)}; the weights are those of {held[0]}", flush=True)
        state = {key: value for key, value in (state[held[0]] if held else state).items() if key != COUNTED}
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        has = f"; it holds {', '.join(map(str, [*state][:5]))}" if isinstance(state, dict) else ""
        raise ValueError(f"{file}: not a state dict of tensors{has}: save the network's state_dict() alone")
    own = network.state_dict()
    state = _unwrapped(state, own)
    _check_names(own, state, file)
    other = [key for key, value in own.items() if value.shape != state[key].shape]
    axes = models.class_axes(network, *built_as) if other and built_as else {}
    for key in other:
        shape, wanted, axis = tuple(state[key].shape), tuple(own[key].shape), axes.get(key)
        fits = axis is not None and len(shape) == len(wanted)
        if not fits or (*shape[:axis], wanted[axis], *shape[axis + 1 :]) != wanted:
            raise ValueError(f"{file}: of another network: {key} is {shape}, not {wanted}{_for_another_size(key)}")
        if not new_last_layer:
            raise ValueError(
                f"{file}: made for {shape[axis]} classes, but the data has {wanted[axis]}: take a file made for these "
                "classes, or fit a teacher here (teacher.source: fit)"
            )
        print(f"{file}: made for {shape[axis]} classes, not {wanted[axis]}: {key} starts anew", flush=True)
    network.load_state_dict({**state, **{key: own[key] for key in other}})


def _words(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it is empty or cut short"
    if "TorchScript" in str(error):
        return "it is a TorchScript program; save the network's state_dict() alone"
    return errors.in_a_line(error).partition(". ")[0]


class _Unread:
    """Stands for what a file holds beside its weights; it takes what would make the thing, and makes nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _unwrapped(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take from all keys what a wrapper put before them (DistributedDataParallel's `module.`, torch.compile's
    `_orig_mod.`, the attribute of a Lightning module), as far as that makes them the network's."""
    keys = list(state)
    while keys and not own.keys() & set(keys):
        first, _, rest = keys[0].partition(".")
        if not rest or not all(key.startswith(f"{first}.") for key in keys):
            return state  # as it is, for the message
        keys = [key.partition(".")[2] for key in keys]
    return dict(zip(keys, state.values(), strict=True))


def _for_another_size(key: str) -> str:
    """What to do where a weight may differ because the images do, as transformers' of positions."""
    if not any(part in key for part in ("pos_embed", "relative_position")):
        return ""
    return "; if it is this network for another image size: a function in models/own.py can give timm that img_size"


def _check_names(own: dict[str, Tensor], state: dict[str, Tensor], file: Path) -> None:
    if own and state and not own.keys() & state.keys():
        some = f"its keys are as {next(iter(state))}, the network's as {next(iter(own))}"
        raise ValueError(f"{file}: of another network: {some}; save the state dict of the very network that is named")
    for key in sorted(own.keys() ^ state.keys()):
        which = "lacks" if key in own else "has a surplus"
        raise ValueError(f"{file}: of another network: it {which} {key}; set the model's name to what the file holds")
