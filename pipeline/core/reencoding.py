"""Images encoded anew at preparation: at most so many pixels a side, as JPEG, for those who want half the decoding.

What comes out lies in a file without a name until it is written into shards, so that no image is encoded twice; so the
disk holds the new bytes twice until prepare ends. Colour is subsampled (4:2:0, PIL's default for JPEG).
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline.core.choose import Found, Stored
from pipeline.core.images import Unreadable, decode
from pipeline.core.progress import Progress
from pipeline.core.reading import in_threads
from pipeline.core.shards import Sample
from pipeline.core.sources import SourceFile

JPEG_SIDE = 65_500  # pixels; libjpeg writes no longer side


def encode(content: bytes, max_side: int | None, quality: int) -> tuple[bytes, int, int]:
    """Encode an image as a JPEG file, upright, without metadata.

    Its own bytes stay where it is small enough, and JPEG would take more bytes.

    Args:
        content: of a file that `decode` takes.
        max_side: pixels that the longer side may have; None: any number.
        quality: libjpeg's, 1 to 100.

    Returns:
        the bytes, and the upright image's width and height.
    """
    image = decode(content)
    least = min(max_side or JPEG_SIDE, JPEG_SIDE) / max(image.size)
    if least < 1:
        width, height = (max(1, round(side * least)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, comment=b"")
    encoded = out.getvalue()
    return (content if least >= 1 and len(content) <= len(encoded) else encoded), *image.size


class Reencoded:
    """Encodes files anew and keeps what comes out in a file that goes when this does.

    Args:
        folder: where there is room.
        max_side, quality: as for `encode`.
    """

    def __init__(self, folder: Path, max_side: int | None, quality: int):
        self._work = partial(_look, max_side=max_side, quality=quality)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it is open as long as this object is there
        self._places: dict[str, tuple[int, int]] = {}  # by SHA-256 of the encoded bytes: start, length

    def add(self, found: list[Found], max_bytes: int) -> dict[str, Stored]:
        """Encode files; give what is stored of each, by the SHA-256 of the file.

        Raises:
            ValueError: a file is not what it was.
        """
        stored: dict[str, Stored] = {}
        files = [each.file for each in found]
        results = in_threads(files, self._work, max_bytes, "prepare: encode")
        for each, result in zip(found, results, strict=True):
            if isinstance(result, Unreadable) or result[0] != each.sha256:
                raise ValueError(f"{each.file.name}: the file changed while it was read; run prepare again")
            _, encoded, width, height = result
            sha256 = hashlib.sha256(encoded).hexdigest()
            if sha256 not in self._places:
                self._places[sha256] = self._file.tell(), len(encoded)
                self._file.write(encoded)
            stored[each.sha256] = Stored(sha256, len(encoded), width, height)
        self._file.flush()
        return stored

    def contents(self, samples: list[Sample]) -> Iterator[tuple[Sample, bytes]]:
        """Give the bytes of samples."""
        with Progress(len(samples), "images", "prepare: write") as progress:
            for sample in samples:
                start, length = self._places[sample.sha256]
                yield sample, os.pread(self._file.fileno(), length, start)
                progress.update()


def _look(file: SourceFile, content: bytes, *, max_side: int | None, quality: int) -> tuple[str, bytes, int, int]:
    return hashlib.sha256(content).hexdigest(), *encode(content, max_side, quality)
