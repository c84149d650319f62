"""What images of every kind decode to, and which are refused and why."""

import io
import math
import pickle
import zlib

import numpy as np
import pytest
import simplejpeg
from made_images import (
    XMP,
    encode,
    grey_tiff,
    half_lost,
    picture,
    pixels,
    planar_tiff,
    png,
    png_bomb,
    rotated_jpeg,
    several,
    with_chunk,
    with_flipped_bit,
    ycck_jpeg,
    zero_filled,
)
from PIL import Image, ImageOps

from pipeline.core.data import images
from pipeline.core.data.image_files import Unreadable

JPEG = encode(picture(0, 60, 80), "JPEG")
PROGRESSIVE = encode(picture(0, 60, 80), "JPEG", progressive=True)
OTHER_COLOURS = {  # JPEG files whose pixels are PIL's
    "CMYK": encode(picture(0, 60, 80).convert("CMYK"), "JPEG"),
    "YCCK": ycck_jpeg(0),
    "RGB": encode(picture(0, 60, 80), "JPEG", keep_rgb=True),
}
LIMIT = 10_000_000


def decoded(content: bytes) -> np.ndarray:
    image = images.decode(content, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_that_were_stored(kind):
    assert (decoded(encode(picture(1), kind)) == pixels(1)).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000", "GIF"])
def test_other_formats_are_read(kind):
    assert decoded(encode(picture(1), kind)).shape == (20, 30, 3)


def test_exif_orientation_is_applied():
    upright = decoded(rotated_jpeg(1))
    assert upright.shape == (30, 20, 3)
    stored = np.asarray(Image.open(io.BytesIO(rotated_jpeg(1))))
    assert (upright == np.rot90(stored, k=-1)).all()  # orientation 6: turn by 90 degrees clockwise


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation_is_undone(orientation):
    # How a camera held in eight ways stores one and the same scene.
    store = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, k=-1),
    }
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store[orientation](pixels(2))))
    assert (decoded(encode(stored, "PNG", exif=exif)) == pixels(2)).all()


def test_damaged_exif_data_leaves_the_pixels_as_stored():
    exif = Image.Exif()
    exif[0x112] = 6
    content = encode(picture(1), "JPEG", exif=exif)
    at = content.index(b"Exif\0\0") + 6
    assert decoded(content[:at] + b"XXXX" + content[at + 4 :]).shape == (20, 30, 3)


@pytest.mark.parametrize("damaged", [bytes(8), b"II*\0\x08\0"])
def test_what_prepare_takes_with_damaged_exif_data_is_decoded_for_views_too(damaged):
    plain = encode(picture(1), "JPEG", dpi=(72, 72))  # with a density PIL does not look at EXIF data on its own
    exif = b"Exif\0\0" + damaged
    content = plain[:20] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[20:]
    for shrink in (0.1, 1.0):
        view = images.pixels(images.Encoded(content, 30, 20), shrink)
        assert np.array_equal(view, images.pixels(images.Encoded(plain, 30, 20), shrink))
    assert (decoded(content) == decoded(plain)).all()


@pytest.mark.parametrize(
    ("holder", "name", "error", "content"),
    [
        (images, "to_rgb", MemoryError(), png(1)),
        (ImageOps, "exif_transpose", MemoryError(), rotated_jpeg(1)),
        (simplejpeg, "decode_jpeg", ValueError("Insufficient memory (case 4)"), PROGRESSIVE),
    ],
)
def test_that_memory_is_short_is_not_said_of_the_image(monkeypatch, holder, name, error, content):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(holder, name, fail)
    with pytest.raises(MemoryError):
        images.decode(content)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 256, 257, 30_000, 65_535]], np.uint16)
    wanted = np.round(values / 65_535 * 255)
    for kind in ("PNG", "TIFF"):
        assert (decoded(encode(Image.fromarray(values), kind))[..., 0] == wanted).all()
    for compression in ("raw", "tiff_lzw"):  # PIL decodes them apart
        white_is_0 = encode(Image.fromarray(values), "TIFF", compression=compression, tiffinfo={262: 0})
        assert (decoded(white_is_0)[..., 0] == 255 - wanted).all()
    as_pgm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    assert (decoded(as_pgm)[..., 0] == wanted).all()


def test_a_tiff_file_may_store_its_colours_one_behind_the_other():
    channels = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    assert np.array_equal(decoded(planar_tiff(channels)), channels.transpose(1, 2, 0))


