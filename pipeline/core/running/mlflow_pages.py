"""Show MLflow's pages, where the registry is to be browsed: `make ui`.

    python -m pipeline.core.running.mlflow_pages               on http://127.0.0.1:5000, for this machine alone
    python -m pipeline.core.running.mlflow_pages --port 5001

Where MLFLOW_TRACKING_URI names a server, that has pages of its own, and their address is printed.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from pipeline.core import params
from pipeline.core.results import mlflow_store
from pipeline.core.running import commands


def check_free(port: int) -> None:
    """Make sure that a server can listen there: another program's pages would be shown in place of MLflow's.

    Raises:
        ValueError: it cannot.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port}: ports are 1 to 65535; give one with `make ui PORT=5001`")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as MLflow's server does: one may just have ended
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            other = 5001 if port != 5001 else 5002
            why = f"port {port} on 127.0.0.1: {error.strerror}"
            raise ValueError(f"{why}; take another with `make ui PORT={other}`") from None


def main() -> None:
    """Become MLflow's server."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.core.running.mlflow_pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=5000, help="default: 5000")
    port = parser.parse_args().port
    with commands.ending("mlflow_pages"):
        name = params.load().register_.name
        if not mlflow_store.is_server(mlflow_store.default_uri(Path())):
            check_free(port)
        client = mlflow_store.connect()
        uri, experiment = client.tracking_uri, mlflow_store.experiment(client)
    address = mlflow_store.shown(uri).rstrip("/") if mlflow_store.is_server(uri) else f"http://127.0.0.1:{port}"
    print(f"The student's versions: {address}/#/models/{name}")
    print(f"The training runs: {address}/#/experiments/{experiment}/runs", flush=True)
    if mlflow_store.is_server(uri):
        return
    print("Ctrl-C stops it.", flush=True)
    os.environ |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    where = ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", uri]
    how = ["--workers", "1", "--uvicorn-opts", "--log-level warning", "--artifacts-destination", "mlartifacts"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *where, *how])


if __name__ == "__main__":
    main()
