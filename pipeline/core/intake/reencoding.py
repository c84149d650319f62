"""Images encoded anew at preparation: at most so many pixels a side, as JPEG, for those who want half the decoding.

What comes out lies in a scratch file until the data set is in place, so that no image is encoded twice, not by a run
that goes on after a kill either; so the disk holds the new bytes twice until prepare ends. Colour is subsampled (4:2:0,
PIL's default for JPEG).
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

from PIL import Image

from pipeline.core.data import image_files, images
from pipeline.core.data.image_files import Unreadable
from pipeline.core.data.images import decode
from pipeline.core.intake.choose import Found, Stored
from pipeline.core.intake.image_shards import Sample
from pipeline.core.intake.journal import Journal
from pipeline.core.intake.reading import in_threads
from pipeline.core.intake.sources import SourceFile
from pipeline.core.progress import Progress

ENCODED = "encoded"  # what journals of encoded images are called
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
    """Encodes files anew and keeps what comes out in a scratch folder, as journal of kind ENCODED and a file beside it.

    A context manager around `add`: a stopped run, too, leaves all that it has encoded to the next. `contents` opens the
    file itself.

    Args:
        scratch: the folder; what an unfinished run has left there for the same settings is not encoded again.
        max_side, quality: as for `encode`.
    """

    def __init__(self, scratch: Path, max_side: int | None, quality: int):
        self._work = partial(_look, max_side=max_side, quality=quality)
        self._journal = Journal(
            scratch, ENCODED, [max_side, quality], [__file__, images.__file__, image_files.__file__]
        )
        self._path = self._journal.path.with_suffix(".jpegs")
        self._file = self._path.open("a+b")
        self._places: dict[str, tuple[int, int]] = {}  # by SHA-256 of the encoded bytes: start, length
        self._stored: dict[str, Stored] = {}  # by SHA-256 of the file
        for of_file, start, *encoded in self._journal.lines():
            stored = Stored(*encoded)
            self._file.seek(start)
            if hashlib.sha256(self._file.read(stored.length)).hexdigest() == stored.sha256:  # else it was cut off
                self._stored[of_file], self._places[stored.sha256] = stored, (start, stored.length)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._journal.close()

    def add(self, found: list[Found], max_bytes: int) -> dict[str, Stored]:
        """Encode files; give what is stored of each, by the SHA-256 of the file.

        Raises:
            ValueError: a file is not what it was.
        """
        missing = [each for each in found if each.sha256 not in self._stored]
        if len(missing) < len(found):
            there = len(found) - len(missing)
            print(f"prepare: {there:,} images were encoded by an unfinished run", file=sys.stderr, flush=True)
        results = in_threads([each.file for each in missing], self._work, max_bytes, "prepare: encode")
        end = self._file.seek(0, os.SEEK_END)
        for each, result in zip(missing, results, strict=True):
            if isinstance(result, Unreadable) or result[0] != each.sha256:
                raise ValueError(f"{each.file.name}: the file changed while it was read; run prepare again")
            _, encoded, width, height = result
            stored = Stored(hashlib.sha256(encoded).hexdigest(), len(encoded), width, height)
            if stored.sha256 not in self._places:
                self._places[stored.sha256] = end, len(encoded)
                end += self._file.write(encoded)
            self._journal.add(each.sha256, self._places[stored.sha256][0], *stored)
            self._stored[each.sha256] = stored
        return {each.sha256: self._stored[each.sha256] for each in found}

    def contents(self, samples: list[Sample]) -> Iterator[tuple[Sample, bytes]]:
        """Give the bytes of samples, once all are added and this is closed."""
        with self._path.open("rb") as file, Progress(len(samples), "images", "prepare: write") as progress:
            for sample in samples:
                start, length = self._places[sample.sha256]
                file.seek(start)
                yield sample, file.read(length)
                progress.update()


def _look(file: SourceFile, content: bytes, *, max_side: int | None, quality: int) -> tuple[str, bytes, int, int]:
    return hashlib.sha256(content).hexdigest(), *encode(content, max_side, quality)