def test_tiff_grey_of_8_12_and_16_bits_is_scaled_whether_zero_is_black_or_white():
    ramp = bytes([0, 85, 170, 255])
    wide = np.array([0, 21_845, 43_690, 65_535], "<u2").tobytes()
    for interpretation, wanted in ((1, list(ramp)), (0, list(ramp)[::-1])):
        assert decoded(grey_tiff(ramp, 4, 8, interpretation))[0, :, 0].tolist() == wanted
        assert decoded(grey_tiff(wide, 4, 16, interpretation))[0, :, 0].tolist() == wanted
    assert decoded(grey_tiff(bytes.fromhex("000555aaafff"), 4, 12, 1))[0, :, 0].tolist() == list(ramp)


def test_grey_and_one_bit_images_get_three_equal_channels():
    grey = picture(3).convert("L")
    assert (decoded(encode(grey, "PNG")) == np.asarray(grey)[..., None]).all()
    bits = picture(3).convert("1")
    assert (decoded(encode(bits, "PNG")) == np.asarray(bits)[..., None] * 255).all()


def test_transparent_parts_become_white_in_proportion():
    alpha = np.linspace(0, 255, 600).reshape(20, 30, 1).round().astype(np.uint8)
    rgba = np.concatenate([pixels(4), alpha], axis=2)
    wanted = pixels(4) * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(decoded(encode(Image.fromarray(rgba), "PNG")) - wanted).max() <= 1
    grey_alpha = rgba[..., 2:]
    wanted = grey_alpha[..., :1] * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(decoded(encode(Image.fromarray(grey_alpha), "PNG")) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_a_transparent_colour_becomes_white(mode):
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 40_000]], np.uint16))
    else:
        image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8)).convert(mode)
    content = encode(image, "PNG", transparency=image.getpixel((0, 0)))
    assert decoded(content)[0, 0].tolist() == [255, 255, 255]
    other = 156 if mode == "I;16" else 255  # 40,000 / 257
    assert decoded(content)[0, 1].tolist() == [other] * 3


def test_cmyk_jpeg_has_the_colours_of_its_rgb_original():
    flat = Image.new("RGB", (32, 32), (200, 100, 50))
    assert np.abs(decoded(encode(flat.convert("CMYK"), "JPEG", quality=95)) - [200, 100, 50]).max() <= 6


@pytest.mark.parametrize("colours", OTHER_COLOURS)
def test_whole_jpeg_files_of_other_colours_have_pils_pixels(colours):
    content = OTHER_COLOURS[colours]
    assert simplejpeg.decode_jpeg_header(content)[2] == colours
    wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (decoded(content) == wanted).all()
    assert np.array_equal(images.pixels(images.Encoded(content, 80, 60)), wanted)


