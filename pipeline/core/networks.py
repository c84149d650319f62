"""Networks as files: weights as safetensors, and a card that says what they are.

A folder holds `weights.safetensors` (the timm network's state dict) and `network.json` (model, classes, resolution,
normalisation, to how many pixels a side it has images resized, if at all, parameters, the weights' digest, and whatever
else the stage that made it has to say).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from pipeline.core import atomic, small_maps
from pipeline.core.sections import TIMM

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every key
RESIZE_TEACHER = ": set teacher.resolution to that"  # what to do where a teacher does not take the views' size
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A timm network that takes pixels as they are, and resizes, where it must, and normalises them itself.

    Args:
        network: a timm classifier.
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
        return self.network(self.normalise(self.resize(pixels)))

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits (B, C) and the features (B, D) that the classifier sees."""
        maps = self.network.forward_features(self.normalise(self.resize(pixels)))
        features = self.network.forward_head(maps, pre_logits=True)
        return self.network.forward_head(maps), features.flatten(1)


def build(name: str, num_classes: int, seed: int, pretrained: bool = False) -> Classifier:
    """Build a network with random weights that depend on the seed alone, or with timm's pretrained ones.

    Raises:
        ValueError: the name is not known; the nearest ones are named. Or its weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = models.build(name, num_classes=num_classes, pretrained=pretrained)
    small_maps.use_products(network)
    return Classifier(network)


def check_takes(classifier: Classifier, name: str, resolution: int, remedy: str = "") -> None:
    """Make sure that a network takes square images of so many pixels a side; nothing is computed.

    Args:
        remedy: what to do where it takes another size alone.

    Raises:
        ValueError: it does not, as transformers at another resolution than their own; or it has no classifier, or
            several, or weights that have no channels-last order, or gives more than a number a class.
    """
    head = getattr(classifier.network, "get_classifier", lambda: None)()
    if not isinstance(head, nn.Module):
        raise ValueError(f"{name} has not one classifier, but {'several' if head else 'none'}; take another network")
    if any(parameter.ndim == 5 for parameter in classifier.parameters()):
        raise ValueError(f"{name} has weights of five dimensions, which the stages do not take; take another network")
    try:
        logits, _ = models.on_meta(_Embed(classifier), resolution)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{name} does not answer as timm's classifiers do ({error}); take another network") from None
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        seen, own = classifier.resized_to or resolution, _own_size(classifier)
        hint = f"; it was made for {own}{remedy}" if own else ""
        raise ValueError(f"{name} does not take images of {seen} pixels: {reason.rstrip('.')}{hint}") from None
    if logits.ndim != 2:
        raise ValueError(f"{name} gives {tuple(logits.shape)} for an image, not a number a class; take another network")


def _own_size(classifier: Classifier) -> int | None:
    """The pixels a side of the images that a network was made for, where timm knows."""
    size = (getattr(classifier.network, "pretrained_cfg", None) or {}).get("input_size")
    return size[-1] if size else None


class _Embed(nn.Module):
    """`Classifier.embed` as a network's forward pass."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier
        self.train(classifier.training)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier.embed(pixels)


