"""Near-copies: images that show what another shows, re-encoded, rescaled or shifted by a little.

The measure is the correlation of grey 32 x 32 thumbnails, the best over shifts of up to two of their pixels: template
matching by normalised cross-correlation (Lewis, "Fast normalized cross-correlation", 1995), on a small scale.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image

SIDE, SHIFT = 32, 2
CHUNK = 1024  # pool images compared at once


def thumbnails(images: Iterable[Image.Image]) -> np.ndarray:
    """Make grey thumbnails (N, 32, 32) uint8."""
    small = [np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(small) if small else np.zeros((0, SIDE, SIDE), np.uint8)


def nearest(pool: np.ndarray, guarded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find for each pool image the guarded image that it is most likely a copy of.

    The time is that of 25 matrix products: about 40,000 operations a pair of images.

    Args:
        pool: (N, 32, 32) uint8 thumbnails.
        guarded: (G, 32, 32) uint8 thumbnails of validation and test images.

    Returns:
        similarity (N,) float32, and which (N,) int64 guarded image, -1 where there is none.
    """
    similarity, which = np.full(len(pool), -1, np.float32), np.full(len(pool), -1)
    if not len(guarded):
        return similarity, which
    inner = SIDE - 2 * SHIFT
    targets = _normalise(guarded[:, SHIFT:-SHIFT, SHIFT:-SHIFT]).T  # (784, G)
    for start in range(0, len(pool), CHUNK):
        part = slice(start, start + CHUNK)
        for down in range(2 * SHIFT + 1):
            for right in range(2 * SHIFT + 1):
                shifted = _normalise(pool[part, down : down + inner, right : right + inner])
                correlation = shifted @ targets  # (n, G)
                at, best = correlation.argmax(1), correlation.max(1)
                better = best > similarity[part]
                similarity[part][better], which[part][better] = best[better], at[better]
    return similarity, which


def _normalise(thumbs: np.ndarray) -> np.ndarray:
    """Flatten to (N, D) float32 of mean 0 and length 1; an image of one colour becomes zeros."""
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 1e-3)
