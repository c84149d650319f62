"""Thumbnails: what of an image is kept to look for near-copies of it, one kilobyte each."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

SIDE = 32  # pixels


def thumbnails(images: Iterable[Image.Image]) -> np.ndarray:
    """Make grey thumbnails (N, 32, 32) uint8 of whole images; their ratio of width to height is lost."""
    small = [np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(small) if small else np.zeros((0, SIDE, SIDE), np.uint8)
