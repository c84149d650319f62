"""Ctrl-C and SIGTERM: they raise KeyboardInterrupt, once more where it was lost; and wait for a short piece of work.

Python drops an exception that a signal raises in a finalizer, and some libraries take it for an error of their own.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

_came: list[int] = []  # the signals that were to stop this program


def stop(signum: int, frame: FrameType | None) -> None:
    """Handle a signal that is to stop the program.

    Raises:
        KeyboardInterrupt: always.
    """
    _came.append(signum)
    if signum == signal.SIGTERM:  # once: a second one must not break off the clean stop
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def hear_ctrl_c(handler: Handler = stop) -> None:
    """Have Ctrl-C call a handler from now on; what a shell has started in the background stays deaf to it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def stopping() -> bool:
    """Whether `stop` was called."""
    return bool(_came)


def stop_if_asked() -> None:
    """Stop where `stop` was called, and what it raised was lost.

    Raises:
        KeyboardInterrupt: it was.
    """
    if stopping():
        raise KeyboardInterrupt


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until a short piece of work is done; a second Ctrl-C does not wait."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in came:
            listened_to[signum](signum, frame)
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
