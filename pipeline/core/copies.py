"""Near-copies: images that show what another shows, re-encoded, rescaled or shifted by a little.

The measure is the correlation of grey 32 x 32 thumbnails, the best over shifts of up to two of their pixels: template
matching by normalised cross-correlation (Lewis, "Fast normalized cross-correlation", 1995), on a small scale.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image

SIDE, SHIFT = 32, 2
COARSE_MARGIN = 0.1  # a pair whose unshifted correlation is this much below the threshold is not looked at closer
CHUNK = 4096


def thumbnails(images: Iterable[Image.Image]) -> np.ndarray:
    """Make grey thumbnails (N, 32, 32) uint8."""
    small = [np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(small) if small else np.zeros((0, SIDE, SIDE), np.uint8)


def nearest(pool: np.ndarray, guarded: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Find for each pool image the guarded image that it may be a copy of.

    Args:
        pool: (N, 32, 32) uint8 thumbnails.
        guarded: (G, 32, 32) uint8 thumbnails of validation and test images.
        threshold: correlation from which on a pair counts as a copy.

    Returns:
        similarity (N,) float32, exact where it reaches the threshold, else a lower bound; and which (N,) int64 guarded
        image, -1 where there is none.
    """
    similarity, which = np.zeros(len(pool), np.float32), np.full(len(pool), -1)
    if not len(guarded):
        return similarity, which
    targets = _normalise(guarded[:, SHIFT:-SHIFT, SHIFT:-SHIFT])
    for start in range(0, len(pool), CHUNK):
        part = pool[start : start + CHUNK]
        coarse = _normalise(part[:, SHIFT:-SHIFT, SHIFT:-SHIFT]) @ targets.T  # (n, G)
        at = coarse.argmax(1)
        similarity[start : start + len(part)], which[start : start + len(part)] = coarse.max(1), at
        rows, columns = np.nonzero(coarse >= threshold - COARSE_MARGIN)
        best = _best_shift(part, targets, rows, columns)
        np.maximum.at(similarity, start + rows, best)
        winners = best >= similarity[start + rows]
        which[start + rows[winners]] = columns[winners]
    return similarity, which


def _best_shift(part: np.ndarray, targets: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The best correlation (P,) of each pair over all shifts."""
    best = np.full(len(rows), -1, np.float32)
    inner = SIDE - 2 * SHIFT
    for down in range(2 * SHIFT + 1):
        for right in range(2 * SHIFT + 1):
            shifted = _normalise(part[:, down : down + inner, right : right + inner])
            for first in range(0, len(rows), CHUNK):
                pair = slice(first, first + CHUNK)
                values = np.einsum("pd,pd->p", shifted[rows[pair]], targets[columns[pair]])
                best[pair] = np.maximum(best[pair], values)
    return best


def _normalise(thumbs: np.ndarray) -> np.ndarray:
    """Flatten to (N, D) float32 of mean 0 and length 1; an image of one colour becomes zeros."""
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 1e-3)
