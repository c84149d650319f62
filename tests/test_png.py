"""PNG files: transparent colours, and metadata, of which the pixels need only what turns them upright."""

import struct
import zlib

import numpy as np
import pytest
from made_images import XMP, chunk, pixels, png, with_chunk
from PIL import Image

from pipeline.core.data import images
from pipeline.core.data.image_files import PNG


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(images.decode(content)).astype(int)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_grey_of_few_bits_becomes_white_and_no_other(bits):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0))
    values = chunk(b"IDAT", zlib.compress(bytes([0, 1 << (8 - bits)])))  # 1, then 0
    for transparent, grey in ((1, 255), (0, round(255 / (2**bits - 1)))):
        content = PNG + header + chunk(b"tRNS", struct.pack(">H", transparent)) + values + chunk(b"IEND", b"")
        assert decoded(content)[0, :, 0].tolist() == [grey, 255 if transparent == 0 else 0]


def test_a_transparent_colour_of_sixteen_bits_becomes_white():
    header, clear = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), struct.pack(">3H", 1000, 2000, 3000)
    values = chunk(b"IDAT", zlib.compress(b"\0" + clear + struct.pack(">3H", 50_000, 2000, 3000)))
    content = PNG + header + chunk(b"tRNS", clear) + values + chunk(b"IEND", b"")
    assert decoded(content)[0].tolist() == [[255] * 3, [195, 7, 11]]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7))),
        (b"iTXt", XMP + zlib.compress(bytes(10**7))),
        (b"iCCP", b"p\0\0" + zlib.compress(bytes(10**7))),
        (b"gAMA", b"\0"),
        (b"pHYs", b"\0"),
        (b"acTL", b"\0"),
    ],
)
def test_damaged_or_large_metadata_of_a_png_leaves_its_pixels(kind, content):
    assert (decoded(with_chunk(kind, content)) == pixels(1)).all()


@pytest.mark.parametrize(
    ("kind", "pack"), [(b"tEXt", lambda text: text), (b"zTXt", lambda text: b"\0" + zlib.compress(text))]
)
def test_orientation_in_a_text_of_a_png_is_applied(kind, pack):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    text = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n".encode()  # as ImageMagick writes it
    assert (decoded(with_chunk(kind, b"Raw profile type exif\0" + pack(text))) == np.rot90(pixels(1), -1)).all()


def test_a_png_whose_text_has_a_wrong_checksum_is_read():
    at = png(1).index(b"IDAT") - 4
    wrong = chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    assert (decoded(png(1)[:at] + wrong + png(1)[at:]) == pixels(1)).all()
