"""Ctrl-C and SIGTERM, while a short piece of work is finished first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until a short piece of work is done; a second Ctrl-C does not wait."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in came:
            raise KeyboardInterrupt
        came.append(signum)

    handled = signal.SIGINT, signal.SIGTERM
    on_main_thread = threading.current_thread() is threading.main_thread()  # no other may handle signals
    before = {signum: signal.getsignal(signum) for signum in handled if on_main_thread}
    listened_to = {signum: handler for signum, handler in before.items() if callable(handler)}
    for signum in listened_to:
        signal.signal(signum, note)
    try:
        yield
    finally:
        for signum, handler in listened_to.items():
            signal.signal(signum, handler)
    if came:
        listened_to[came[0]](came[0], None)
