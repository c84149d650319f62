"""The door of every stage: arguments, settings, signals, and errors as one line.

A stage file ends with `if __name__ == "__main__": stage.main(run, __doc__)`, where `run` takes the settings.
"""

import argparse
import atexit
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

from pipeline import STARTED_BY
from pipeline.core import errors, recorded, signals
from pipeline.core.params import load
from pipeline.core.sections import Machine, Params, Teacher, TrainingRecipe

TORCHRUN = "SSLD_TORCHRUN"  # the variable that names torchrun's process to those that it starts, for it may have ended
PROFILE_STEPS = 10  # that --profile traces
PATIENCE = 5  # seconds that one process of several has to stop in, which may have to wait for a step of the others
# Whether a stopped stage goes on when its command is given again: no, it starts anew; yes, and it works alone; yes, and
# as many processes as `machine.processes` says share its work, started by torchrun.
Resumes = Literal["no", "alone", "shared"]


def main(
    run: Callable[[Params], None],
    doc: str | None,
    resumes: Resumes = "no",
    instead: dict[str, Callable[[Params], None]] = {},  # noqa: B006
) -> None:
    """Run a stage as a program.

    Args:
        run: the stage.
        doc: the stage file's docstring, for --help.
        resumes: see `Resumes`.
        instead: an option, and what to run where it is given; its docstring's first line is the option's help.
    """
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings file (default: params.yaml)")
    parser.set_defaults(run=run, profile=False)
    if _trains(name):
        parser.add_argument("--profile", action="store_true", help=f"trace {PROFILE_STEPS} steps into .scratch/{name}/")
    for option, other in instead.items():
        words = (other.__doc__ or "").partition("\n")[0]
        parser.add_argument(option, dest="run", action="store_const", const=other, help=words)
    arguments = parser.parse_args()
    try:
        signal.signal(signal.SIGTERM, signals.stop)
        signals.hear_ctrl_c()
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            signals.where_not_heard(PATIENCE, lambda: _stopped(name, resumes))
        _die_with_parents()
        _run(arguments, name, resumes, as_dvc_does=arguments.run is run and arguments.params == recorded.SETTINGS)
        if _is_started_by_dvc_or_torchrun():
            _leave()
    except (KeyboardInterrupt, Exception) as error:
        # An error after a stop is one that a library has made of it, or that came in the way of the last checkpoint.
        if not isinstance(error, KeyboardInterrupt) and not signals.stopping():
            raise
        for signum in (signal.SIGINT, signal.SIGALRM):  # another Ctrl-C, or one that still waits for an import
            signal.signal(signum, signal.SIG_IGN)
        _stopped(name, resumes)


def _run(arguments: argparse.Namespace, name: str, resumes: Resumes, as_dvc_does: bool) -> None:
    """Run a stage with its settings; an error that is not the code's ends the process with a line.

    Args:
        as_dvc_does: it runs as dvc.yaml has it, so that DVC records what it makes.
    """
    params = None
    try:
        _check_launcher(resumes)
        params, began = load(arguments.params), recorded.Recorded.now(name)
        if arguments.profile:
            machine = params.machine.model_copy(update={"profile_steps": PROFILE_STEPS})
            params = params.model_copy(update={"machine": machine})
        if resumes == "shared":
            _relaunch_with_torchrun(params, name)
        arguments.run(params)
        if "RANK" in os.environ:
            from pipeline.core import devices

            devices.leave()
        if as_dvc_does and os.environ.get("RANK", "0") == "0":  # of several processes one looks
            recorded.check(name, began)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if signals.stopping():
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, where another process has failed as well
        mark, words = _explained(error, params, name)
        if not words:
            raise
        _say_what_ended_it(name, mark, words)
        _exit(1)


def _check_launcher(resumes: Resumes) -> None:
    """Make sure that torchrun started this process if RANK says so, and that the stage is one to share.

    Raises:
        ValueError: it did not, or it is not.
    """
    if "RANK" not in os.environ:
        return
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if lacking := [name for name in variables if not os.environ.get(name)]:
        raise ValueError(
            f"RANK stands in the environment, but not {', '.join(lacking)}, as torchrun would set them: unset RANK, "
            "which a scheduler may have set, or use torchrun"
        )
    if resumes != "shared" and os.environ["WORLD_SIZE"] != "1":
        raise ValueError("this stage runs in one process: start it without torchrun")


