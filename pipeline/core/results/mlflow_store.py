"""MLflow's store: where it is, and how it is opened without breaking it.

MLFLOW_TRACKING_URI names it; where that is not set, it is an SQLite file, `mlflow.db`, in the project's root, with the
runs' files in `mlartifacts/` beside it.
"""

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:  # mlflow takes seconds to import: what does not use it must not wait for it
    from mlflow import MlflowClient

EXPERIMENT, ARTIFACTS = "ssld", "mlartifacts"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then show what belongs to training
SQLITE = "sqlite:///"
PROJECT = "SSLD_PROJECT"  # the variable that names the project to stages in a workspace, which is removed afterwards
DAMAGED = "malformed|not a database|no such (table|column)"  # what SQLite says of a file with which nothing can be done
PROBE_SECONDS = 5  # how long a server may take to answer at all
DEFAULTS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own defaults retry for some ten minutes, silently: training would stand still all that time.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def default_uri(root: Path) -> str:
    """Say where runs go: MLFLOW_TRACKING_URI where it is set, else an SQLite file in the project's root.

    Raises:
        ValueError: the path of that file cannot stand in an address.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    file = Path(root).resolve() / "mlflow.db"
    if re.search(r"\?|%[0-9a-fA-F]{2}", str(file)):
        raise ValueError(
            f"{file}: MLflow takes a ? and a % with two hexadecimal digits in a path for something else; move the "
            "project, or set MLFLOW_TRACKING_URI"
        )
    return f"{SQLITE}{file}"


def shown(uri: str) -> str:
    """Write a store's address, or words in which it may stand, for people: without the passwords in them."""
    secrets = r"([?&](?:\w*(?:password|passwd|pwd|token|secret)\w*|odbc_connect)=)[^&\s]*"
    return re.sub(r"://[^/?#\s]*@", "://", re.sub(secrets, r"\1***", uri, flags=re.I))


def connect(root: Path = Path(".")) -> "MlflowClient":
    """Open the store, making it first where it is a local file that is not there yet.

    Raises:
        ValueError: it cannot be reached or used; it says what to do.
    """
    uri = default_uri(root)
    if re.fullmatch(r"sqlite(\+\w+)?:(//)?/?(:memory:)?(\?.*)?", uri):
        raise ValueError("MLFLOW_TRACKING_URI names no file, so that nothing would last: sqlite:////path/to/mlflow.db")
    if os.environ.get("MLFLOW_REGISTRY_URI", uri) not in ("", uri):
        raise ValueError(
            "MLFLOW_REGISTRY_URI names another store than the runs', but versions go where runs go: unset it"
        )
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if is_server(uri):
        _reach_server(uri)
    if uri.startswith(SQLITE):
        _make_sqlite(uri)
    with speaking_plainly(uri):
        from mlflow import MlflowClient

        try:
            _reach_database(uri)
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
        except ModuleNotFoundError as error:
            raise ValueError(f"MLflow at {shown(uri)}: this kind of store needs a package: {error.name}") from None
    return client


