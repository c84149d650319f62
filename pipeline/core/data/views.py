"""Views: what augmentation makes of an image, as a pure function of (seed, sample id, replica).

Nothing comes from global random state, a worker, a rank or an order of visits: teacher and student call the same
functions and get the same pixels, mixed images included. "Knowledge distillation: a good teacher is patient and
consistent" (Beyer et al., arXiv:2106.05237) shows why that matters: soft labels only teach what they were asked about.
"""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import betaincinv

from pipeline.core import digests
from pipeline.core.data import images
from pipeline.core.data.augment import OPERATIONS
from pipeline.core.data.images import Encoded
from pipeline.core.sections import Views as Settings

VERSION = 4  # of what is drawn and rendered: a change that changes pixels must raise it; stored labels are refused then

OPERATION_NAMES = tuple(OPERATIONS)
CROP_TRIES = 10  # four numbers each, the first of a view's
PLACES = -(-4 * CROP_TRIES // 8)  # the block of eight numbers after the crops': the places of `_partner`
AFTER_PLACES = PLACES + 1
EIGHT_NUMBERS = struct.Struct(">8Q")


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """What views may look like; params.yaml's `views` section explains the fields.

    Two specifications with one digest give the same pixels for the same (sample, replica), mixed with the same partner.
    """

    seed: int
    resolution: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    randaugment_ops: int
    randaugment_magnitude: float
    mix_probability: float
    mixup_alpha: float
    cutmix_alpha: float

    @classmethod
    def of(cls, seed: int, settings: Settings) -> "ViewSpec":
        """Take what params.yaml says of views; `test_crop` is no matter of augmentation."""
        return cls(seed=seed, **settings.model_dump(exclude={"test_crop"}))

    def description(self) -> dict[str, object]:
        """Everything that the pixels depend on besides the images, as JSON would hold it."""
        return json.loads(json.dumps({"version": VERSION, **dataclasses.asdict(self)}))

    @property
    def digest(self) -> str:
        """SHA-256 of the description, in hex."""
        return digests.of_json(self.description())


@dataclasses.dataclass(frozen=True)
class Crops:
    """The tries at a view's crop; drawn as they are asked for, since nearly always the first fits the image."""

    spec: ViewSpec
    sample_id: int
    replica: int

    def __iter__(self) -> Iterator[tuple[float, float, float, float]]:
        """Give a try after the other: share of the area, width/height, left, top (0..1)."""
        uniform = _uniforms(self.spec.seed, self.sample_id, self.replica)
        (low, high), logs = self.spec.crop_scale, [math.log(ratio) for ratio in self.spec.crop_ratio]
        for _ in range(CROP_TRIES):
            area, ratio, left, top = next(uniform), next(uniform), next(uniform), next(uniform)
            yield low + area * (high - low), math.exp(logs[0] + ratio * (logs[1] - logs[0])), left, top

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The first try that fits an image, as torchvision's RandomResizedCrop; else the largest centre crop in ratio.

        Returns:
            left, top, right, bottom, in pixels.
        """
        for area, ratio, left, top in self:
            wide, high = math.sqrt(width * height * area * ratio), math.sqrt(width * height * area / ratio)
            if wide <= width and high <= height:
                x, y = left * (width - wide), top * (height - high)
                return x, y, x + wide, y + high
        least, most = self.spec.crop_ratio
        ratio = min(max(width / height, least), most)
        wide, high = min(width, height * ratio), min(height, width / ratio)
        x, y = (width - wide) / 2, (height - high) / 2
        return x, y, x + wide, y + high


class View(NamedTuple):
    """One view of one sample, before any pixel is touched."""

    crops: Crops
    flip: bool
    operations: tuple[tuple[str, float], ...]  # RandAugment: name and signed strength, -1..1
    partner: int | None  # id of the labelled sample that is mixed in
    mixing: str  # "mixup", "cutmix", or "" where there is no partner
    share: float  # how much of the view is the sample's own, 0..1
    box: tuple[int, int, int, int]  # cutmix: left, top, right, bottom of the partner's part, pixels


def draw(spec: ViewSpec, sample_id: int, replica: int, partners: np.ndarray) -> View:
    """Draw the view (seed, sample id, replica).

    Args:
        spec: what views may look like.
        sample_id: the sample's content hash.
        replica: which of the sample's views, from 0.
        partners: (L,) uint64, ascending: the ids of the labelled samples, from which the mixing partner is taken.
            They, and not all samples, so that a growing pool changes no view that was there before.
    """
    crops = Crops(spec, sample_id, replica)
    uniform = _uniforms(spec.seed, sample_id, replica, AFTER_PLACES)
    mixed, flip, which, level, centre_x, centre_y = (next(uniform) for _ in range(6))
    operations = tuple(_operation(next(uniform), next(uniform)) for _ in range(spec.randaugment_ops))
    partner = _partner(spec, sample_id, replica, mixed, partners)
    if partner is None:
        return View(crops, flip < spec.flip, operations, None, "", 1.0, (0, 0, 0, 0))
    kinds = _mixing_kinds(spec)
    mixing = kinds[int(which * len(kinds))]
    alpha = spec.mixup_alpha if mixing == "mixup" else spec.cutmix_alpha
    share = float(betaincinv(alpha, alpha, level))  # Beta(alpha, alpha) by inversion: one uniform, one value
    box = (0, 0, 0, 0)
    if mixing == "cutmix":
        box = _cutmix_box(spec.resolution, share, centre_x, centre_y)
        share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / spec.resolution**2
    return View(crops, flip < spec.flip, operations, partner, mixing, share, box)


def draw_partner(spec: ViewSpec, sample_id: int, replica: int, partners: np.ndarray) -> int | None:
    """Draw the view's partner alone, which is all that its key needs."""
    mixed = next(_uniforms(spec.seed, sample_id, replica, AFTER_PLACES))
    return _partner(spec, sample_id, replica, mixed, partners)


def render(spec: ViewSpec, view: View, image: Encoded, partner: tuple[View, Encoded] | None) -> np.ndarray:
    """Make the pixels (3, R, R) uint8 of a view.

    Args:
        spec: what views may look like.
        view: as drawn for the image.
        image: the sample.
        partner: the partner's own view of the same replica (its mixing is not followed) and its image.
    """
    pixels = _render_alone(spec, view, image)
    if not view.mixing:
        return pixels
    assert partner is not None
    other = _render_alone(spec, *partner)
    if view.mixing == "cutmix":  # Yun et al., arXiv:1905.04899, section 3
        left, top, right, bottom = view.box
        pixels = pixels.copy()
        pixels[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return pixels
    # mixup, Zhang et al., arXiv:1710.09412, equation in section 2; rounded, so that a view is bytes like any image
    mixed = view.share * pixels.astype(np.float32) + (1 - view.share) * other.astype(np.float32)
    return np.rint(mixed).astype(np.uint8)


def render_test(image: Image.Image, resolution: int, crop: float) -> np.ndarray:
    """Make the clean test view (3, R, R) uint8: the centre square that keeps `crop` of the shorter side, resized."""
    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    resized = image.resize((resolution, resolution), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(resized).transpose(2, 0, 1)


def _uniforms(seed: int, sample_id: int, replica: int, block: int = 0) -> Iterator[float]:
    """Endless numbers in [0, 1), from a block of eight on."""
    while True:
        for number in EIGHT_NUMBERS.unpack(_eight_numbers(seed, sample_id, replica, block)):
            yield (number >> 11) * 2.0**-53
        block += 1


def _eight_numbers(seed: int, sample_id: int, replica: int, block: int) -> bytes:
    """Eight random numbers of 8 bytes, highest first: BLAKE2b, the same on every machine and version."""
    key = b"".join(number.to_bytes(8, "big") for number in (seed, sample_id, replica))
    return hashlib.blake2b(block.to_bytes(4, "big"), key=key).digest()


def _mixing_kinds(spec: ViewSpec) -> list[str]:
    return [kind for kind, alpha in (("mixup", spec.mixup_alpha), ("cutmix", spec.cutmix_alpha)) if alpha > 0]


def _partner(spec: ViewSpec, sample_id: int, replica: int, mixed: float, partners: np.ndarray) -> int | None:
    """Of eight random places on the ring of ids, the one that has a partner soonest after it; that partner.

    So another's coming or going rarely matters, and none is drawn much more often than the mean, at most 1.15 times;
    one in twelve is less than half as often. Multi-probe consistent hashing (Appleton and O'Reilly, arXiv:1505.00062);
    with one place, an id's chance would be the gap before it.
    """
    if mixed >= spec.mix_probability or not _mixing_kinds(spec):
        return None
    if len(partners) == 0 or (len(partners) == 1 and int(partners[0]) == sample_id):
        return None
    places = np.frombuffer(_eight_numbers(spec.seed, sample_id, replica, PLACES), ">u8").astype(np.uint64)
    after = partners.searchsorted(places) % len(partners)
    at = int(after[(partners[after] - places).argmin()])  # modulo 2**64: the ring is closed
    if int(partners[at]) == sample_id:
        at = (at + 1) % len(partners)
    return int(partners[at])


def _cutmix_box(side: int, share: float, centre_x: float, centre_y: float) -> tuple[int, int, int, int]:
    half = math.sqrt(1 - share) * side / 2
    x, y = centre_x * side, centre_y * side
    left, top, right, bottom = (round(min(max(edge, 0), side)) for edge in (x - half, y - half, x + half, y + half))
    return left, top, right, bottom


def _render_alone(spec: ViewSpec, view: View, image: Encoded) -> np.ndarray:
    side, box = spec.resolution, view.crops.box(image.width, image.height)
    needed = side / min(box[2] - box[0], box[3] - box[1])  # the share of the image's size at which no side is enlarged
    pixels = images.pixels(image, min(needed, 1.0))  # (H', W', 3)
    across, down = pixels.shape[1] / image.width, pixels.shape[0] / image.height
    left, right = _whole_pixels(box[0] * across, box[2] * across, pixels.shape[1])
    top, bottom = _whole_pixels(box[1] * down, box[3] * down, pixels.shape[0])
    # torch's resampling is integer arithmetic: the same bytes with and without vector instructions.
    crop = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    crop = F.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0]
    if view.flip:
        crop = crop.flip(2)
    planes = crop.contiguous().numpy()
    for name, strength in view.operations:
        planes = OPERATIONS[name](planes, strength * spec.randaugment_magnitude / 10)
    return np.ascontiguousarray(planes)


def _whole_pixels(first: float, last: float, length: int) -> tuple[int, int]:
    """Round both edges of a crop alike, so that crops lean to no side; one pixel at least."""
    first = min(round(first), length - 1)
    return first, max(round(last), first + 1)


def _operation(which: float, strength: float) -> tuple[str, float]:
    """RandAugment (Cubuk et al., arXiv:1909.13719): any operation, at the set strength, either way."""
    return OPERATION_NAMES[int(which * len(OPERATION_NAMES))], 1.0 if strength < 0.5 else -1.0
