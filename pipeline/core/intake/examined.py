"""What decoding showed of images, by their content, kept between runs.

A `prepare` that was killed, or that finds more images than last time, reads all files and decodes those alone that no
run before it has decoded. What is known of an image is never taken from a file's name or date.
"""

from pathlib import Path
from typing import Self

from pipeline.core.data import image_files, images
from pipeline.core.data.image_files import Unreadable
from pipeline.core.data.images import decode_first
from pipeline.core.intake.choose import Picture
from pipeline.core.intake.journal import Journal


class Examined:
    """Decodes images that were not decoded before; what cannot be used is tried anew by each run.

    Args:
        scratch: the folder of what is known.
        max_pixels: an image with more is refused.
    """

    def __init__(self, scratch: Path, max_pixels: int):
        self._max_pixels = max_pixels
        self._journal = Journal(scratch, "examined", [max_pixels], [__file__, images.__file__, image_files.__file__])
        self._known = {sha256: Picture(*found) for sha256, *found in self._journal.lines()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.close()

    def __len__(self) -> int:
        return len(self._known)

    def picture(self, sha256: str, encoded: bytes) -> Picture | Unreadable:
        """Say what an image is; may be called in any thread.

        Args:
            sha256: of the file's content, in hex.
            encoded: the file's content.
        """
        if sha256 not in self._known:
            try:
                image, frames = decode_first(encoded, self._max_pixels)
            except Unreadable as error:
                return Unreadable(error.reason, error.detail)  # without the frames it passed through, with the content
            self._known[sha256] = Picture(image.width, image.height, frames)
            self._journal.add(sha256, image.width, image.height, frames)
        return self._known[sha256]