def test_palette_image():
    palette = picture(5).convert("P")
    assert (decoded(encode(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO", "PNG"])
def test_of_several_frames_the_first_is_decoded_and_all_are_counted(kind):
    image, frames = images.decode_first(several(kind, 7), LIMIT)
    assert frames == 3
    distance = [np.abs(np.asarray(image).astype(int) - pixels(7 + at)).mean() for at in range(3)]
    assert distance[0] < min(distance[1:])
    assert images.decode_first(png(7), LIMIT)[1] == 1


BAD = {
    "empty": (b"", "zero bytes"),
    "text": (b"this is no image, whatever its name says", "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage", "not an image"),
    "jpeg, half": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg, two bytes short": (JPEG[:-2], "truncated"),
    "jpeg, only the header": (JPEG[:100], "truncated"),
    "jpeg, zeros for a half": (zero_filled(JPEG), "truncated"),
    "jpeg, half, then an end": (half_lost(JPEG), "unreadable"),
    **{f"{colours} jpeg, half": (half_lost(content), "unreadable") for colours, content in OTHER_COLOURS.items()},
    "progressive jpeg, half": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
    "progressive jpeg, zeros": (zero_filled(PROGRESSIVE), "truncated"),
    "png, half": (png(1)[:900], "truncated"),
    "png, no end": (png(1)[:-12], "truncated"),
    "png, wrong bit in pixels": (with_flipped_bit(png(1), 500), "unreadable"),
    "png, wrong bit in header": (with_flipped_bit(png(1), 20), "unreadable"),
    "gif": (several("GIF", 1)[:1200], "truncated"),
    "webp": (several("WEBP", 1)[:-20], "truncated"),
    "bmp": (encode(picture(1), "BMP")[:-200], "truncated"),
    "tiff": (encode(picture(1), "TIFF")[:300], "truncated"),
    "avif": (encode(picture(1), "AVIF")[:-100], "truncated"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "unreadable"),
    "floating point": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unreadable"),
    "32 bit, small values": (encode(Image.fromarray(np.full((4, 4), 255, np.int32)), "TIFF"), "unreadable"),
    "32 bit": (encode(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"), "unreadable"),
    "16 bit, colour by colour": (planar_tiff(np.full((3, 4, 5), 7, np.uint16)), "unreadable"),
    "bomb": (png_bomb(), "too many pixels"),
    "text bomb": (with_chunk(b"iTXt", XMP + zlib.compress(bytes(7 * 10**7))), "unreadable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_with_a_reason(name):
    content, reason = BAD[name]
    with pytest.raises(Unreadable) as caught:
        images.decode(content, LIMIT)
    assert caught.value.reason == reason


def test_every_cut_of_a_jpeg_and_a_png_is_found():
    for content in (encode(picture(2, 16, 16), "JPEG"), encode(picture(2, 16, 16), "PNG")):
        for length in range(1, len(content)):
            with pytest.raises(Unreadable):
                images.decode(content[:length], LIMIT)


def test_bytes_after_the_end_of_a_jpeg_do_not_matter():
    # Phones append films and maps, which hold marker-like bytes.
    assert (decoded(JPEG + b"\xff\xda" + bytes(100)) == decoded(JPEG)).all()


def test_a_thumbnail_does_not_hide_a_truncated_jpeg():
    exif = Image.Exif()
    exif[0x9C9B] = encode(picture(9), "JPEG")  # any field that holds a whole JPEG file
    content = encode(picture(0, 60, 80), "JPEG", exif=exif)
    assert content.count(b"\xff\xd9") >= 2
    with pytest.raises(Unreadable, match="truncated"):
        images.decode(zero_filled(content), LIMIT)


def test_the_limit_is_on_pixels():
    assert images.decode(png(1), 600).size == (30, 20)
    with pytest.raises(Unreadable, match="30 x 20"):
        images.decode(png(1), 599)


def test_unreadable_survives_pickling():
    error = pickle.loads(pickle.dumps(Unreadable("truncated", "why")))
    assert (error.reason, error.detail, str(error)) == ("truncated", "why", "truncated: why")


def test_png_encoding_is_lossless_and_stored_uncompressed():
    content = images.encode_png(picture(1))
    assert (decoded(content) == pixels(1)).all()
    assert len(content) > pixels(1).nbytes  # no compressor's version decides on the bytes


def test_stray_bytes_and_xmp_orientation_give_the_same_pixels_to_every_stage():
    plain = encode(picture(1), "JPEG")
    stray = plain[:-2] + bytes([1, 2, 3]) + plain[-2:]  # before the end marker
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:]
    between = plain[:20] + bytes([1, 2, 3]) + plain[20:]  # after the first segment
    revision = plain[:11] + b"\2" + plain[12:]  # of JFIF: one that there is not
    grey = encode(picture(1).convert("L"), "JPEG")
    cmyk = encode(picture(1).convert("CMYK"), "JPEG")
    for content in (plain, stray, between, revision, turned, grey, cmyk, png(1)):
        upright = images.decode(content)
        encoded = images.Encoded(content, upright.width, upright.height)
        assert np.array_equal(images.pixels(encoded), np.array(upright))
    assert images.decode(turned).size == images.decode(plain).size[::-1]


def test_what_was_decoded_last_is_kept_and_no_more_than_fits():
    side = math.isqrt(images.RECENT.maxsize // 9)  # three fit
    encoded = [images.Encoded(encode(Image.new("RGB", (side, side), (n, 0, 0)), "PNG"), side, side) for n in range(4)]
    first = [images.pixels(image) for image in encoded[:3]]
    assert images.pixels(encoded[0]) is first[0]
    images.pixels(encoded[3])  # in the place of the second, which was asked for longest ago
    assert images.RECENT.currsize == 3 * first[0].nbytes
    assert images.pixels(encoded[0]) is first[0]
    assert images.pixels(encoded[2]) is first[2]
    again = images.pixels(encoded[1])
    assert again is not first[1]
    assert np.array_equal(again, first[1])


def test_an_image_larger_than_all_that_may_be_kept_is_decoded_all_the_same():
    side = math.isqrt(images.RECENT.maxsize // 3) + 1
    image = images.Encoded(encode(Image.new("RGB", (side, side), (7, 8, 9)), "PNG"), side, side)
    before = images.RECENT.currsize
    for _ in range(2):
        assert (images.pixels(image) == (7, 8, 9)).all()
    assert images.RECENT.currsize == before


@pytest.mark.parametrize("size", [(8, 8), (81, 64), (100, 37)])
def test_a_jpeg_is_decoded_to_the_size_that_simplejpeg_takes(size):
    content = encode(picture(0).resize(size), "JPEG")
    for shrink in np.linspace(0.02, 1, 50):
        sides = [math.ceil(side * shrink) for side in size]
        least = {"min_width": sides[0], "min_height": sides[1]} if shrink <= 0.5 else {}
        expected = simplejpeg.decode_jpeg(content, "RGB", **least)
        assert np.array_equal(images.pixels(images.Encoded(content, *size), shrink), expected)