def _trains(name: str) -> bool:
    """Whether a stage trains a network: its section of params.yaml is a recipe."""
    section = Params.model_fields.get(name)
    return section is not None and issubclass(section.annotation, TrainingRecipe)


def _stopped(name: str, resumes: Resumes) -> None:
    """End, and say, in one process of several, that Ctrl-C or SIGTERM has stopped the stage."""
    then = "starts it anew" if resumes == "no" else "goes on from what is saved so far, if anything"
    if os.environ.get("SSLD_TRACEBACK") and sys.exc_info()[0]:
        traceback.print_exc()
    if not _error_is_told() and os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"{name}: stopped; the same command {then}")
    _exit(130)


def _say_what_ended_it(name: str, mark: str, words: str) -> None:
    """Say, in one process of several, what has ended the stage, and let torchrun start no process again in vain."""
    if os.environ.get("SSLD_TRACEBACK"):
        traceback.print_exc()
    tells = not _error_is_told() if mark == errors.LEFT_ALONE else _tell_others()
    if tells:
        _say(f"{name}: {mark}: {words}")
    if tells and mark == errors.REFUSED:
        _end_torchrun()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more, as where Ctrl-C has ended `tee`, too
        sys.stderr.write(f"{line}\n")  # at once: print writes the end of a line apart
        sys.stderr.flush()


def _explained(error: Exception, params: Params | None, name: str) -> tuple[str, str]:
    """Say for people what an error means and what to do: how it is marked, and a line.

    Args:
        params: None where the error is about them.

    Returns: no line where the error is the code's, and nobody's mistake.
    """
    mark, words = errors.REFUSED, errors.in_a_line(error) if isinstance(error, ValueError | OSError) else ""
    if params is None:
        return mark, words
    fewer = f"set machine.workers to fewer (now {params.machine.workers}), 0 for none"
    if errors.too_many_open_files(error):
        of_workers = f", or {fewer}" if isinstance(error, RuntimeError) else ""
        words = f"too many files are open: raise the limit (ulimit -n){of_workers}"
    elif errors.out_of_shared_memory(error):
        said = errors.in_a_line(error)
        words = f"worker processes have {said}: {fewer}, or give a container more (docker run --shm-size)"
    elif errors.out_of_memory(error):
        words = f"out of memory{_whats_there_to_halve(params, name)}"
    elif "does not have a deterministic implementation" in str(error):
        words = f"{str(error).partition(',')[0]}: set machine.deterministic to false"
    elif params.machine.compile and errors.of_compiler(error):
        words = f"the network cannot be compiled ({errors.in_a_line(error)[:200]}): set machine.compile to false"
    elif "parameters that were not used in producing loss" in str(error):  # DistributedDataParallel's
        words = "the network has weights that take no part in its logits: set machine.processes to 1, or take them out"
    elif "AF_UNIX path too long" in words:
        words += ": set TMPDIR to a folder with a shorter path"
    elif errors.no_nccl(error):
        words = (
            f"NCCL cannot connect the GPUs ({errors.in_a_line(error)[:300]}): NCCL_DEBUG=INFO tells why; a container "
            "may need more shared memory (docker run --shm-size); machine.processes: 1 does without"
        )
    elif errors.left_alone(error):
        said = "" if "gloo/" in str(error) else f" ({errors.in_a_line(error)[:300]})"  # gloo's says nothing to a user
        mark, words = errors.LEFT_ALONE, f"another process of this run has ended{said}"
    elif errors.worker_lost(error):
        mark, words = errors.CUT_SHORT, f"{error}, for a reason above or for want of memory: {fewer}"
    return mark, " ".join(words.split())


