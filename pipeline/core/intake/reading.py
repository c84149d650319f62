"""Reads many files one after another, and hashes, decodes or encodes them in threads; results come in the files' order.

Reading in order keeps compressed archives fast; decoding and hashing release Python's lock, so threads share them out.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from pipeline.core.data.image_files import Unreadable
from pipeline.core.intake.choose import Found, Picture, Pictures
from pipeline.core.intake.examined import Examined
from pipeline.core.intake.refusals import Refusal
from pipeline.core.intake.sources import Source, SourceFile
from pipeline.core.progress import Progress

Result = TypeVar("Result")
CHUNK_FILES, CHUNK_BYTES = 64, 16_000_000  # what a thread is given at a time


def read_all(
    sources: list[Source], examined: Examined, max_bytes: int, labelled_later: bool
) -> tuple[list[Found], Pictures, list[Refusal]]:
    """Hash every file and decode its image.

    Args:
        sources: whose files.
        examined: decodes them.
        max_bytes: a larger file is refused unread.
        labelled_later: leave the labelled images of train to `add_pictures`.

    Returns:
        the files that were read, what their contents are, and the files that could not be read.
    """
    found, pictures, refusals = [], {}, []

    def look(all_now: bool, file: SourceFile, encoded: bytes) -> tuple[str, int, Picture | Unreadable | None]:
        sha256 = hashlib.sha256(encoded).hexdigest()
        picture = examined.picture(sha256, encoded) if all_now or not file.class_name else None
        return sha256, len(encoded), picture

    for source in sources:
        work = partial(look, source.role != "train" or not labelled_later)
        results = in_threads(source.files, work, max_bytes, f"prepare: read {source.role}")
        for file, result in zip(source.files, results, strict=True):
            if isinstance(result, Unreadable):
                refusals.append(Refusal(source.role, file.name, result.reason, result.detail))
                continue
            sha256, length, picture = result
            found.append(Found(source.role, file, sha256, length))
            if picture is not None:
                pictures[sha256] = picture
    return found, pictures, refusals


def add_pictures(pictures: Pictures, examined: Examined, max_bytes: int, found: list[Found]) -> None:
    """Decode the contents that are not in `pictures` yet, and add them."""
    missing = [each for each in found if each.sha256 not in pictures]
    if missing:
        work = lambda file, encoded: examined.picture(hashlib.sha256(encoded).hexdigest(), encoded)  # noqa: E731
        results = in_threads([each.file for each in missing], work, max_bytes, "prepare: decode")
        for each, picture in zip(missing, results, strict=True):
            pictures[each.sha256] = picture


def in_threads(
    files: list[SourceFile], work: Callable[[SourceFile, bytes], Result], max_bytes: int, what: str
) -> Iterator[Result | Unreadable]:
    """Give the result of `work` for each file, or why it could not be had.

    Args:
        files: what to read.
        work: called with a file and its content, in any thread; may raise Unreadable.
        max_bytes: a larger file is not read.
        what: the work's name in the progress line.
    """
    threads = os.cpu_count() or 1
    waiting: deque[Future[list[Result | Unreadable]]] = deque()
    with ThreadPoolExecutor(threads) as pool, Progress(len(files), "files", what) as progress:
        for chunk in _chunks(files, max_bytes):
            waiting.append(pool.submit(_work_on, work, chunk))
            if len(waiting) > threads:
                done = waiting.popleft().result()
                progress.update(len(done))
                yield from done
        while waiting:
            done = waiting.popleft().result()
            progress.update(len(done))
            yield from done


def _chunks(files: Iterable[SourceFile], max_bytes: int) -> Iterator[list[tuple[SourceFile, bytes | Unreadable]]]:
    chunk, size = [], 0
    for file in files:
        try:
            if file.size > max_bytes:
                raise Unreadable("too many bytes", f"{file.size:,}; no image of prepare.max_pixels has so many")
            content = file.read()
        except Unreadable as error:
            content = _bare(error)
        chunk.append((file, content))
        size += file.size
        if len(chunk) >= CHUNK_FILES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _work_on(
    work: Callable[[SourceFile, bytes], Result], chunk: list[tuple[SourceFile, bytes | Unreadable]]
) -> list[Result | Unreadable]:
    results: list[Result | Unreadable] = []
    for file, content in chunk:
        try:
            results.append(content if isinstance(content, Unreadable) else work(file, content))
        except Unreadable as error:
            results.append(_bare(error))
    return results


def _bare(error: Unreadable) -> Unreadable:
    """Copy an error without the frames it passed through, which would keep the file's content in memory."""
    return Unreadable(error.reason, error.detail)
