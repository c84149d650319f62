"""The networks: PaddleClas' and the residual papers', under their names, beside all of timm's.

    models.build("ResNet50_vd", num_classes=10)     a network with random weights
    models.names()                                  what this project adds to timm
    models.canonical("ResNet50_vd")                 what timm calls it: "resnet50d"

Networks that neither has go into own.py.

`python -m models` prints the table of networks, `python -m models.import_paddle` reads PaddleClas' weights.
"""

import difflib
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from models import own
from models.networks import BY_NAME, TABLE, Network

VB = ("ResNet18", "ResNet34", "ResNet50", "ResNet101", "ResNet152")

__all__ = [
    "BY_NAME",
    "TABLE",
    "Network",
    "build",
    "canonical",
    "class_axes",
    "has_pretrained",
    "is_own",
    "last_layers",
    "macs",
    "names",
    "on_meta",
]


def names() -> tuple[str, ...]:
    """Name the networks of this project's table."""
    return tuple(BY_NAME)


def canonical(name: str) -> str:
    """Give the name by which timm builds a network.

    Args:
        name: PaddleClas' name, timm's or one's own; timm's with or without its tag for pretrained weights
            ("resnet50d.gluon_in1k"). PaddleClas' ResNets of "vb" form go by that ending too.

    Raises:
        ValueError: no such network, or no such weights; the nearest names are given.
    """
    base, dot, tag = _spelt(name).partition(".")
    network = BY_NAME.get(base)
    if network is None and base not in timm.list_models():  # which leaves timm's outdated names out: some mislead
        if callable(getattr(own, base, None)):
            raise ValueError(f"{name!r}: is in models/own.py, but no network yet: it takes @register_model above it")
        raise ValueError(f"{name!r}: no such network; the nearest are {', '.join(_nearest(base))}")
    if network is not None:
        base = network.timm_name or network.name
    if not dot:
        return base
    architecture = base.partition(".")[0]
    try:
        get_pretrained_cfg(f"{architecture}.{tag}")
    except RuntimeError:
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise ValueError(f"{name!r}: timm has no such weights of it; those that it has: {known}") from None
    return f"{architecture}.{tag}"


def build(name: str, num_classes: int = 1000, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a network.

    Args:
        name: PaddleClas', timm's or one's own.
        num_classes: logits that it gives.
        pretrained: take timm's weights, which for most of PaddleClas' names are not PaddleClas' own; the last layer
            is random where its number of classes is another.
        kwargs: for timm's network, such as `drop_path_rate` or `layers`.

    Raises:
        ValueError: no such network; or pretrained weights that do not exist or cannot be had; or a function of one's
            own that does not build one.
    """
    canonical(name)
    try:
        network = timm.create_model(_spelt(name), pretrained=pretrained, num_classes=num_classes, **kwargs)
        return network.train()  # a function of one's own may have forgotten to give a network
    except Exception as error:  # whatever a function of one's own may raise
        reason = " ".join(str(error).split())
        if is_own(name):
            hint = "it takes (pretrained=False, num_classes=1000, **kwargs), as timm calls it, and gives a network"
            raise ValueError(f"{name} cannot be built ({type(error).__name__}: {reason}): {hint}") from None
        failed_to_load = isinstance(error, OSError | RuntimeError) or type(error).__module__.startswith("httpx")
        if not pretrained or not failed_to_load:
            raise
        raise ValueError(f"{name}: its pretrained weights cannot be had (no network?): {reason}") from None


def class_axes(network: nn.Module, name: str, num_classes: int) -> dict[str, int]:
    """Say which weights a network has more of where it has one class more: names, and the axis that is longer.

    Args:
        network: as `build` made it of the others.

    Raises:
        ValueError: as of `build`.
    """
    with torch.random.fork_rng(devices=[]):
        more = build(name, num_classes + 1).state_dict()
    return {
        key: axis
        for key, value in network.state_dict().items()
        for axis, (size, larger) in enumerate(zip(value.shape, more[key].shape, strict=True))
        if size < larger
    }


def has_pretrained(name: str) -> bool:
    """Whether `build` can be asked for a network's pretrained weights."""
    network = BY_NAME.get(_spelt(name).partition(".")[0])
    if network is not None and (network.only_paddle or network.timm_name is None):
        return False
    known = get_pretrained_cfg(canonical(name))
    return known is not None and known.has_weights


def is_own(name: str) -> bool:
    """Whether a network is the user's: known to timm's registry, but neither timm's nor of this project's table."""
    base = _spelt(name).partition(".")[0]
    return base not in BY_NAME and timm.is_model(base) and not model_entrypoint(base).__module__.startswith("timm.")


def last_layers(network: nn.Module) -> list[nn.Module]:
    """Give the layers that make the logits: what timm's `get_classifier` says, else the nn.Linear that is last.

    Most networks have one; those with a token for distillation have two, a CrossViT has one per branch.
    """
    if callable(ask := getattr(network, "get_classifier", None)):
        said = ask()
        layers = [*said] if isinstance(said, tuple | nn.ModuleList) else [said]
    else:
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
    return [layer for layer in layers if isinstance(layer, nn.Module)]


def macs(network: nn.Module, resolution: int) -> int:
    """Count the multiply-adds of convolutions and linear layers for one square image; nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        on_meta(network, resolution)
    return counter.get_total_flops() // 2


def on_meta(network: nn.Module, resolution: int) -> Any:
    """Give what a network in eval mode would answer to one square image: shapes and types; nothing is computed."""
    # A module that stands in two places under one of its names alone: under both, functional_call would swap its
    # tensors twice and leave it with these.
    state = {}
    for name, module in network.named_modules():
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            state[f"{name}.{key}" if name else key] = value.detach().to("meta")
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            pixels = torch.empty(1, 3, resolution, resolution, device="meta")
            return functional_call(network, state, (pixels,), tie_weights=False)
    finally:
        network.train(training)


def _spelt(name: str) -> str:
    """Give PaddleClas' spelling of a ResNet that is called by its form, "vb", too."""
    base, dot, tag = name.partition(".")
    plain = base.removesuffix("_vb")
    return plain + dot + tag if plain in VB else name


def _nearest(name: str, n: int = 3) -> list[str]:
    by_lower: dict[str, list[str]] = {}
    for known in (*names(), *timm.list_models()):  # this project's first, where only the case tells two apart
        by_lower.setdefault(known.lower(), []).append(known)
    matches = difflib.get_close_matches(name.lower(), by_lower, n, cutoff=0.4)
    found = dict.fromkeys(known for match in matches for known in by_lower[match])
    return list(found)[:n] or [*names()[:n], "and others (models.names(), timm.list_models())"]
