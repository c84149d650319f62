"""Turn PaddleClas' published weights (.pdparams) into a .safetensors file for the same network here.

It reads the .pdparams file alone, in either of the ways PaddleClas names its layers (stem.0.conv.weight,
conv1_1._conv.weight), and writes the state dict of `models.build(MODEL)`, for `teacher.checkpoint` or `student.init`.
Nothing in the file is run. The number of classes is the file's.

    python -m models.import_paddle ResNet50_vd_ssld_pretrained.pdparams --model ResNet50_vd_ssld -o ssld.safetensors

Tensors are told apart by key and shape, so a file of another network is refused; but ResNet50_vc and ResNet50_vd, or
ResNet50 and ResNet50_va, have the same keys and shapes: for those the name that you give is believed.
"""

import argparse
import contextlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import models
from models.paddle_pickle import read_arrays
from pipeline.core import digests, weights
from pipeline.core.running import commands

UNIT = r"\.(?:_?conv\.(?P<conv>weight)|(?:_?bn|_batch_norm)\.(?P<norm>weight|bias|_mean|_variance))"
STEM = re.compile(r"(?:stem\.(?P<from0>\d)|conv1_(?P<from1>\d)|conv1|conv|_conv_stem)" + UNIT)
BLOCK = re.compile(
    r"(?:blocks\.(?P<block>\d+)|bb_(?P<stage>\d)_(?P<place>\d+)|_conv(?P<stage1>\d)_(?P<place1>\d+))"
    r"\.(?:_?conv(?P<layer>\d)|res\w+_branch2b_(?P<split>\d+)|_?short(?:\._conv)?)" + UNIT
)
HEAD = re.compile(r"(?:fc|_?out)\.(weight|bias)")
NORM = {"weight": "weight", "bias": "bias", "_mean": "running_mean", "_variance": "running_var"}


def timm_key(key: str, network: nn.Module) -> str | None:
    """Give the key in `network`'s state dict of what PaddleClas calls `key`; None where it can have none."""
    if found := HEAD.fullmatch(key):
        return f"fc.{found[1]}"
    if found := STEM.fullmatch(key):
        number = int(found["from0"] or 0) if found["from1"] is None else int(found["from1"]) - 1
        return _stem_key(number, found, isinstance(network.conv1, nn.Sequential))
    if found := BLOCK.fullmatch(key):
        return _block_key(found, network)
    return None


def _stem_key(number: int, unit: re.Match[str], deep: bool) -> str | None:
    last = 2 if deep else 0
    if number > last:
        return None
    if unit["conv"]:
        return f"conv1.{3 * number}.weight" if deep else "conv1.weight"
    norm = "bn1" if number == last else f"conv1.{3 * number + 1}"
    return f"{norm}.{NORM[unit['norm']]}"


def _block_key(unit: re.Match[str], network: nn.Module) -> str | None:
    place = _place(unit, network)
    if place is None:
        return None
    stage, index = place
    block = getattr(network, f"layer{stage}")[index]
    end = unit["conv"] or NORM[unit["norm"]]
    kind = "conv" if unit["conv"] else "bn"
    if unit["split"]:  # of Res2Net, whose 3x3 is several
        layer = f"{kind}s.{int(unit['split']) - 1}"
    elif unit["layer"]:
        layer = f"{kind}{int(unit['layer']) + 1}"
    else:  # the shortcut; its convolution and batch norm stand last, after a pooling in the vd form
        if not isinstance(block.downsample, nn.Sequential):
            return None
        layer = f"downsample.{len(block.downsample) - (2 if kind == 'conv' else 1)}"
    return f"layer{stage}.{index}.{layer}.{end}"


def _place(unit: re.Match[str], network: nn.Module) -> tuple[int, int] | None:
    """Give stage (from 1) and place in it (from 0) of a block; None where the network has no such block."""
    depths = [len(getattr(network, f"layer{stage}")) for stage in (1, 2, 3, 4)]
    if unit["block"] is None:
        stage = int(unit["stage"]) + 1 if unit["stage"] else int(unit["stage1"])
        index = int(unit["place"] or unit["place1"])
        return (stage, index) if 1 <= stage <= 4 and index < depths[stage - 1] else None
    index = int(unit["block"])  # counted through all stages
    for stage, depth in enumerate(depths, start=1):
        if index < depth:
            return stage, index
        index -= depth
    return None