def build_from(name: str, init: str | None, num_classes: int, seed: int, resized_to: int | None = None) -> Classifier:
    """Build a network that starts from weights made elsewhere, or from random ones.

    Where the weights are for another number of classes, the classifier is random. Pixels are normalised as for the
    network's published weights.

    Args:
        init: "timm" for timm's pretrained weights; else a file of weights; None: random ones, as `build` gives them.
        resized_to: see `Classifier`.

    Raises:
        ValueError: the name is not known, the file does not fit, or timm has no such weights or they cannot be had.
    """
    network = build(name, num_classes, seed, pretrained=init == TIMM).network
    if init is None:
        return Classifier(network, resized_to=resized_to)
    if init != TIMM:
        load_weights(network, Path(init), new_classifier=True)
    return Classifier(network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"], resized_to)


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
    save_weights(folder / "weights.safetensors", state)
    atomic.write_json(
        folder / "network.json",
        {
            "model": card["model"],
            "num_classes": len(card["classes"]),
            "mean": [round(value / 255, 6) for value in classifier.mean.flatten().tolist()],
            "std": [round(value / 255, 6) for value in classifier.std.flatten().tolist()],
            **({"resized_to": classifier.resized_to} if classifier.resized_to else {}),
            "parameters": sum(p.numel() for p in classifier.parameters()),
            "digest": file_digest(folder / "weights.safetensors"),
            **card,
        },
    )


def save_weights(file: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict of contiguous tensors as a .safetensors file.

    Raises:
        OSError: the disk is full or the folder cannot be written; the file is then as it was.
    """
    with atomic.replacing(file) as beside:
        try:
            save_file(state, beside, metadata)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"{file}: cannot be written: {error}") from None


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[Classifier, dict[str, Any]]:
    """Read a network that `save` wrote, in eval mode, with its card.

    Its weights are in channels-last order, in which convolutions answer faster in bfloat16, and no slower in float32.

    Raises:
        ValueError: a file is missing or damaged, or the weights are not those the card speaks of.
    """
    folder, card = Path(folder), read_card(Path(folder))
    weights = folder / "weights.safetensors"
    if file_digest(weights) != card["digest"]:
        raise ValueError(f"{weights}: not the weights that network.json speaks of; run `dvc checkout {folder}`")
    network = models.build(card["model"], num_classes=card["num_classes"])
    classifier = Classifier(network, card["mean"], card["std"], card.get("resized_to"))
    load_weights(network, weights)
    small_maps.use_products(network)
    return classifier.eval().to(device, memory_format=torch.channels_last), card


def read_card(folder: Path) -> dict[str, Any]:
    """Read what `network.json` says of the network in a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return json.loads((folder / "network.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no network here; run `dvc repro {folder.name}`, or `dvc pull`") from None
    except ValueError:  # no JSON, or no text
        raise ValueError(f"{folder / 'network.json'}: damaged; run `dvc checkout {folder}`") from None


def load_weights(network: nn.Module, file: Path, new_classifier: bool = False) -> None:
    """Load a state dict from a .safetensors file, or from a PyTorch file that holds nothing but tensors.

    Args:
        new_classifier: leave the network's classifier as it is, and say so, where the file's is for other classes.

    Raises:
        ValueError: the file is missing, unreadable, unsafe, or of another network; it says what to do.
    """
    file = Path(file)
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read as weights: {str(error).splitlines()[0]}") from None
    except Exception as error:  # torch.load raises pickle's many errors: whatever it is, the file is refused
        raise ValueError(
            f"{file}: holds more than tensors, or is no PyTorch file ({type(error).__name__}); nothing of it was run. "
            "Save the state dict alone, best as .safetensors"
        ) from None
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{file}: not a state dict of tensors")
    while prefix := next((it for it in WRAPPERS if state and all(key.startswith(it) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    own = network.state_dict()
    _check_names(own, state, file)
    for key, classes in _other_classes(network, state).items():
        if not new_classifier:
            raise ValueError(
                f"{file}: made for {classes} classes, but the data has {own[key].shape[0]}: take a file made for these "
                "classes, or fit a teacher here (teacher.source: fit)"
            )
        print(f"{file}: made for {classes} classes, not {own[key].shape[0]}: {key} starts anew", flush=True)
        state = {**state, key: own[key]}
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"{file}: of another network: {key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
            )
    network.load_state_dict(state)


def _check_names(own: dict[str, Tensor], state: dict[str, Tensor], file: Path) -> None:
    for key in sorted(own.keys() ^ state.keys()):
        which = "lacks" if key in own else "has a surplus"
        raise ValueError(f"{file}: of another network: it {which} {key}; set the model's name to what the file holds")


def _other_classes(network: nn.Module, state: dict[str, Tensor]) -> dict[str, int]:
    """Name the classifier's weights that a file has for another number of classes, and that number."""
    head = network.get_classifier() if hasattr(network, "get_classifier") else None
    if not isinstance(head, nn.Linear | nn.Conv2d):
        return {}
    places = [parameter.data_ptr() for parameter in head.parameters()]
    own = {key: value for key, value in network.state_dict().items() if value.data_ptr() in places}
    return {key: len(state[key]) for key, value in own.items() if state[key].shape[:1] not in ((), value.shape[:1])}


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        ValueError: there is no such file.
    """
    try:
        with Path(file).open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; run `dvc checkout`, or the stage that makes it") from None
