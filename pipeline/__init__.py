"""The stages of the distillation pipeline, one file each, and the Prefect flow that runs them (`pipeline.flow`)."""

import os
import sys
from types import TracebackType

# None of the tools underneath reports usage unless the user asks for it.
for _name, _value in {
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ.setdefault(_name, _value)

# Threads that wait for each other by spinning make stages that run side by side, or beside anything else, several
# times slower; not spinning at all costs a quarter. So they spin for some microseconds, and then sleep. GNU's OpenMP
# reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _without_a_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    program = next(word for word in sys.orig_argv if word.startswith("pipeline")).rpartition(".")[2]
    if isinstance(error, KeyboardInterrupt):
        print(f"{program}: stopped", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError):
        where = "activate the project's environment (`. .venv/bin/activate`), which `make install` makes"
        print(f"{program}: error: {sys.executable} does not have {error.name}: {where}", file=sys.stderr)
    else:
        _shown_otherwise(kind, error, trace)


_shown_otherwise = sys.excepthook
if sys.argv[0] == "-m":  # a program of this package, which may be stopped in the seconds in which it imports
    sys.excepthook = _without_a_traceback