def convert(arrays: dict[str, np.ndarray], network: nn.Module) -> dict[str, Tensor]:
    """Turn PaddleClas' arrays into the state dict of `network` (which may be on the meta device: only keys and
    shapes of it are looked at).

    Raises:
        ValueError: a tensor is missing, is too many, or has another shape or type.
    """
    wanted = network.state_dict()
    counters = {key: torch.tensor(0) for key in wanted if key.endswith("num_batches_tracked")}  # Paddle has none
    keys = {key: timm_key(key, network) for key in arrays}
    surplus = [key for key, ours in keys.items() if ours not in wanted]
    missing = [key for key in wanted if key not in counters.keys() | set(keys.values())]
    if surplus or missing:
        what = [f"has {len(surplus)} tensors too many (the first: {surplus[0][:100]})"] if surplus else []
        what += [f"lacks {len(missing)} (the first, as it is called here: {missing[0]})"] if missing else []
        raise ValueError(" and ".join(what))
    state = {}
    for key, ours in keys.items():
        if ours in state:
            raise ValueError(f"has two tensors for the same place, one of them {key}")
        state[ours] = _tensor(key, arrays[key], wanted[ours], transposed=ours == "fc.weight")
    return {key: state[key] if key in state else counters[key] for key in wanted}


def _tensor(key: str, array: np.ndarray, like: Tensor, transposed: bool) -> Tensor:
    shape = tuple(like.shape[::-1] if transposed else like.shape)  # Paddle keeps a linear layer's weights as (in, out)
    if array.shape != shape:
        raise ValueError(f"has {key} of shape {array.shape}, where {shape} is wanted")
    if array.dtype.kind != "f":
        raise ValueError(f"has {key} of type {array.dtype}, where floating-point numbers are wanted")
    return torch.from_numpy(np.array(array.T if transposed else array, dtype=np.float32, order="C"))


def fitting(arrays: dict[str, np.ndarray], num_classes: int) -> list[str]:
    """Name the networks of the table that have just these tensors."""
    learnable = sum(array.size for key, array in arrays.items() if not key.endswith(("._mean", "._variance")))
    head = sum(array.size for key, array in arrays.items() if HEAD.fullmatch(key))
    parameters = learnable - head + head // num_classes * 1000
    names = []
    for network in models.TABLE:
        if network.parameters != parameters:  # for building them all takes seconds
            continue
        with contextlib.suppress(ValueError):
            convert(arrays, _outline(network.name, num_classes))
            names.append(network.name)
    return names


def _outline(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        network = models.build(name, num_classes=num_classes)
    if not all(hasattr(network, part) for part in ("conv1", "layer1", "layer4", "fc")):
        raise ValueError(f"{name}: no network that PaddleClas' weights of ResNets could be for")
    return network


def import_file(file: Path, model: str, output: Path) -> str:
    """Do it all; give a line that says what was done.

    Raises:
        ValueError: the file is not one of that network's weights, or not readable without running it.
        OSError: a file cannot be read or written.
    """
    models.canonical(model)  # before the file is read
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: what is written is a .safetensors file; name it so")
    arrays = read_arrays(file)
    classes = next(
        (array.size for key, array in arrays.items() if (head := HEAD.fullmatch(key)) and head[1] == "bias"), 0
    )
    if not classes:
        raise ValueError(f"{file}: has no last layer (fc.bias or out.bias): not the weights of a whole network")
    network = _outline(model, classes)
    try:
        state = convert(arrays, network)
    except ValueError as error:
        others = fitting(arrays, classes)
        hint = f"; it fits {', '.join(others)}" if others else ""
        raise ValueError(f"{file}: not the weights of {model}: it {error}{hint}") from None
    if broken := [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]:
        others = f", and so have {len(broken) - 1} others" if broken[1:] else ""
        raise ValueError(f"{file}: {broken[0]} has values that are not finite{others}")
    digest = digests.of_file(file)
    # One entry of metadata: the order of several is not always the same.
    weights.save(output, state, {"imported": f"{model} from {file.name}, SHA-256 {digest}"})
    parameters = sum(p.numel() for p in network.parameters())
    return f"{output}: {model}, {len(arrays)} tensors, {parameters:,} parameters, {classes:,} classes"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.import_paddle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.pdparams", help="PaddleClas' weights")
    parser.add_argument("--model", required=True, help="whose weights they are, such as ResNet50_vd")
    parser.add_argument("-o", "--output", required=True, type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args(argv)
    with commands.ending("import_paddle", stopped="stopped; nothing was written"):
        print(import_file(arguments.file, arguments.model, arguments.output))


if __name__ == "__main__":
    main()
