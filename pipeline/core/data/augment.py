"""RandAugment's operations on one image's planes (Cubuk et al., arXiv:1909.13719): the same bytes as PIL's.

Each takes pixels (3, H, W) uint8 and a strength in -1..1 and gives pixels like them; ranges are those of torchvision's
RandAugment, but for shearing about the centre, where torchvision shears about the corner (0, 0). On small images PIL
spends its time on making images and lists of 256 numbers, so that what looks at each value alone is a table of bytes
here, made of PIL's answer to all 256 values, or as PIL makes it of a histogram.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

Operation = Callable[[np.ndarray, float], np.ndarray]

VALUES = np.arange(256, dtype=np.uint8)


def _through(table: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Replace each value v of some pixels, of any shape, by table[v]; table: (256,) uint8."""
    # NumPy's own indexing takes three times as long.
    return np.frombuffer(pixels.tobytes().translate(table.tobytes()), np.uint8).reshape(pixels.shape)


def _blend(other: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """Go from `other` (factor 0) through `pixels` (factor 1) and on, as PIL's enhancements do; both of one shape."""
    flat = [Image.fromarray(it.reshape(-1, it.shape[-1])) for it in (other, pixels)]
    return np.asarray(Image.blend(*flat, factor)).reshape(pixels.shape)


@functools.cache
def _contrast_table(middle: int, factor: float) -> np.ndarray:
    return _blend(np.full((1, 256), middle, np.uint8), VALUES[None], factor)[0]


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Give the luma (H, W) uint8 as PIL's convert("L"): ITU-R 601-2 in integers of 16 bits after the point."""
    red, green, blue = pixels.astype(np.uint32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def _brightness(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _through(_contrast_table(0, 1 + 0.9 * strength), pixels)


def _contrast(pixels: np.ndarray, strength: float) -> np.ndarray:
    middle = int(_grey(pixels).mean(dtype=np.float64) + 0.5)
    return _through(_contrast_table(middle, 1 + 0.9 * strength), pixels)


def _colour(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _blend(np.broadcast_to(_grey(pixels), pixels.shape), pixels, 1 + 0.9 * strength)


def _sharpness(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _blend(smooth(pixels), pixels, 1 + 0.9 * strength)


def smooth(pixels: np.ndarray) -> np.ndarray:
    """Filter pixels (3, H, W) as PIL's ImageFilter.SMOOTH does.

    The mean of a pixel, weighed 5, and its 8 neighbours; the edge stays. No sum of 13 weights lies half-way between two
    numbers, so that rounding in integers is rounding.
    """
    wide = pixels.astype(np.uint16)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, 1:-1, 1:-1]
    smoothed = pixels.copy()
    smoothed[:, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return smoothed


def _posterize(pixels: np.ndarray, strength: float) -> np.ndarray:
    return pixels & np.uint8(256 - (1 << round(4 * abs(strength))))  # so many low bits are cleared


def _solarize(pixels: np.ndarray, strength: float) -> np.ndarray:
    return _through(np.where(255 * (1 - abs(strength)) > VALUES, VALUES, 255 - VALUES), pixels)


def _autocontrast(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Stretch each plane's range to 0..255."""
    lowest, highest = (bound(axis=(1, 2)).tolist() for bound in (pixels.min, pixels.max))
    planes = []
    for plane, low, high in zip(pixels, lowest, highest, strict=True):
        if low < high:
            scale = 255 / (high - low)
            plane = _through(np.clip(np.trunc(VALUES * scale - low * scale), 0, 255).astype(np.uint8), plane)
        planes.append(plane)
    return np.stack(planes)


def _equalize(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Spread each plane's values so that all parts of the range are as frequent, as far as that goes."""
    planes = []
    for plane in pixels:
        counts = np.bincount(plane.reshape(-1), minlength=256)
        step = (plane.size - int(counts[plane.max()])) // 255
        if step:  # 0 as well where there is but one value
            before = np.cumsum(counts) - counts
            plane = _through(np.minimum((step // 2 + before) // step, 255).astype(np.uint8), plane)
        planes.append(plane)
    return np.stack(planes)


def _moved(pixels: np.ndarray, right: float, down: float) -> np.ndarray:
    """Move by whole pixels, cut off as in torchvision's RandAugment; what comes in is black."""
    moved = np.zeros_like(pixels)
    to_y, from_y = _shifted(int(down), pixels.shape[1])
    to_x, from_x = _shifted(int(right), pixels.shape[2])
    moved[:, to_y, to_x] = pixels[:, from_y, from_x]
    return moved


def _shifted(by: int, length: int) -> tuple[slice, slice]:
    """Where the places go to and come from that stay within `length` when all move by `by`."""
    return slice(max(by, 0), max(length + min(by, 0), 0)), slice(max(-by, 0), max(length - max(by, 0), 0))


def _affine(pixels: np.ndarray, angle: float = 0, shear: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    # Plane by plane: for what has three channels, PIL and numpy are slow to change the order of axes.
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels])
    turned = functional.affine(image, angle, [0, 0], 1.0, list(shear), InterpolationMode.BILINEAR, fill=0, center=None)
    return np.asarray(turned).transpose(2, 0, 1)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda pixels, s: pixels,
    "shear_x": lambda pixels, s: _affine(pixels, shear=(math.degrees(math.atan(0.3 * s)), 0.0)),
    "shear_y": lambda pixels, s: _affine(pixels, shear=(0.0, math.degrees(math.atan(0.3 * s)))),
    "translate_x": lambda pixels, s: _moved(pixels, 150 / 331 * pixels.shape[2] * s, 0),
    "translate_y": lambda pixels, s: _moved(pixels, 0, 150 / 331 * pixels.shape[1] * s),
    "rotate": lambda pixels, s: _affine(pixels, angle=30 * s),
    "brightness": _brightness,
    "color": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