def experiment(client: "MlflowClient", root: Path = Path(".")) -> str:
    """Give the id of the one experiment that all runs belong to; it is made where it is missing.

    Raises:
        ValueError: it was deleted; or the files of its runs and versions are not beside a local store, which was moved
            or copied.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.file_utils import local_file_uri_to_path

    where = shown(client.tracking_uri)
    with speaking_plainly(client.tracking_uri):
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return client.create_experiment(EXPERIMENT, _artifacts(client.tracking_uri, root), KIND)
            except MlflowException:  # another process was faster
                found = client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
    if found.lifecycle_stage == "deleted":
        command = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise ValueError(
            f"MLflow at {where}: the experiment {EXPERIMENT} was deleted, with all runs; to have it back: "
            f"MLFLOW_TRACKING_URI={shlex.quote(where)} {command}"
        )
    place = found.artifact_location
    if not place.startswith("file:") or is_server(client.tracking_uri):
        return found.experiment_id
    folder = Path(local_file_uri_to_path(place)).parent
    if not folder.exists():
        raise ValueError(
            f"MLflow at {where}: the files of its versions belong into {folder}, which is gone, as after a move of the "
            f"project: move it back, or link it from there (`ln -s {shlex.quote(str(Path(root).resolve()))} "
            f"{shlex.quote(str(folder))}`), or begin a new registry elsewhere (MLFLOW_TRACKING_URI)"
        )
    if client.tracking_uri.startswith(SQLITE) and place == (folder / ARTIFACTS).as_uri():
        file = _sqlite_file(client.tracking_uri)
        if not any(folder.samefile(one.parent) for one in (file, file.resolve())):
            first = shlex.quote(f"{SQLITE}{folder / file.name}")
            raise ValueError(
                f"MLflow at {where}: the files of its versions belong into {folder}, not beside it, as in a copy of "
                f"the project: for a registry of its own move {file} away; to go on in that one set "
                f"MLFLOW_TRACKING_URI={first}; or, if the project was moved from there, move it back"
            )
    return found.experiment_id


def exclusively(uri: str, what: str) -> AbstractContextManager[Any]:
    """Hold a lock: beside a local store's file, or, of another store, among this user's processes on this machine."""
    from filelock import FileLock

    if uri.startswith(SQLITE):
        return FileLock(f"{_sqlite_file(uri)}.{what}.lock")
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"ssld-{os.getuid()}-{name}.{what}.lock")


@contextmanager
def speaking_plainly(uri: str) -> Iterator[None]:
    """Turn MLflow's and the database's errors into one line that says where and what to do."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        words = shown(str(error).replace("<database_uri>", uri)).split("\n[SQL")[0].split("\n(Background")[0]
        damaged = uri.startswith(SQLITE) and re.search(DAMAGED, words)
        hint = f"; {_sqlite_file(uri)} is damaged: move it away, and a new one is made" if damaged else ""
        raise ValueError(f"MLflow at {shown(uri)}: {' '.join(words.split())[:500]}{hint}") from None


def is_server(uri: str) -> bool:
    return re.match(r"https?://", uri) is not None


def _sqlite_file(uri: str) -> Path:
    return Path(unquote(str(_written(uri))))


def _written(uri: str) -> Path:
    """The path of a local store's file as its address has it, with characters encoded."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).absolute()


def _artifacts(uri: str, root: Path) -> str | None:
    """Say where the runs' files go: beside a local store's file, or into the project; a server has its own place."""
    if is_server(uri):
        return None
    root = Path(os.environ.get(PROJECT, root)).resolve()
    beside = _sqlite_file(uri).parent if uri.startswith(SQLITE) else root
    return (beside / ARTIFACTS).as_uri()


def _make_sqlite(uri: str) -> None:
    """Make the store's file whole, in one process, and rename it into place.

    Several processes that open a new file at once, or one that is killed meanwhile, would leave tables half made,
    and MLflow never mends those.
    """
    file = _sqlite_file(uri)
    if file.exists() and file.stat().st_size:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with exclusively(uri, "init"):
        if file.exists() and file.stat().st_size:
            return
        written = _written(uri)
        beside = f"{SQLITE}{written.with_name(f'.{written.name}.part')}"
        part = _sqlite_file(beside)
        for rest in part, part.with_name(f"{part.name}-journal"):
            rest.unlink(missing_ok=True)
        from mlflow import MlflowClient

        with speaking_plainly(uri):
            MlflowClient(tracking_uri=beside).search_experiments(max_results=1)
        os.replace(part, file)


def _reach_database(uri: str) -> None:
    """Ask a database for its tables: MLflow itself would go on trying for 100 seconds."""
    import sqlalchemy

    if uri.split(":", 1)[0].split("+")[0] in {"sqlite", "postgresql", "mysql", "mssql"}:
        engine = sqlalchemy.create_engine(uri)
        sqlalchemy.inspect(engine).get_table_names()
        engine.dispose()


def _reach_server(uri: str) -> None:
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS)
    except requests.RequestException as error:
        raise ValueError(
            f"no MLflow server answers at {shown(uri)} ({type(error).__name__}), which MLFLOW_TRACKING_URI names; "
            "start it, correct the address, or unset MLFLOW_TRACKING_URI to track into a file beside the project"
        ) from None
