"""How the project's commands end: a mistake is one line and exit code 1, Ctrl-C another line and 130.

Stages end by core/stage.py, which knows more kinds of errors; `pipeline.core.softlabels`, which is to stand alone, by
itself.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator

from pipeline.core import errors, signals


@contextlib.contextmanager
def ending(name: str, stopped: str = "stopped", ctrl_c: signals.Handler = signals.stop) -> Iterator[None]:
    """End the program where what is done within raises an error that is nobody's but the user's to mend, or is stopped.

    Args:
        name: the command's, which begins the line on stderr.
        stopped: what to say after Ctrl-C.
        ctrl_c: what Ctrl-C calls from now on.

    Raises:
        SystemExit: with the line `NAME: error: WORDS`, which is exit code 1; after Ctrl-C with 130.
    """
    try:
        signals.hear_ctrl_c(ctrl_c)
        yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or signals.stopping():
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one that still waits for an import
            print(f"{name}: {stopped}", file=sys.stderr)
            sys.exit(130)
        if not isinstance(error, ValueError | OSError):
            raise
        sys.exit(f"{name}: {errors.REFUSED}: {errors.in_a_line(error)}")
