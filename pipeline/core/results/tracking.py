"""MLflow runs: what a stage tracks of itself. `pipeline.core.results.mlflow_store` says where that goes."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import atomic
from pipeline.core.results import mlflow_store

if TYPE_CHECKING:  # mlflow takes seconds to import: what does not track must not wait for it
    from mlflow import MlflowClient

# what a commit has to hold for a run to be repeated
REPEATABLE_BY = ("pipeline", "models", "params.yaml", "dvc.yaml", "requirements.txt", ".dvc/config", ":(glob)**/*.dvc")
FLOW_RUN = "SSLD_FLOW_RUN"  # the variable that names the flow run which a stage belongs to


class TrackedRun:
    """One MLflow run."""

    def __init__(self, client: "MlflowClient", run_id: str, resumed: bool = False):
        self.client, self.id, self.resumed = client, run_id, resumed
        self._logged: dict[str, set[int]] = {}  # per metric: the steps that the store has
        self._waiting: list[Any] = []  # metrics that the store did not take yet

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of one step (an epoch); those of a step that a resumed training repeats are there already.

        A store that has gone away does not stop a training: what it missed is sent with the next step.
        """
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        for key, value in metrics.items():
            steps = self._steps(key)
            if step not in steps:
                steps.add(step)
                self._waiting.append(Metric(key, float(value), now, step))
        self._send()

    def tag(self, tags: dict[str, Any]) -> None:
        """Set tags, as text."""
        self._try(lambda client: [client.set_tag(self.id, key, str(value)) for key, value in tags.items()])

    def end(self, status: str) -> None:
        """Send what waits, and close the run as FINISHED, FAILED or KILLED."""
        self._send()
        self._try(lambda client: client.set_terminated(self.id, status))

    def _steps(self, key: str) -> set[int]:
        if key not in self._logged:
            steps = self._logged[key] = set()
            if self.resumed:
                self._try(lambda client: steps.update(m.step for m in client.get_metric_history(self.id, key)))
        return self._logged[key]

    def _send(self) -> None:
        if self._waiting and self._try(lambda client: client.log_batch(self.id, metrics=self._waiting)):
            self._waiting = []

    def _try(self, action: "Callable[[MlflowClient], object]") -> bool:
        """Do something with the store; a warning is all that comes of a failure."""
        try:
            with mlflow_store.speaking_plainly(self.client.tracking_uri):
                action(self.client)
        except ValueError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return False
        return True


@contextmanager
def run(
    stage: str,
    params: dict[str, Any],
    identities: dict[str, str],
    resume_file: Path | None = None,
) -> Iterator[TrackedRun]:
    """Track a stage as one MLflow run, closed as FINISHED, FAILED (an exception) or KILLED (stopped from outside).

    Args:
        stage: the run's name.
        params: settings that went in; sections within it become dotted keys.
        identities: digests of what the stage read, by name ("data": its images, "soft labels", "start"); tags
            `digest.NAME`.
        resume_file: keeps the run's id, so that a training that goes on goes on in the same run. It belongs beside
            the checkpoint, and goes when the checkpoint goes.

    Raises:
        ValueError: the store cannot be reached or used; it says what to do.
    """
    client = mlflow_store.connect()
    with mlflow_store.speaking_plainly(client.tracking_uri):
        tracked = _resume(client, resume_file) or _start(client, stage)
        if resume_file:
            atomic.write_json(resume_file, {"uri": mlflow_store.shown(client.tracking_uri), "run_id": tracked.id})
    status = "FAILED"
    try:
        tags = {f"digest.{name}": value for name, value in identities.items()} | git_tags()
        if flow_run := os.environ.get(FLOW_RUN):
            tags["flow_run"] = flow_run
        with mlflow_store.speaking_plainly(client.tracking_uri):
            _describe(client, tracked.id, flatten(params), tags)
        yield tracked
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracked.end(status)


def flatten(params: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn sections within sections into one level of dotted keys, with values as text."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def git_tags() -> dict[str, str]:
    """Name the commit, and whether code, settings, packages or images differ from it; nothing without a commit.

    `git.dirty` is "true", "false", or "unknown" where Git does not say.
    """
    commit = _git("the commit is not noted", "rev-parse", "HEAD")
    if commit is None:
        return {}
    unknown = "whether anything differs from the commit is not known"
    changed = _git(unknown, "status", "--porcelain", "--", *REPEATABLE_BY)
    dirty = "unknown" if changed is None else str(bool(changed)).lower()
    # `mlflow.source.git.commit` is the name that MLflow's pages look for.
    return {"git.commit": commit, "mlflow.source.git.commit": commit, "git.dirty": dirty}


def _git(otherwise: str, *arguments: str) -> str | None:
    """What Git says; None where it fails, and a line with the reason, unless there is no Git, repository or commit.

    Args:
        otherwise: how that line begins.
    """
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=60, env=environment
        )
        return done.stdout.strip()
    except FileNotFoundError:
        return None
    except subprocess.CalledProcessError as error:
        reason = error.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    if not re.search("not a git repository|unknown revision", reason):
        print(f"{otherwise}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    return None


def _start(client: "MlflowClient", stage: str) -> TrackedRun:
    tags = {"stage": stage, "mlflow.source.name": f"python -m pipeline.{stage}", "mlflow.source.type": "LOCAL"}
    made = client.create_run(mlflow_store.experiment(client), run_name=stage, tags=tags)
    return TrackedRun(client, made.info.run_id)


def _resume(client: "MlflowClient", resume_file: Path | None) -> TrackedRun | None:
    """Take up the run that the file names, unless this store does not have it (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        kept = json.loads(Path(resume_file).read_text(encoding="utf-8")) if resume_file else {}
        if kept.get("uri") != mlflow_store.shown(client.tracking_uri):
            return None
        client.update_run(kept["run_id"], status="RUNNING")
    except (FileNotFoundError, json.JSONDecodeError, MlflowException):
        return None
    return TrackedRun(client, kept["run_id"], resumed=True)


def _describe(client: "MlflowClient", run_id: str, params: dict[str, str], tags: dict[str, str]) -> None:
    """Write parameters and tags; MLflow refuses to change a parameter, so what a resumed run changed is a tag."""
    from mlflow.entities import Param, RunTag

    there = client.get_run(run_id).data.params
    tags = tags | {f"resumed.{key}": value for key, value in params.items() if there.get(key, value) != value}
    new = [Param(key, value) for key, value in params.items() if key not in there]
    client.log_batch(run_id, params=new, tags=[RunTag(key, str(value)) for key, value in tags.items()])
