"""Networks as files: weights as safetensors, and a card that says what they are.

A folder holds `weights.safetensors` (the network's state dict) and `network.json` (model, classes, resolution,
normalisation, to how many pixels a side it has images resized, if at all, parameters, the weights' digest, and whatever
else the stage that made it has to say).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from pipeline.core import atomic, digests, small_maps, weights
from pipeline.core.sections import TIMM

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A network that takes pixels as they are, and resizes, where it must, and normalises them itself.

    Args:
        network: a classifier: timm's, or any that `models.build` makes.
        mean, std: of each colour channel, for pixels scaled to 0..1.
        resized_to: pixels a side that images are resized to, where the network is to see others than it is given.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        resized_to: int | None = None,
    ):
        super().__init__()
        self.network, self.resized_to = network, resized_to
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def resize(self, pixels: Tensor) -> Tensor:
        """Resize pixels (B, 3, H, W), 0 to 255 of any type, as Pillow does: bicubic, and clipped."""
        if not self.resized_to:
            return pixels
        size = (self.resized_to, self.resized_to)
        return F.interpolate(pixels.to(self.mean.dtype), size, mode="bicubic", antialias=True).clamp(0, 255)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale pixels (B, 3, H, W), 0 to 255 of any type, to what the network was trained on."""
        return (pixels.to(self.mean.dtype) - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Give logits (B, C) for pixels (B, 3, H, W), 0 to 255."""
        return _logits(self.network(self.normalise(self.resize(pixels))))

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits (B, C) and the features (B, D) that they are made of.

        timm's networks have methods for both. Of others, features are what the last layer sees, the mean over
        positions where it sees several.

        Raises:
            LookupError: the network does not call its last layer.
        """
        if hasattr(self.network, "forward_features") and hasattr(self.network, "forward_head"):
            maps = self.network.forward_features(self.normalise(self.resize(pixels)))
            features = self.network.forward_head(maps, pre_logits=True)
            return _logits(self.network.forward_head(maps)), features.flatten(1)
        seen: list[Tensor] = []
        last = models.last_layers(self.network)[0]
        hook = last.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        try:
            logits = self(pixels)
        finally:
            hook.remove()
        if not seen:
            raise LookupError("its last layer is not called: its weights are used without it")
        features = seen[-1]  # (B, D); or (B, D, H, W), or, of a linear layer, (B, ..., D)
        if features.ndim > 2:
            channels_last = isinstance(last, nn.Linear)
            features = features.flatten(1, -2).mean(1) if channels_last else features.flatten(2).mean(2)
        return logits, features


def _logits(answer: Any) -> Tensor:
    """Take the logits out of what a network answers: a tensor, or what has one as `logits`, or first.

    Raises:
        LookupError, TypeError: there is none.
    """
    answer = answer["logits"] if isinstance(answer, Mapping) else getattr(answer, "logits", answer)
    answer = answer[0] if isinstance(answer, tuple | list) else answer
    if not isinstance(answer, Tensor):
        raise TypeError(f"it answers with {type(answer).__name__}, not with logits")
    return answer


def build(name: str, num_classes: int, seed: int, init: str | None = None, resized_to: int | None = None) -> Classifier:
    """Build a network that starts from random weights, or from some made elsewhere.

    Where the weights are for another number of classes, the last layer is random. Pixels are normalised as the network
    says; where it says nothing and its weights are random, as ImageNet's.

    Args:
        seed: random weights depend on it alone.
        init: None: random weights; "timm": timm's pretrained ones; else a file of weights.
        resized_to: see `Classifier`.

    Raises:
        ValueError: the name is not known (the nearest ones are named), the file does not fit, or timm has no such
            weights or they cannot be had; or the network does not say how pixels are normalised.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = models.build(name, num_classes=num_classes, pretrained=init == TIMM)
    small_maps.replace_convolutions(network)
    trained_with = normalisation(network)
    if init is None:
        return Classifier(network, *(trained_with or ()), resized_to=resized_to)
    if init != TIMM:
        weights.load(network, Path(init), (name, num_classes), new_last_layer=True)
    if not trained_with:
        raise ValueError(
            f"{name} does not say how pixels are normalised for weights of its own: give it pretrained_cfg"
        )
    return Classifier(network, *trained_with, resized_to)


def normalisation(network: nn.Module) -> tuple[Sequence[float], Sequence[float]] | None:
    """Give mean and std of each colour channel, 0 to 1, that a network's weights were trained with, where it says so.

    They are in its `pretrained_cfg`, as timm's networks have it.
    """
    mean, std = said(network).get("mean"), said(network).get("std")
    return (mean, std) if all(isinstance(one, tuple | list) and len(one) == 3 for one in (mean, std)) else None


def said(network: nn.Module) -> dict[str, Any]:
    """Give what a network says of itself in timm's way, in its `pretrained_cfg`."""
    config = getattr(network, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def digest(classifier: Classifier) -> str:
    """SHA-256 over a network's weights as they are now, in hex."""
    total = hashlib.sha256()
    for key, value in sorted(classifier.network.state_dict().items()):
        total.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def save(folder: Path, classifier: Classifier, card: dict[str, Any]) -> None:
    """Write a network's weights and its card to `folder`.

    Args:
        folder: made if it is not there.
        classifier: on any device.
        card: at least `model` (the name for `models.build`), `classes` (names) and `resolution` (pixels a side).
    """
    folder = Path(folder)
    # Copies: modules that a network has in several places share their weights, and the format refuses those.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in classifier.network.state_dict().items()}
    weights.save(folder / "weights.safetensors", state)
    atomic.write_json(
        folder / "network.json",
        {
            "model": card["model"],
            "num_classes": len(card["classes"]),
            "mean": [round(value / 255, 6) for value in classifier.mean.flatten().tolist()],
            "std": [round(value / 255, 6) for value in classifier.std.flatten().tolist()],
            **({"resized_to": classifier.resized_to} if classifier.resized_to else {}),
            "parameters": sum(p.numel() for p in classifier.parameters()),
            "digest": digests.of_file(folder / "weights.safetensors"),
            **card,
        },
    )


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """Read a network that `save` wrote, in eval mode, with its card.

    Its weights are in channels-last order, in which convolutions answer faster in bfloat16, and no slower in float32.

    Raises:
        ValueError: a file is missing or damaged, or the weights are not those the card speaks of.
    """
    folder, card = Path(folder), read_card(Path(folder))
    file = folder / "weights.safetensors"
    if digests.of_file(file) != card["digest"]:
        raise ValueError(
            f"{file}: not the weights that network.json speaks of; remove it, and run `dvc checkout {folder}`"
        )
    network = models.build(card["model"], num_classes=card["num_classes"])
    classifier = Classifier(network, card["mean"], card["std"], card.get("resized_to"))
    weights.load(network, file)
    small_maps.replace_convolutions(network)
    return classifier.eval().to(device, memory_format=torch.channels_last), card


def read_card(folder: Path) -> dict[str, Any]:
    """Read what `network.json` says of the network in a folder. Raises ValueError as `atomic.read_json` does."""
    return atomic.read_json(folder / "network.json")


def check_classes(folder: Path, card: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Make sure that the network in a folder knows the data's classes, in the data's order.

    Raises:
        ValueError: it was made before the classes changed.
    """
    if tuple(card["classes"]) == tuple(classes):
        return
    known = f"{len(card['classes'])} classes" if len(card["classes"]) != len(classes) else "classes of other names"
    raise ValueError(
        f"{folder}: the network knows {known}, but data/prepare has {len(classes)} classes; make it anew from the "
        f"present data: dvc repro {folder.name}"
    )
