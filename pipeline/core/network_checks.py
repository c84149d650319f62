"""Whether a network takes what the stages show it, found without computing anything."""

from torch import Tensor, nn

import models
from pipeline.core import networks

RESIZE_TEACHER = ": set teacher.resolution to that"  # what to do where a teacher does not take the views' size


def check_takes(classifier: networks.Classifier, name: str, resolution: int, classes: int, remedy: str = "") -> None:
    """Make sure that a network takes square images of so many pixels a side; nothing is computed.

    Args:
        classes: how many it was built for.
        remedy: what to do where it takes another size alone.

    Raises:
        ValueError: it does not, as transformers at another resolution than their own; or it has no last layer, or
            weights that have no channels-last order, or does not give one number per class, or cannot be asked without
            computing.
    """
    own = models.is_own(name)
    instead = "mend it in models/own.py, which says what a network must be" if own else "take another network"
    last = models.last_layers(classifier.network)
    if not last:
        raise ValueError(f"{name} has no last layer, no nn.Linear nor a method get_classifier; {instead}")
    if own and isinstance(last[0], nn.Linear) and last[0].out_features != classes:
        made = f"its last nn.Linear makes {last[0].out_features} numbers, not {classes}"
        raise ValueError(f"{name}: {made}: pass num_classes on, or give it a method get_classifier; {instead}")
    if any(parameter.ndim == 5 for parameter in classifier.parameters()):
        raise ValueError(f"{name} has weights of five dimensions, which the stages do not take; {instead}")
    try:
        logits, _ = embed_on_meta(classifier, resolution)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines()[0] if str(error) else type(error).__name__).rstrip(".")
        if "meta" in reason:
            raise ValueError(
                f"{name} cannot be asked without computing ({reason}): what it does must not depend on values of "
                f"pixels, and its tensors must be parameters or buffers; {instead}"
            ) from None
        seen, made_for = classifier.resized_to or resolution, _own_size(classifier.network)
        hint = f"; it was made for {made_for}{remedy}" if made_for not in (None, seen) else ""
        raise ValueError(f"{name} does not take images of {seen} pixels: {reason}{hint}") from None
    except Exception as error:  # whatever a network of one's own may raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} cannot be asked ({words}); {instead}") from None
    if logits.shape != (1, classes):
        raise ValueError(f"{name} gives {tuple(logits.shape)} for an image and {classes} classes; {instead}")


def embed_on_meta(classifier: networks.Classifier, resolution: int) -> tuple[Tensor, Tensor]:
    """Give what `Classifier.embed` would of one square image, (1, C) and (1, D), without computing it."""
    return models.on_meta(_Embed(classifier), resolution)


class _Embed(nn.Module):
    """`Classifier.embed` as a network's forward pass."""

    def __init__(self, classifier: networks.Classifier):
        super().__init__()
        self.classifier = classifier
        self.train(classifier.training)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier.embed(pixels)


def _own_size(network: nn.Module) -> int | None:
    """The pixels a side of the images that a network was made for, where it says so as timm's do."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or networks.said(network).get("input_size")
    return size[-1] if isinstance(size, tuple | list) and size else None
