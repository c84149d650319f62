"""What is seen of an image file without decoding it: segments, chunks, checksums, and an end that is missing."""

import struct
import zlib
from collections.abc import Iterator

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # how these files begin
TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # PNG's chunks of text, and the keys of texts that may turn an image
TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


class Unreadable(ValueError):
    """Bytes that are no usable image.

    Attributes:
        reason: one of a few fixed phrases, to count by.
        detail: what exactly was found; may be empty.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def check_whole(encoded: bytes) -> None:
    """Find the damage that PIL decodes without a word.

    A JPEG file whose tail was lost and filled with zeros, a PNG file with a wrong checksum or without an end.

    Raises:
        Unreadable: the end is missing, or a checksum is wrong.
    """
    if encoded.startswith(b"\xff\xd8\xff"):
        _check_jpeg(encoded)
    elif encoded.startswith(PNG):
        _check_png(encoded)
    elif encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP" and len(encoded) >= 12:
        missing = struct.unpack("<I", encoded[4:8])[0] + 8 - len(encoded)
        if missing > 0:
            raise Unreadable("truncated", f"{missing} bytes are missing")


def _check_jpeg(encoded: bytes) -> None:
    """Look for the end-of-image marker after the start of the first scan.

    Searching the whole file would be wrong: thumbnails in its header have scans and ends of their own.
    """
    at = first_scan(encoded)
    if at + 4 > len(encoded):
        raise Unreadable("truncated", "ends within its header")
    if encoded[at : at + 2] == b"\xff\xda" and encoded.find(b"\xff\xd9", at) < 0:
        raise Unreadable("truncated", "no end-of-image marker")
    # Anything else is no segment: PIL decides.


def first_scan(encoded: bytes) -> int:
    """Walk a JPEG file from segment to segment to the first scan, or to what is no segment; give its place."""
    at = 2
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xDA:  # start of scan; inside it FF is always followed by 00 or by a restart marker
            break
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")  # FF FF: padding
    return at


def _check_png(encoded: bytes) -> None:
    """Check the checksums of the chunks that hold pixels, and that the last chunk is there."""
    kind = b""
    for kind, whole in _png_chunks(encoded):
        needed = kind[:1].isupper()  # an upper-case letter: the image depends on this chunk
        if needed and zlib.crc32(whole[4:-4]) != int.from_bytes(whole[-4:], "big"):
            raise Unreadable("unreadable", f"wrong checksum in PNG chunk {kind.decode('latin-1')}")
    if kind != b"IEND":
        raise Unreadable("truncated", "no end chunk")


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Give each whole chunk of a PNG file, to the last one: its kind, and its bytes with length and checksum."""
    at, kind = 8, b""
    while at + 12 <= len(encoded) and kind != b"IEND":
        length, kind = struct.unpack(">I4s", encoded[at : at + 8])
        whole = encoded[at : at + 12 + length]
        if len(whole) == 12 + length:
            yield kind, whole
        at += 12 + length


def without_metadata(content: bytes) -> bytes:
    """Give a PNG file without the chunks that its pixels do not need: PIL refuses a file for damaged or large ones."""
    kept = [PNG]
    for kind, whole in _png_chunks(content):
        text = whole[8:-4]
        sound = zlib.crc32(whole[4:-4]) == int.from_bytes(whole[-4:], "big")
        turns = kind == b"eXIf" or (kind in TEXTS and text.startswith(TURNING))  # the image must be set upright
        moves = kind in (b"fcTL", b"fdAT") or (kind == b"acTL" and len(text) == 8)  # an animation, whose frames count
        if kind[:1].isupper() or kind == b"tRNS" or (sound and (turns or moves)):
            kept.append(whole)
    return b"".join(kept)
