"""Near-copies: images that show what another shows, re-encoded, rescaled, cropped, mirrored, brighter or captioned.

An image is described by the 63 lowest coefficients of the cosine transform of its grey thumbnail, those that perceptual
hashes take the signs of (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010), here with
their values, each multiplied by its squared frequency: otherwise the lowest ones, of which photographs have the most,
decide alone. The similarity of two images is the cosine of their descriptions, which neither brightness nor contrast
changes; it is the best over ALIGNMENTS, which say what span of the one is compared with what span of the other. The
transform of any span of a thumbnail is one matrix product, and so is comparing all with all. Where the best alignment
comes near the threshold, spans moved and zoomed by a little are tried too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from pipeline.core.mining.thumbnails import SIDE

FREQUENCIES = 8  # along each axis, 0 included: half periods a span
STEP = 1 / SIDE  # by which spans are moved: a pixel of the thumbnail
NEAR = 0.2  # a pair as far below the threshold may rise above it when spans are moved
BLOCKS = {"cpu": (512, 1024), "cuda": (8192, 16384)}  # pool and guarded images compared at once: to fit the CPU's cache

Span = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image's sides
WHOLE: Span = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which span of a pool image is compared with which span of a guarded image, and whether that is mirrored."""

    name: str
    pool: Span
    guarded: Span
    mirrored: bool = False


def _cut(left: float, top: float, right: float, bottom: float) -> Span:
    return left, top, 1 - right, 1 - bottom


# A crop loses up to a tenth at all borders, at two that face each other, or at one. A caption covers up to a fifth of
# the height, or adds to it: what the other four fifths show depends on which of the two, and on the caption's height.
_POOL_IMAGE_CHANGED = (
    Alignment("whole", WHOLE, WHOLE),
    Alignment("mirrored", WHOLE, WHOLE, mirrored=True),
    *(Alignment("inner part", WHOLE, _cut(cut, cut, cut, cut)) for cut in (0.05, 0.1)),
    *(Alignment("inner part, mirrored", WHOLE, _cut(cut, cut, cut, cut), mirrored=True) for cut in (0.05, 0.1)),
    *(Alignment("inner part", WHOLE, _cut(*cut)) for cut in ((0.1, 0, 0.1, 0), (0, 0.1, 0, 0.1))),
    *(Alignment("part", WHOLE, _cut(*cut)) for cut in 0.08 * np.eye(4)),
    *(Alignment("without the bottom", _cut(0, 0, 0, 0.2), _cut(0, 0, 0, cut)) for cut in (0, 0.06, 0.13, 0.2)),
    *(Alignment("without the top", _cut(0, 0.2, 0, 0), _cut(0, cut, 0, 0)) for cut in (0, 0.06, 0.13, 0.2)),
)
# The same, where the guarded image is the copy.
_GUARDED_IMAGE_CHANGED = tuple(
    Alignment(
        each.name if each.name.startswith("without") else f"its {each.name}", each.guarded, each.pool, each.mirrored
    )
    for each in _POOL_IMAGE_CHANGED
    if each.pool != each.guarded
)
ALIGNMENTS = (*_POOL_IMAGE_CHANGED, *_GUARDED_IMAGE_CHANGED)
MOVES = tuple((x - zoom, y - zoom, x + zoom, y + zoom) for x, y, zoom in product((-STEP, 0.0, STEP), repeat=3))


@dataclass(frozen=True, slots=True)
class Nearest:
    """Which guarded image each of N pool images is most like.

    Attributes:
        similarity: (N,) float32, -1 to 1.
        which: (N,) int64 number of the guarded image; -1 where the similarity is far below the threshold.
        alignment: (N,) int64 index into ALIGNMENTS; -1 where `which` is.
    """

    similarity: np.ndarray
    which: np.ndarray
    alignment: np.ndarray


def nearest(
    pool: np.ndarray,
    guarded: np.ndarray,
    threshold: float,
    device: torch.device | str = "cpu",
    done: Callable[[int], object] = lambda count: None,
) -> Nearest:
    """Find for each pool image the guarded image that it is most likely a copy of.

    A pair of images takes 36 x 63 multiplications and additions; memory is 10 kB for each guarded image, and 200 MB;
    on a GPU 700 MB.

    Args:
        pool: (N, 32, 32) uint8 thumbnails; may be memory-mapped.
        guarded: (G, 32, 32) uint8 thumbnails of validation and test images.
        threshold: the similarity from which on the caller takes an image for a copy.
        device: where to compute.
        done: told how many more pool images have been compared.
    """
    found = Nearest(np.full(len(pool), -1, np.float32), np.full(len(pool), -1), np.full(len(pool), -1))
    if not len(guarded):
        return found
    flat = _flatten(guarded, device)
    described = {key: describe(flat, *key) for key in {(each.guarded, each.mirrored) for each in ALIGNMENTS}}
    targets = [described[each.guarded, each.mirrored] for each in ALIGNMENTS]
    moved = [_moved(each, device) for each in ALIGNMENTS]
    size, _ = BLOCKS[flat.device.type]
    for start in range(0, len(pool), size):
        part = slice(start, start + size)
        found.similarity[part], found.which[part], found.alignment[part] = (
            column.cpu().numpy() for column in _compare(_flatten(pool[part], device), flat, targets, moved, threshold)
        )
        done(len(found.similarity[part]))
    return found


