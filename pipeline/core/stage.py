"""The door of every stage: arguments, settings, signals, and errors as one line.

A stage file ends with `if __name__ == "__main__": stage.main(run, __doc__)`, where `run` takes the settings.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import psutil

from pipeline.core import errors
from pipeline.core import params as settings
from pipeline.core.sections import Params, TrainingRecipe

SCRATCH = Path(".scratch")  # checkpoints and locks: what a stage needs to go on after it was killed
ENDED = "ended"  # a file in the folder of a run that has its results

PROFILE_STEPS = 10  # that --profile traces


def main(
    run: Callable[[Params], None],
    doc: str | None,
    distributed: bool = False,
    training: bool = False,
    goes_on: bool = False,
    instead: dict[str, Callable[[Params], None]] = {},  # noqa: B006
) -> None:
    """Run a stage as a program.

    Args:
        run: the stage.
        doc: the stage file's docstring, for --help.
        distributed: the stage can be shared out to `machine.processes` processes by torchrun.
        training: the same, and the stage's section is a recipe.
        goes_on: a stopped run is gone on from, as it is where one of the two above is true.
        instead: an option, and what to run where it is given; its docstring's first line is the option's help.
    """
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings file (default: params.yaml)")
    if training:
        parser.add_argument("--profile", action="store_true", help=f"trace {PROFILE_STEPS} steps into .scratch/{name}/")
    parser.set_defaults(run=run)
    for option, other in instead.items():
        words = (other.__doc__ or "").partition("\n")[0]
        parser.add_argument(option, dest="run", action="store_const", const=other, help=words)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    _die_with_parents()
    try:
        params = settings.load(arguments.params)
        if training and arguments.profile:
            machine = params.machine.model_copy(update={"profile_steps": PROFILE_STEPS})
            params = params.model_copy(update={"machine": machine})
        if distributed or training:
            _relaunch_with_torchrun(params, name)
        arguments.run(params)
    except KeyboardInterrupt:
        then = (
            "goes on from what is saved so far, if anything" if distributed or training or goes_on else "starts it anew"
        )
        if not _error_is_told() and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name}: stopped; the same command {then}", file=sys.stderr, flush=True)
        _exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, where another process has failed as well
        mark = errors.REFUSED
        if errors.out_of_shared_memory(error):
            error = ValueError(
                "worker processes are out of shared memory: set machine.workers to fewer (now "
                f"{params.machine.workers}), 0 for none, or give a container more (docker run --shm-size)"
            )
        elif errors.out_of_memory(error):
            error = ValueError(f"out of memory{_whats_there_to_halve(params, name)}")
        elif "does not have a deterministic implementation" in str(error):
            error = ValueError(f"{str(error).partition(',')[0]}: set machine.deterministic to false")
        elif "parameters that were not used in producing loss" in str(error):  # DistributedDataParallel's
            error = ValueError(
                "the network has weights that take no part in its logits: set machine.processes to 1, or take them out"
            )
        elif errors.left_alone(error):
            mark, error = errors.LEFT_ALONE, ValueError(f"another process of this run has ended ({error})")
        elif errors.worker_lost(error):
            mark = errors.CUT_SHORT
            error = ValueError(
                f"{errors.workers_words(error)} Where memory is short, set machine.workers to fewer (now "
                f"{params.machine.workers}), 0 for none"
            )
        elif not isinstance(error, ValueError | OSError):
            raise
        if os.environ.get("SSLD_TRACEBACK"):
            raise
        if not _error_is_told():
            print(f"{name}: {mark}: {errors.in_a_line(error)}", file=sys.stderr, flush=True)
        if mark == errors.REFUSED:
            _end_torchrun()
        _exit(1)


@contextlib.contextmanager
def only_writer(name: str) -> Iterator[Path]:
    """Be the only process that works on a stage's output in this workspace; give its scratch folder.

    Raises:
        ValueError: another process is at it; its process number is named.
    """
    folder = SCRATCH / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        for attempt in range(6):  # a run that has just been killed needs a moment to be gone
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 5:
                    lock.seek(0)
                    raise ValueError(
                        f"process {lock.read().strip() or '?'} is already at work on {name} here; "
                        "wait for it, or stop it"
                    ) from None
                time.sleep(1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def begin_run(folder: Path) -> None:
    """Make a run's folder, or take up the one that is there.

    Folders beside it, of runs with other settings or other code, go if those have ended; the others are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENDED).unlink(missing_ok=True)
    for other in folder.parent.glob(f"*/{ENDED}"):
        shutil.rmtree(other.parent)
    others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder and any(other.iterdir())]
    if others:
        print(
            f"{folder.parent.name}: unfinished runs with other settings or other code stay in {folder.parent}: "
            f"{len(others)}; `make clean` removes them",
            flush=True,
        )


