"""RandAugment's operations are those of torchvision on PIL images, to the byte."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import InterpolationMode, functional

from pipeline.core.data import augment

SIZES = [(1, 1), (2, 5), (3, 3), (40, 1), (24, 33), (224, 224)]


def affine(image, angle=0.0, offset=(0, 0), shear=(0.0, 0.0)):
    return functional.affine(image, angle, list(offset), 1.0, list(shear), InterpolationMode.BILINEAR, fill=0)


# As torchvision.transforms.v2.RandAugment applies them.
REFERENCES = {
    "identity": lambda image, s: image,
    "shear_x": lambda image, s: affine(image, shear=(math.degrees(math.atan(0.3 * s)), 0.0)),
    "shear_y": lambda image, s: affine(image, shear=(0.0, math.degrees(math.atan(0.3 * s)))),
    "translate_x": lambda image, s: affine(image, offset=(int(150 / 331 * image.width * s), 0)),
    "translate_y": lambda image, s: affine(image, offset=(0, int(150 / 331 * image.height * s))),
    "rotate": lambda image, s: affine(image, angle=30 * s),
    "brightness": lambda image, s: functional.adjust_brightness(image, 1 + 0.9 * s),
    "color": lambda image, s: functional.adjust_saturation(image, 1 + 0.9 * s),
    "contrast": lambda image, s: functional.adjust_contrast(image, 1 + 0.9 * s),
    "sharpness": lambda image, s: functional.adjust_sharpness(image, 1 + 0.9 * s),
    "posterize": lambda image, s: functional.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: functional.solarize(image, 255 * (1 - abs(s))),
    "autocontrast": lambda image, s: functional.autocontrast(image),
    "equalize": lambda image, s: functional.equalize(image),
}


def made(size):
    """Images of one size: noise, one value, few values, black and white, a smooth one."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (3, *size), dtype=np.uint8)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size[::-1])
    few = random.integers(100, 120, (3, *size), dtype=np.uint8)
    return [noise, np.full_like(noise, 77), few, noise // 255 * 255, np.asarray(coarse).transpose(2, 0, 1)]


def picture(planes):
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_an_operation_is_torchvisions_on_pil_images(name, size):
    for planes in made(size):
        for strength in (1.0, -1.0, 0.5, -0.5, 0.3, 0.0):
            found = augment.OPERATIONS[name](planes, strength)
            assert found.dtype == np.uint8
            expected = np.asarray(REFERENCES[name](picture(planes), strength)).transpose(2, 0, 1)
            assert np.array_equal(found, expected), strength


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_an_operation_leaves_what_it_is_given_as_it_is(name):
    for planes in made((9, 8)):
        before = planes.copy()
        augment.OPERATIONS[name](planes, 0.7)
        assert np.array_equal(planes, before)


@pytest.mark.parametrize("size", SIZES)
def test_smoothing_is_pils(size):
    for planes in made(size):
        expected = np.asarray(picture(planes).filter(ImageFilter.SMOOTH)).transpose(2, 0, 1)
        assert np.array_equal(augment.smooth(planes), expected)
