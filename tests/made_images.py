"""Small images of every kind, good and bad, made on the spot for tests."""

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image


def pixels(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    """Random colours (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(seed: int, height: int = 20, width: int = 30) -> Image.Image:
    """An image of random colours."""
    return Image.fromarray(pixels(seed, height, width))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode with PIL."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(seed: int, side: int = 96) -> Image.Image:
    """Draw noise with the spectrum of photographs: amplitudes fall as 1 / frequency."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    waves = np.fft.fft2(random.normal(size=(3, side, side))) / frequency
    pixels = np.fft.ifft2(waves).real
    pixels = 128 + 45 * pixels / pixels.std((1, 2), keepdims=True)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def png(seed: int) -> bytes:
    """A good file."""
    return encode(picture(seed), "PNG")


def several(kind: str, seed: int, count: int = 3) -> bytes:
    """A file of several frames or pages."""
    frames = [picture(seed + at) for at in range(count)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def grey_tiff(rows: bytes, width: int, bits: int, interpretation: int) -> bytes:
    """A TIFF file of one row of grey pixels, as PIL does not write it.

    Args:
        rows: the row's bytes.
        width: in pixels.
        bits: of a pixel.
        interpretation: 0: 0 is white; 1: 0 is black.
    """
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: interpretation, 273: 0, 277: 1, 278: 1, 279: len(rows)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the row is
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())  # 4: 32-bit numbers
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + listed + bytes(4) + rows


def planar_tiff(channels: np.ndarray) -> bytes:
    """A TIFF file that stores its colours one behind the other, as PIL does not write it.

    Args:
        channels: (3, H, W), uint8 or uint16.
    """
    _, height, width = channels.shape
    bits, size = 8 * channels.itemsize, channels[0].nbytes
    tags = {256: [width], 257: [height], 258: [bits] * 3, 259: [1], 262: [2], 273: [0] * 3, 277: [3], 278: [height]}
    tags |= {279: [size] * 3, 284: [2]}
    lists = 8 + 2 + 12 * len(tags) + 4  # where what does not fit into a tag is
    first = lists + 4 * sum(len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [first + number * size for number in range(3)]
    listed, behind = b"", b""
    for tag, values in tags.items():
        listed += struct.pack("<HHII", tag, 4, len(values), values[0] if len(values) == 1 else lists + len(behind))
        behind += struct.pack("<3I", *values) if len(values) > 1 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + listed + bytes(4) + behind + channels.tobytes()


def ycck_jpeg(seed: int) -> bytes:
    """A JPEG file of four colours, three of them stored as YCbCr, as printers' programs write it."""
    return simplejpeg.encode_jpeg(np.array(picture(seed, 60, 80).convert("CMYK")), 90, "CMYK", "420")


def rotated_jpeg(seed: int) -> bytes:
    """A JPEG file that its EXIF data turns by a quarter, as phones write them."""
    exif = Image.Exif()
    exif[0x112] = 6
    return encode(picture(seed), "JPEG", exif=exif)


def zero_filled(content: bytes) -> bytes:
    """A file whose second half was lost: its place was reserved on the disk, and never written."""
    half = len(content) // 2
    return content[:half] + bytes(len(content) - half)


def half_lost(content: bytes) -> bytes:
    """A JPEG file without the second half, but with the marker that ends it."""
    return content[: len(content) // 2] + b"\xff\xd9"


def with_flipped_bit(content: bytes, at: int) -> bytes:
    """The same with one bit wrong."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(side: int = 60_000) -> bytes:
    """A PNG file of some hundred bytes that says it holds 3,600 million pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


XMP = b"XML:com.adobe.xmp\0\1\0\0\0"  # how an iTXt chunk of compressed XMP begins


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """The picture 1 as a PNG file with one chunk more, behind its header."""
    return png(1)[:33] + chunk(kind, content) + png(1)[33:]
