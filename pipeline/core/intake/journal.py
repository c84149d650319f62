"""What long work over images has found so far, kept in a scratch folder: a killed run need not do all of it again."""

import hashlib
import json
import threading
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import PIL


class Journal:
    """A file of JSON lists, one a line behind its checksum (CRC-32); threads may add to it side by side.

    A kill loses the last lines at most, those that were still in memory; a line that was cut off or damaged is passed
    over.

    Args:
        scratch: the folder where it lies.
        kind: of work; its file's name begins so.
        settings: of the work.
        code: the source files that do it. The journal is named after them, the settings and the versions of Pillow and
            simplejpeg; journals of the same kind that depend on others are taken away, with what lies beside them under
            the same name.
    """

    def __init__(self, scratch: Path, kind: str, settings: list[Any], code: list[str]):
        sources = [Path(file).read_text(encoding="utf-8") for file in code]
        depends_on = json.dumps([PIL.__version__, version("simplejpeg"), settings, sources])
        self.path = scratch / f"{kind}-{hashlib.sha256(depends_on.encode()).hexdigest()[:16]}.jsonl"
        remove(scratch, kind, but=self.path.stem)
        self._file = self.path.open("a+b")
        self._lock = threading.Lock()

    def lines(self) -> Iterator[list[Any]]:
        """Give the lines that were there when it was opened."""
        self._file.seek(0)
        for line in self._file:
            checksum, _, content = line.rstrip(b"\n").partition(b" ")
            if checksum == _checksum(content):
                yield json.loads(content)

    def add(self, *content: Any) -> None:
        """Add a line.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps(content).encode()
        with self._lock:
            self._file.write(b"\n%b %b" % (_checksum(line), line))  # the break first: the line before may be cut off

    def close(self) -> None:
        """Write down what is still in memory."""
        self._file.close()


def _checksum(content: bytes) -> bytes:
    return b"%08x" % zlib.crc32(content)


def remove(scratch: Path, kind: str, but: str = "") -> None:
    """Take away the journals of a kind, and what lies beside each under the same name, but those of one name."""
    for file in scratch.glob(f"{kind}-*"):
        if file.stem != but:
            file.unlink()
