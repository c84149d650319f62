"""The Prefect flow: DVC's graph as tasks, one a stage, each of which runs its stage through DVC.

Reads:   dvc.yaml (the graph is written there and nowhere else), params.yaml
Writes:  what the stages write; in .scratch: Prefect's data (prefect), workspaces and results of runs with changes

A run without changes works in this folder, as `dvc repro` does: what ran through one is up to date for the other.
A run with changed parameters works in a folder of its own (core/running/workspace.py); results are in .scratch/runs.
Cancelling a run, or Ctrl-C, ends its processes; the same run again goes on where it stopped.

    python -m pipeline.flow                            run it here and now, with a temporary Prefect server
    python -m pipeline.flow -S distill.epochs=2        ... with a changed parameter
    python -m pipeline.flow --recipe cifar10           ... with the settings of a recipe
    python -m pipeline.flow serve                      serve it as deployment ssld/local until Ctrl-C; then, elsewhere:
        export PREFECT_API_URL=http://127.0.0.1:4200/api
        prefect deployment run ssld/local --param 'changes={"distill.epochs": 2}'

Prefect's own settings hold (PREFECT_API_URL: another server; PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS: how many
stages at once).
"""
# ruff: noqa: E402 (Prefect reads its settings when it is imported)

import os
import sys
from pathlib import Path

for key, value in {
    "PREFECT_HOME": str(Path.cwd() / ".scratch/prefect"),  # a project's own: two do not disturb each other
    "PREFECT_RUNNER_POLL_FREQUENCY": "2",  # seconds until a triggered run is noticed
    # Several runs may be served at once, and a task's line is to say whose it is.
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s.%(msecs)03d | %(levelname)-7s | "
    "%(flow_run_name)s: %(task_run_name)s - %(message)s",
}.items():
    os.environ[key] = os.environ.get(key) or value  # which may be set, but empty
try:
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect itself would not make .scratch
except OSError as error:
    sys.exit(f"flow: error: {error}; name a folder that can be written with PREFECT_HOME")

import argparse
import contextlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from prefect import State, Task, flow, get_client, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from pipeline import recipes
from pipeline.core import errors, params
from pipeline.core.results import mlflow_store, tracking
from pipeline.core.running import commands, dvc, params_file, prefect_server, preflight, workspace
from pipeline.core.running.programs import Programs

LOOK = 2  # seconds between looks whether the run is being cancelled
RETRY_DELAY = 2  # seconds; a cancelled run waits them out at worst
CTRL_C = "stopped with Ctrl-C"  # the message of the state in which such a run ends
STAGES_OWN_ERROR = re.compile(rf"[a-z]+: {errors.REFUSED}: ")  # begins the line with which a stage refuses
STAGES_OWN_WORDS = re.compile(rf"[a-z]+: ({errors.CUT_SHORT}|{errors.LEFT_ALONE}): ")


@flow(name="ssld", task_runner=ThreadPoolTaskRunner(), persist_result=False)
def ssld(changes: dict[str, Any] = {}, stages: list[str] | None = None, retries: int = 2) -> State:  # noqa: B006
    """Bring all stages up to date.

    Args:
        changes: keys of params.yaml, dotted or nested, and the values they have in this run.
        stages: only these, and what they need; none: all.
        retries: how often to start a stage again that was killed or crashed; it goes on where it stopped.
    """
    root, say, cancelled = Path.cwd(), get_run_logger().info, threading.Event()
    try:
        check(root, changes, stages)
        with (
            workspace.opened(root, changes, say) as folder,
            Programs(folder, environment(root)) as programs,
            stopping(programs, cancelled),
        ):
            graph = dvc.graph(folder)
            graph = dvc.upstream(graph, stages or list(graph))
            say("asking DVC what has changed")
            run_stages(graph, dvc.outdated(folder), programs, retries)
            results = folder / "data/evaluate"
            if changes:
                results = workspace.keep_results(folder, root, runtime.flow_run.name, scored="evaluate" in graph)
            if "evaluate" in graph:  # else what lies there is of another run
                show_results(results)
    except KeyboardInterrupt:
        return Cancelled(message=CTRL_C)
    except (ValueError, OSError) as error:
        return Cancelled(message="the run was cancelled") if cancelled.is_set() else Failed(message=str(error))
    where = f"; results are in {results}" if changes or "evaluate" in graph else ""
    return Completed(message=f"{len(graph)} stages are up to date{where}")