def _whats_there_to_halve(params: Params, name: str) -> str:
    section = getattr(params, name, None)
    if isinstance(section, Teacher) and section.source != "fit":  # it is only tried on validation images
        return ": set machine.device to cpu" if params.machine.device != "cpu" else ""
    if isinstance(section, TrainingRecipe):
        return (
            f": halve {name}.batch_size (now {section.batch_size}); or, for the same batches, double {name}.accumulate "
            f"(now {section.accumulate}) or set machine.checkpoint_activations to true"
        )
    return f": halve {name}.batch_size (now {section.batch_size})" if hasattr(section, "batch_size") else ""


def _exit(code: int) -> None:
    """End at once, without Python's clearing up, and kill worker processes: new ones do not see yet that this ends."""
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it any more
        if not code:
            raise
    try:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "resource_tracker import main" not in " ".join(process.cmdline()):  # it clears up after us
                    process.kill()
        if folder := multiprocessing.current_process()._config.get("tempdir"):  # of workers' sockets
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(code)


def _leave() -> None:
    """End well without having Python take down torch and MLflow, which takes it two seconds.

    It is for processes in which nothing comes after the stage: a profiler's or a debugger's run goes on.
    """
    threading._shutdown()  # as Python does, and multiprocessing's processes, which leave this way, too
    atexit._run_exitfuncs()
    _exit(0)


def _is_started_by_dvc_or_torchrun() -> bool:
    return "DVC_STAGE" in os.environ or "RANK" in os.environ


def _die_with_parents() -> None:
    """End this process when the torchrun or the DVC that started it has ended: killed, both leave it running."""
    if not _is_started_by_dvc_or_torchrun():
        return
    parent = watched = int(os.environ.get(TORCHRUN, STARTED_BY))
    if "DVC_STAGE" in os.environ:
        # torchrun takes the place of the process that DVC started, and its workers watch DVC, not torchrun alone.
        watched = int(os.environ.setdefault("SSLD_DVC_PROCESS", str(parent)))

    def watch() -> None:
        while os.getppid() == parent and _runs(watched):
            time.sleep(0.5)
        if watched != parent and os.getppid() == parent and os.environ.get("LOCAL_RANK") == "0":
            # One of torchrun's processes tells it, which would take them for lost, and start them again.
            os.kill(parent, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a clean stop if the main thread is listening
        time.sleep(3)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def _runs(number: int) -> bool:
    """Whether a process of this number is there, and is more than a note for its parent that it has ended."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _tell_others() -> bool:
    """Tell the other processes that this one says what is wrong; false where another of them was first."""
    try:
        if note := _note_of_an_error():
            note.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the disk is full, say: better said twice than not at all
        pass
    return True


def _error_is_told() -> bool:
    """Whether another of several processes says what is wrong."""
    note = _note_of_an_error()
    return bool(note and note.exists())


def _end_torchrun() -> None:
    """Keep torchrun from starting the processes again: they would end in the same error."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        os.kill(os.getppid(), signal.SIGTERM)


def _note_of_an_error() -> Path | None:
    """The file by which a process that ends in an error tells the others so; None where torchrun started none."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parents[1] / "failed" if file else None


def processes_of(machine: Machine) -> int:
    """How many processes share a stage's work."""
    if machine.processes != "auto":
        return machine.processes
    import torch  # it takes a second to load, and only `auto` has to ask it

    return 1 if machine.device == "cpu" else max(1, torch.cuda.device_count())


def _relaunch_with_torchrun(params: Params, name: str) -> None:
    """Become `torchrun --nproc-per-node N` of the same stage, unless torchrun started this process or N is 1."""
    if "RANK" in os.environ:
        return
    count = processes_of(params.machine)
    if count > 1:
        launcher = [sys.executable, "-m", "pipeline.core.running.torchrun", "--standalone", "--local-addr=127.0.0.1"]
        launcher += [f"--nproc-per-node={count}"]
        launcher += [f"--max-restarts={params.machine.restarts}", "-m", f"pipeline.{name}"]
        # Else torchrun keeps one store for all attempts, and those after the first read the addresses of the dead:
        # https://github.com/pytorch/pytorch/issues/135712
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        signals.stop_if_asked()  # a stop that waits for an import would be forgotten
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it waits until pipeline/__init__.py hears it
        os.execv(sys.executable, [*launcher, *sys.argv[1:]])
