"""Encoded image bytes to upright 8-bit RGB pixels; bytes that cannot be trusted are refused with a reason.

Read: nothing but the bytes given. Only formats that hold pixels are opened (no EPS, PDF or WMF: they run programs).
"""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import cachetools
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from pipeline.core import errors
from pipeline.core.data.image_files import JPEG, PNG, Unreadable, check_whole, first_scan, without_metadata

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")  # JPEG includes MPO
# How those formats (and HEIC, which cannot be read here) begin: offset, bytes. A file that begins like an image but
# cannot be opened is a damaged image; any other is not an image.
BEGINNINGS = (
    (0, b"\xff\xd8\xff"),
    (0, PNG),
    (0, b"GIF87a"),
    (0, b"GIF89a"),
    (8, b"WEBP"),
    (0, b"II*\0"),
    (0, b"MM\0*"),
    (4, b"ftyp"),
    (4, b"jP  \r\n"),
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm", ".pgm"}

ORIENTATION = 0x112  # EXIF's tag
BITS_PER_SAMPLE, INTERPRETATION, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value of the second
PLANES, APART = 284, 2  # the tag for the layout of colours, and its value where each is stored apart
# How a JPEG file may store colours, and what simplejpeg then makes of them: PIL's very pixels, or what only libjpeg's
# complaints are wanted of.
AS_PIL_DOES = {"YCbCr": "RGB", "Gray": "RGB"}
ONLY_TO_CHECK = {"RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}

# The images that a process decoded last, as many as fit into so many bytes; files' contents, the keys, come on top.
RECENT = cachetools.LRUCache(32_000_000, getsizeof=lambda decoded: decoded.nbytes)

# PIL's own limit is one number for the whole process; `max_pixels` below is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # of XMP, which may turn an image: 64 MB, not 1


class Encoded(NamedTuple):
    """An image as `prepare` found it good: a file's content, and its size in pixels when upright."""

    content: bytes
    width: int
    height: int


def decode(encoded: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode the first frame of an image as upright RGB.

    EXIF orientation is applied; grey, 16-bit, palette and CMYK images are converted; transparent parts become white.

    Args:
        encoded: a file's content.
        max_pixels: an image with more pixels is refused before it is decoded; None: no limit.

    Raises:
        Unreadable: the bytes are no whole image, or one that is too large.
    """
    return decode_first(encoded, max_pixels)[0]


def decode_first(encoded: bytes, max_pixels: int | None = None) -> tuple[Image.Image, int]:
    """Decode as `decode` does, and count the frames (1 for a still image)."""
    if not encoded:
        raise Unreadable("zero bytes")
    check_whole(encoded)
    try:
        image = _open(encoded)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise Unreadable("too many pixels", f"{image.width} x {image.height}")
        stored = _decode_jpeg(encoded)
        if stored is None:
            _decode_jpeg(encoded, ONLY_TO_CHECK)
            rgb = _decode_with_pillow(image)
        else:
            rgb = Image.fromarray(stored)
            rgb.info.update(image.info)  # with its orientation
            rgb = _upright(rgb)
        return rgb, getattr(image, "n_frames", 1)
    except (Unreadable, MemoryError):  # how much memory is free says nothing about the bytes
        raise
    except UnidentifiedImageError:
        raise _not_opened(encoded) from None
    except Exception as error:  # PIL's decoders let all kinds of exceptions out on damaged bytes
        message = errors.in_a_line(error)
        raise Unreadable("truncated" if "truncated" in message.lower() else "unreadable", message) from error


def pixels(image: Encoded, shrink: float = 1.0) -> np.ndarray:
    """Decode to pixels (H, W, 3) uint8 a file that is known to be whole: as `decode` gives it; not to be written to.

    What was decoded last is kept: where the teacher is asked, an image's views are rendered one after another, and a
    small data set is decoded once.

    Args:
        image: of a file that `decode` takes.
        shrink: the share of its width and height that is needed, at most 1. From 1/2 on, JPEG files are decoded to the
            next larger size that libjpeg's scaled transform (eighths) has, which computes nothing of the full size;
            others come in full.
    """
    return _decoded(image, _eighths(image, shrink))


def _eighths(image: Encoded, shrink: float) -> int:
    """At how many eighths of its size a file is decoded, 1 to 8: the fewest of libjpeg's that leave what is needed."""
    if shrink > 0.5 or not image.content.startswith(JPEG) or _turned(image.content):
        return 8
    sides = image.width, image.height
    fits = (n for n in range(1, 8) if all(-(-side * n // 8) >= math.ceil(side * shrink) for side in sides))
    return next(fits, 8)


@cachetools.cached(RECENT, key=lambda image, eighths: (image.content, eighths))
def _decoded(image: Encoded, eighths: int) -> np.ndarray:
    content = image.content
    if _turned(content):
        return np.array(decode(content))
    sides = {"min_width": -(-image.width * eighths // 8), "min_height": -(-image.height * eighths // 8)}
    stored = _decode_jpeg(content, **sides)
    return np.array(_decode_with_pillow(_open(content))) if stored is None else stored


def _open(content: bytes) -> Image.Image:
    if not content.startswith(PNG):
        return Image.open(io.BytesIO(content), formats=FORMATS)
    image = Image.open(io.BytesIO(without_metadata(content)), formats=FORMATS)
    bits, transparent = content[24], image.info.get("transparency")  # which PIL leaves in the file's range
    if bits < 8 and isinstance(transparent, int) and image.mode == "L":
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    elif bits == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def _decode_with_pillow(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANES) == APART and max(tags.get(BITS_PER_SAMPLE, (1,))) > 8:  # which PIL mixes up
        raise Unreadable("unreadable", "a TIFF file of more than 8 bits, stored colour by colour; save it interleaved")
    image.load()
    return to_rgb(_upright(image))


def _decode_jpeg(content: bytes, wanted: dict[str, str] = AS_PIL_DOES, **least_sides: int) -> np.ndarray | None:
    """Decode a grey or YCbCr JPEG file as PIL does, but faster, and as it is stored; None where PIL has to decide.

    Args:
        content: of any file.
        wanted: the colours to decode, and what to.
        least_sides: of the smallest size that will do.

    Raises:
        Unreadable: libjpeg's first complaint is that it made up pixels in place of damaged data. PIL hears of none.
    """
    if not content.startswith(JPEG):
        return None
    try:
        *_, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours in wanted:
            return simplejpeg.decode_jpeg(content, wanted[colours], **least_sides)
    except ValueError as error:
        if str(error).startswith("Insufficient memory"):
            raise MemoryError(str(error)) from None
        # PIL reads on after stray bytes, which good files have, too, and so do damaged ones, of which nothing more is
        # known then.
        if str(error).startswith("Corrupt JPEG data") and "extraneous bytes" not in str(error):
            raise Unreadable("unreadable", str(error)) from None
    return None


def _turned(content: bytes) -> bool:
    """Whether EXIF data, or XMP in its place, turns a JPEG image."""
    if not content.startswith(JPEG):
        return False
    scan = first_scan(content)
    if content.find(b"Exif\0\0", 0, scan) < 0 and content.find(b"http://ns.adobe.com/xap/", 0, scan) < 0:
        return False
    with _unless_damaged():
        return _open(content).getexif().get(ORIENTATION, 1) != 1
    return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert pixels of any mode to 8-bit RGB, over white where they are transparent.

    Raises:
        Unreadable: pixels whose range is not known (32-bit and floating-point ones).
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """Encode losslessly; the bytes, and so a sample's id, do not depend on the machine.

    Nothing is compressed, because what a compressor writes depends on its version and on the processor.
    """
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=0)
    return out.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    with _unless_damaged():
        ImageOps.exif_transpose(image, in_place=True)
    return image


@contextlib.contextmanager
def _unless_damaged() -> Iterator[None]:
    """Leave off where metadata cannot be read, which says nothing about the pixels."""
    try:
        yield
    except MemoryError:  # not so: the image would lie on its side where memory is short
        raise
    except Exception:  # PIL lets all kinds of exceptions out
        return


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # (H, W)
    tags = getattr(image, "tag_v2", {})  # a TIFF file's
    bits = max(tags.get(BITS_PER_SAMPLE, (16,)))  # PIL's mode I is that of 32 bits, and of other formats' 16
    most = 2**bits - 1  # PIL leaves 12 bits as they are
    if image.mode == "F" or bits > 16 or values.min() < 0 or values.max() > most:
        raise Unreadable("unreadable", f"pixels of 32 bits have no known range (PIL's mode {image.mode})")
    if tags.get(INTERPRETATION) == WHITE_IS_ZERO:  # PIL heeds it up to 8 bits only
        values = most - values
    grey = np.round(values / (most / 255)).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _not_opened(encoded: bytes) -> Unreadable:
    if encoded[4:8] == b"ftyp" and encoded[8:12] in (b"heic", b"heix", b"mif1", b"hevc"):
        return Unreadable("unreadable", "HEIC images are not supported; convert them to JPEG or PNG")
    if any(encoded[at : at + len(start)] == start for at, start in BEGINNINGS):
        return Unreadable("unreadable", "begins like an image, but its header is damaged, or of an unknown kind")
    return Unreadable("not an image")
