"""torchrun, as stages start themselves through it: what ended a process is in that process's own line, not a traceback.

No stage imports this; core/stage.py runs it. Run: python -m pipeline.core.running.torchrun, with torchrun's arguments
"""

import logging
import os
import signal
import sys
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
        run.main()
    except ChildFailedError:
        return 1
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 1
    return 0


def _let_ctrl_c_wait_in_processes() -> None:
    """Have a Ctrl-C that comes while Python starts in torchrun's processes wait for pipeline/__init__.py to hear it.

    A process inherits what the thread that starts it blocks, and Python calls the handlers of this one in its main
    thread, whichever thread a signal has come to.
    """
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


if __name__ == "__main__":
    sys.exit(main())
