"""Reads many files one after another and works on their contents in threads; results come in the files' order.

Reading in order keeps compressed archives fast; decoding and hashing release Python's lock, so threads share them out.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.core.data.images import Unreadable
from pipeline.core.intake.sources import SourceFile
from pipeline.core.progress import Progress

Result = TypeVar("Result")
CHUNK_FILES, CHUNK_BYTES = 64, 16_000_000  # what a thread is given at a time


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