@contextlib.contextmanager
def stopping(programs: Programs, cancelled: threading.Event) -> Iterator[None]:
    """Stop the programs, and set the event, once the run is cancelled, on Prefect's pages or by its command.

    Of a deployment's run Prefect's runner ends the whole process; of another Prefect only notes the wish.
    """
    if runtime.deployment.id is not None:
        yield
        return
    flow_run, url, over = runtime.flow_run.id, PREFECT_API_URL.value(), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            # No server for a moment, for instance: the next look may do. The thread has a client of its own each time.
            with (
                contextlib.suppress(Exception),
                temporary_settings({PREFECT_API_URL: url}),
                get_client(sync_client=True) as client,
            ):
                state = client.read_flow_run(flow_run).state
                if state.is_cancelling() or state.is_cancelled():
                    cancelled.set()
                    programs.stop()
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(10)


def check(root: Path, changes: dict[str, Any], stages: list[str] | None) -> None:
    """Make sure that a run's settings are right, that what they name is there, and that it names stages that there are.

    Raises:
        ValueError: one line that names what is wrong.
    """
    preflight.check_git(root)
    preflight.check(params_file.check(root, changes), root)
    dvc.upstream(dvc.graph(root), stages or [])


def run_stages(graph: dvc.Graph, outdated: set[str], programs: Programs, retries: int) -> None:
    """Run one task a stage, each as soon as the stages are done whose outputs it reads.

    Raises:
        ValueError: stages failed; the message names them, with their errors.
    """
    futures: dict[str, PrefectFuture] = {}
    for stage, reads in graph.items():
        command = dvc.repro(stage) if stage in outdated else None
        futures[stage] = program(stage, command, programs, retries).submit(wait_for=[futures[it] for it in reads])
    if register := futures.get("register"):  # where it was up to date or restored, the registry may lack its version
        command = [sys.executable, "-m", "pipeline.register", "--if-missing"]
        registry = program("registry", command, programs, retries, lambda: register.state.name == dvc.RAN)
        futures["registry"] = registry.submit(wait_for=[register])
    wait(list(futures.values()))
    states = [future.state for future in futures.values()]
    if not all(state.is_completed() for state in states):
        messages = [state.message or "" for state in states if state.is_failed() or state.is_crashed()]
        raise ValueError("; ".join(messages) or "the run was stopped")


def program(
    name: str,
    command: list[str] | None,
    programs: Programs,
    retries: int,
    needless: Callable[[], bool] = lambda: False,
) -> Task:
    """Make the task that runs one program, its output line by line in the run's log.

    Args:
        name: the task's.
        command: the program; none: nothing is to be done.
        programs: what starts it, and ends it with the run.
        retries: see `ssld`.
        needless: asked when it is the task's turn: whether nothing is to be done after all.
    """

    @task(
        name=name,
        task_run_name=name,
        retries=retries,
        retry_delay_seconds=RETRY_DELAY,
        retry_condition_fn=lambda task, run, state: not STAGES_OWN_ERROR.match(state.message or ""),
        cache_policy=NO_CACHE,  # DVC is the cache
        persist_result=False,
    )
    def run() -> State:
        if command is None or needless():
            return Completed(name="Up to date", message=f"{name}: up to date")
        logger, lines = get_run_logger(), []

        def log(line: str) -> None:
            if line.strip() and not line.startswith(dvc.ADVICE):
                lines.append(line)
                logger.info(line)

        try:
            code = programs.run(command, log)
        except InterruptedError:
            code = -signal.SIGTERM
        if code and programs.stopped:
            return Cancelled(message=f"{name} was stopped")
        if code:
            return Failed(message=error_in(lines) or f"{name} ended with exit code {code}")
        outcome = dvc.outcome(lines)
        return Completed(name=outcome, message=f"{name}: {outcome.lower()}")

    return run


def error_in(lines: list[str]) -> str | None:
    """Find the line that says best why a program failed: the stage's own last one, else DVC's last."""
    for mark in (STAGES_OWN_ERROR, STAGES_OWN_WORDS, re.compile("ERROR: ")):
        for at in reversed(range(len(lines))):
            if mark.match(lines[at]):  # which DVC may go on with: "it is being blocked by:"
                return " ".join(lines[at : at + 2]) if lines[at].endswith(":") else lines[at]
    return None


def show_results(results: Path) -> None:
    """Put the metrics and the report into Prefect's artifacts, as far as there are any."""
    report = results / "report.html"
    lines = []
    if report.exists():  # a browser does not follow a link from a page to a file
        lines += [f"Full report, to paste into the address bar: `{report.absolute().as_uri()}`", ""]
    if (results / "metrics.json").exists():
        rows = table(json.loads((results / "metrics.json").read_text(encoding="utf-8")))
        create_table_artifact(rows, key="metrics", description="Scores on the test split")
        cells = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in cells]
    if lines:
        create_markdown_artifact("\n".join(lines), key="report", description="Scores, and where the report is")