def end_run(folder: Path) -> None:
    """Note that a run has ended well, its results in place.

    What it could go on from stays until the stage's next run: a DVC that is stopped before it has noted the results, or
    cannot because another DVC is at work, removes them, and runs the stage again.
    """
    (folder / ENDED).touch()


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


def package_versions() -> list[str]:
    """Versions of the packages on which views' pixels and networks' answers depend."""
    return [version(name) for name in ("torch", "torchvision", "timm", "pillow", "simplejpeg", "numpy")]


def code_digest() -> str:
    """SHA-256 over the project's source files that this process has loaded, in hex."""
    root = Path(__file__).resolve().parents[2]
    folders = root / "pipeline", root / "models"
    ours = [sys.modules[name] for name in sys.modules if name.split(".")[0] in ("pipeline", "models", "__main__")]
    loaded = {Path(file).resolve() for module in ours if (file := getattr(module, "__file__", None))}
    total = hashlib.sha256()  # __main__ is the stage itself, or a program that is not the project's
    for file in sorted(file for file in loaded if any(file.is_relative_to(folder) for folder in folders)):
        total.update(file.read_bytes())
    return total.hexdigest()


def _whats_there_to_halve(params: Params, name: str) -> str:
    section = getattr(params, name, None)
    if isinstance(section, TrainingRecipe):
        return (
            f": halve {name}.batch_size (now {section.batch_size}); or, for the same batches, double {name}.accumulate "
            f"(now {section.accumulate}) or set machine.checkpoint_activations to true"
        )
    return f": halve {name}.batch_size (now {section.batch_size})" if hasattr(section, "batch_size") else ""


def _stop(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: a second one must not break off the clean stop
    raise KeyboardInterrupt


def _exit(code: int) -> None:
    """Leave at once: worker processes and library threads have nothing left to say."""
    sys.stdout.flush()
    os._exit(code)


def _die_with_parents() -> None:
    """End this process when the torchrun or the DVC that started it has ended: killed, both leave it running."""
    if "DVC_STAGE" not in os.environ and "RANK" not in os.environ:
        return
    parent = watched = os.getppid()
    if "DVC_STAGE" in os.environ:
        # torchrun takes the place of the process that DVC started, and its workers watch DVC, not torchrun alone.
        watched = int(os.environ.setdefault("SSLD_DVC_PROCESS", str(parent)))

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(watched):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a clean stop if the main thread is listening
        time.sleep(3)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def _end_torchrun() -> None:
    """Keep torchrun from starting the processes again: they would end in the same error."""
    if not (note := _note_of_an_error()):
        return
    with contextlib.suppress(FileExistsError):
        note.touch(exist_ok=False)  # by one process alone: a second signal would break the clean end
        if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
            os.kill(os.getppid(), signal.SIGTERM)


def _error_is_told() -> bool:
    """Whether another of several processes has said what is wrong."""
    note = _note_of_an_error()
    return bool(note and note.exists())


def _note_of_an_error() -> Path | None:
    """The file by which a process that ends in an error tells the others so; None where torchrun started none."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parents[1] / "failed" if file else None


def _relaunch_with_torchrun(params: Params, name: str) -> None:
    """Become `torchrun --nproc-per-node N` of the same stage, unless torchrun started this process or N is 1."""
    if "RANK" in os.environ:
        return
    count = params.machine.processes
    if count == "auto":
        import torch  # it takes a second to load, and only `auto` has to ask it

        count = 1 if params.machine.device == "cpu" else max(1, torch.cuda.device_count())
    if count > 1:
        launcher = [sys.executable, "-m", "pipeline.core.running.torchrun", "--standalone", f"--nproc-per-node={count}"]
        launcher += [f"--max-restarts={params.machine.restarts}", "-m", f"pipeline.{name}"]
        # Else torchrun keeps one store for all attempts, and those after the first read the addresses of the dead:
        # https://github.com/pytorch/pytorch/issues/135712
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.execv(sys.executable, [*launcher, *sys.argv[1:]])
