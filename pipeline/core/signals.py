"""Ctrl-C and SIGTERM raise KeyboardInterrupt, but not where it would be lost, nor within a short piece of work.

Where a module is imported, libraries drop that exception, or take it for an error of their own, and in a finalizer
Python itself drops it; so it waits until that is done. Where it was lost all the same, progress (progress.py) raises it
once more.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

LOOK_AGAIN = 0.05  # seconds after which to see whether an import or a finalizer is done
IMPORT = "<frozen importlib._bootstrap>"  # as Python names the file of its import system in a frame
Handler = Callable[[int, FrameType | None], None]

_came: list[int] = []  # the signals that were to stop this program


def stop(signum: int, frame: FrameType | None) -> None:
    """Handle a signal that is to stop the program.

    Raises:
        KeyboardInterrupt: at once, where nothing is imported or finalized, or it is not the first; else after that.
    """
    first = signum not in _came
    _came.append(signum)
    _stop_where_it_is_heard(signum, frame if first else None)


def _stop_where_it_is_heard(signum: int, frame: FrameType | None) -> None:
    while frame:
        if frame.f_code.co_filename == IMPORT or frame.f_code.co_name == "__del__":
            signal.signal(signal.SIGALRM, _stop_where_it_is_heard)
            signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN)
            return
        frame = frame.f_back
    if signal.SIGTERM in _came:  # another must not break off the clean stop
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop_if_asked()


def hear_ctrl_c(handler: Handler = stop) -> None:
    """Have Ctrl-C call a handler from now on; what a shell has started in the background stays deaf to it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def stopping() -> bool:
    """Whether `stop` was called."""
    return bool(_came)


def stop_if_asked() -> None:
    """Stop where `stop` was called: who still works then has not heard it, or not yet.

    Raises:
        KeyboardInterrupt: it was.
    """
    if stopping():
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt


def where_not_heard(seconds: float, end: Callable[[], object]) -> None:
    """Call a function where a signal that is to stop the program has not done so for some seconds.

    Python calls no handler while its main thread is in a library that waits, as for processes that are gone.
    """
    heard, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(heard, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        time.sleep(seconds)
        end()

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until a short piece of work is done; a second Ctrl-C does not wait.

    Raises:
        KeyboardInterrupt: a stop came before, and was lost or waits for an import; the work is not begun.
    """
    stop_if_asked()
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in came:
            listened_to[signum](signum, None)  # at once, also where a module is imported
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