def table(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn metrics.json into rows: a network each, with its single numbers."""
    networks = {name: scores for name, scores in metrics.items() if isinstance(scores, dict)}
    columns = [key for key, value in next(iter(networks.values()), {}).items() if isinstance(value, int | float)]
    return [{"network": name} | {key: round(scores[key], 4) for key in columns} for name, scores in networks.items()]


def environment(root: Path) -> dict[str, str]:
    """Give the variables that stages get: this Python first, output at once, the project's MLflow store, the run."""
    uri = given = mlflow_store.default_uri(root)
    if kind := re.match(r"sqlite(\+\w+)?:///", uri):  # a relative path would lead into the workspace
        uri = f"{kind[0]}{root.absolute() / uri.removeprefix(kind[0])}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    flow_run = {tracking.FLOW_RUN: runtime.flow_run.name or ""}
    project = {"MLFLOW_TRACKING_URI": uri, mlflow_store.PROJECT: str(root.absolute())}
    if os.environ.get("MLFLOW_REGISTRY_URI") == given:
        project["MLFLOW_REGISTRY_URI"] = uri
    return workspace.without_git(os.environ) | {"PATH": path, "PYTHONUNBUFFERED": "1"} | project | flow_run


def serve(url: str, name: str) -> None:
    """Serve the flow as a deployment, ssld/NAME, until Ctrl-C."""
    serving = f"from pipeline.flow import ssld; ssld.serve(name={name!r}, print_starting_message=False)"
    # In a process of its own: Prefect's runner, asked to stop, would wait until its runs have ended.
    variables = os.environ | {"PREFECT_API_URL": url}
    with prefect_server.serving(url), Programs(Path.cwd(), variables, grace=4) as programs:
        print(f"Prefect's pages: {url.removesuffix('/api')}\nTo start a run, in another shell, in about 20 seconds:")
        print(f"    export PREFECT_API_URL={url}\n    prefect deployment run ssld/{name}")
        print(f"""    prefect deployment run ssld/{name} --param 'changes={{"distill.epochs": 2}}'""")
        print("Ctrl-C stops the runs, the deployment and the server.", flush=True)
        programs.run([sys.executable, "-c", serving], print)


def change(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE, where the value is written as in params.yaml."""
    key, equals, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if equals:
            return key, params.parse(value)
    raise ValueError(f"-S {text}: expected KEY=VALUE, such as distill.epochs=2")


def main() -> int:
    """Run or serve the flow; give the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.flow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["run", "serve"], default="run", help="default: run")
    parser.add_argument("-S", "--set-param", metavar="KEY=VALUE", action="append", default=[], help="with run")
    parser.add_argument("--recipe", metavar="NAME", help="with run: the settings of a recipe; -S changes them further")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="with run: only these, and what they need")
    parser.add_argument("--name", default="local", help="with serve: the deployment is ssld/NAME (default: local)")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+", arguments.name):
        parser.error("--name: letters, digits, dots, dashes and underscores")
    if arguments.what == "serve" and (arguments.set_param or arguments.recipe or arguments.stages):
        parser.error("-S, --recipe and --stages are of a run: give a deployment's run --param 'changes={...}' instead")
    for number in (signal.SIGTERM, signal.SIGHUP):  # by default they would skip all cleaning up
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    stopped = "stopped; the same command goes on from here"
    # With a handler that is not Python's own, asyncio, on which Prefect is built, would not cancel its tasks.
    with commands.ending("flow", stopped=stopped, ctrl_c=signal.default_int_handler):
        changes = recipes.changes(arguments.recipe) if arguments.recipe else {}
        changes |= dict(map(change, arguments.set_param))
        port = 4200 if arguments.what == "serve" else 0
        url = prefect_server.ready(port, meanwhile=lambda: check(Path.cwd(), changes, arguments.stages))
        with temporary_settings({PREFECT_API_URL: url}):
            if arguments.what == "serve":
                serve(url, arguments.name)
                return 1  # it does not end by itself
            print(f"Prefect's pages, while this runs: {url.removesuffix('/api')}", flush=True)
            try:
                state = ssld(changes, arguments.stages, return_state=True)
            except Exception:
                if prefect_server.answers(url):
                    raise
                raise ValueError(
                    f"no Prefect server answers at {url} any more; the same command goes on from what stages have done"
                ) from None
            if state.message == CTRL_C:
                raise KeyboardInterrupt
            return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