def describe(flat: Tensor, span: Span, mirrored: bool = False) -> Tensor:
    """Describe a span of thumbnails (N, 1024) by unit vectors (N, 63) float32; zeros where it is of one colour."""
    return _unit(flat @ torch.from_numpy(transform(span, mirrored)).to(flat))


def transform(span: Span, mirrored: bool = False) -> np.ndarray:
    """Give the matrix (1024, 63) float32 from a thumbnail's pixels to a span's weighted cosine coefficients."""
    left, top, right, bottom = span
    order = np.arange(FREQUENCIES)
    across, down = _cosines(left, right), _cosines(top, bottom)  # (8, 32) each
    if mirrored:
        across = across * np.where(order % 2, -1, 1)[:, None]
    weight = order[:, None] ** 2 + order**2  # (8, 8)
    waves = weight[..., None, None] * down[:, None, :, None] * across[:, None, :]  # (8, 8, 32, 32)
    return waves.reshape(FREQUENCIES**2, -1)[1:].T.astype(np.float32)  # the mean has weight 0


def _cosines(low: float, high: float) -> np.ndarray:
    """Integrate the cosines of a span over each pixel of a side: (8, 32); border pixels go on beyond the border."""
    edges = np.clip((np.arange(SIDE + 1) / SIDE - low) / (high - low), 0, 1)
    edges[0], edges[-1] = 0, 1
    order = np.arange(1, FREQUENCIES)[:, None]
    waves = np.sqrt(2) * np.diff(np.sin(np.pi * order * edges), axis=1) / (np.pi * order)
    return np.vstack([np.diff(edges)[None], waves])


def _moved(alignment: Alignment, device: torch.device | str) -> Tensor:
    """Give the transforms (1024, 27 x 63) of the guarded span of an alignment, moved and zoomed by a step."""
    spans = [tuple(np.add(alignment.guarded, move)) for move in MOVES]
    return torch.from_numpy(np.concatenate([transform(span, alignment.mirrored) for span in spans], axis=1)).to(device)


def _compare(
    pool: Tensor, guarded: Tensor, targets: list[Tensor], moved: list[Tensor], threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare thumbnails (n, 1024) and (G, 1024): similarity, which and alignment, (n,) each."""
    similarity = torch.full((len(pool),), -1.0, device=pool.device)
    which, alignment = (torch.full((len(pool),), -1, device=pool.device) for _ in range(2))
    described = {span: describe(pool, span) for span in {each.pool for each in ALIGNMENTS}}
    for number, (each, target) in enumerate(zip(ALIGNMENTS, targets, strict=True)):
        queries = described[each.pool]  # (n, 63)
        best = torch.stack([(queries @ part.T).amax(1) for part in target.split(BLOCKS[pool.device.type][1])]).amax(0)
        near = (best >= threshold - NEAR).nonzero()[:, 0]
        at = (queries[near] @ target.T).argmax(1)  # finding the place is slow, and few need it
        shown = (guarded[at] @ moved[number]).view(-1, len(MOVES), queries.shape[1])
        best[near] = (_unit(shown) * queries[near, None]).sum(2).amax(1)
        better = best > similarity
        similarity = torch.where(better, best, similarity)
        which[better] = alignment[better] = -1
        seen = better[near]
        which[near[seen]], alignment[near[seen]] = at[seen], number
    return similarity, which, alignment


def _flatten(thumbs: np.ndarray, device: torch.device | str) -> Tensor:
    """Flatten to (N, 1024) float32, the mean of each thumbnail taken off so that float32 is exact enough."""
    flat = torch.from_numpy(np.array(thumbs)).to(device).flatten(1).float()
    return flat - flat.mean(1, keepdim=True)


def _unit(vectors: Tensor) -> Tensor:
    """Scale vectors (..., D) to length 1; those of next to no length become zeros."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-2, vectors / length.clamp(min=1e-2), 0.0)
