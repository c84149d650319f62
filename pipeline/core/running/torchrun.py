"""torchrun, as stages start themselves through it: what ended a process is in that process's own line, not a traceback.

No stage imports this; core/stage.py runs it. Run: python -m pipeline.core.running.torchrun, with torchrun's arguments
"""

import logging
import os
import signal
import sys
import tempfile
import threading

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pipeline.core import stage

TALKATIVE = ("run", "elastic.agent.server.api", "elastic.multiprocessing.api")  # parts of torch.distributed


def tells_more(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's says what no process says of itself: that a signal has ended it."""
    return "exitcode: -" in record.getMessage()


def main() -> int:
    """Run torchrun; give the exit code."""
    os.environ[stage.TORCHRUN] = str(os.getpid())
    _let_ctrl_c_wait_in_processes()
    for part in TALKATIVE:
        logging.getLogger(f"torch.distributed.{part}").addFilter(tells_more)
    try:
        with tempfile.TemporaryDirectory(prefix="ssld-torchrun-", ignore_cleanup_errors=True) as logs:
            run.main(["--log-dir", logs, *sys.argv[1:]])
    except ChildFailedError:
        return 1
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 1
    return 0


def _let_ctrl_c_wait_in_processes() -> None:
    """Let a Ctrl-C that comes while torchrun's processes start wait until pipeline/__init__.py hears it in them.

    They inherit the mask of the thread that starts them, so the main thread blocks SIGINT. This process still hears it:
    the signal goes to the thread made here, which does not block it, and Python runs the handler in the main thread.
    """
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


if __name__ == "__main__":
    sys.exit(main())
