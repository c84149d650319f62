"""The stages of the distillation pipeline, one file each, and the Prefect flow that runs them (`pipeline.flow`)."""

import contextlib
import os
import signal
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType

STARTED_BY = os.getppid()  # noted before the imports, which take seconds
OURS = ("pipeline", "models")
ENVIRONMENT = Path(__file__).parents[1] / ".venv"
OWN = Path(__file__).parents[1] / "models/own.py"

# None of the tools underneath reports usage unless the user asks for it.
for _name, _value in {
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_name, _value)

# Threads that wait for each other by spinning make stages that run side by side, or beside anything else, several
# times slower. So they spin for some ten microseconds, and then sleep. GNU's OpenMP reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _stop_at_once(signum: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C while a program imports what it needs; `core.signals.hear_ctrl_c` comes after that."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one says it
        with contextlib.suppress(OSError):
            os.write(2, f"{_program()}: stopped\n".encode())
    os._exit(130)


def _program() -> str:
    """The program's name; of the torchrun that a stage has become, the stage's, which follows a second -m."""
    module = "pipeline"
    for option, after in pairwise(sys.orig_argv):
        if option == "-m":
            module = after
    return module.rpartition(".")[2]


def _in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show Ctrl-C, a Python that is not the project's, and mistakes in models/own.py without a traceback."""
    program = _program()
    not_ours = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS
    frames = {(frame.filename, frame.name) for frame in traceback.extract_tb(trace)}
    while_imported = (str(OWN), "<module>") in frames or getattr(error, "filename", None) == str(OWN)
    if isinstance(error, KeyboardInterrupt):  # that nobody has told, as a second one while the program ends
        print(f"{program}: stopped", file=sys.stderr)
    elif while_imported and not os.environ.get("SSLD_TRACEBACK"):
        words = " ".join(f"{kind.__name__}: {error}".split())
        print(f"{program}: error: models/own.py cannot be imported: {words}", file=sys.stderr)
    elif not_ours and Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        print(
            f"{program}: error: {sys.executable} does not have {error.name}: activate the project's environment "
            "(`. .venv/bin/activate`), which `make install` makes",
            file=sys.stderr,
        )
    else:
        _shown_otherwise(kind, error, trace)


_shown_otherwise = sys.excepthook
if sys.argv[0] == "-m":  # a program of this package, whose imports take seconds
    sys.excepthook = _in_a_line
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see core/running/torchrun.py
