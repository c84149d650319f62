"""Show MLflow's pages, where the registry is to be browsed: `make ui`.

    python -m pipeline.core.mlflow_pages               on http://127.0.0.1:5000, for this machine alone
    python -m pipeline.core.mlflow_pages --port 5001

Where MLFLOW_TRACKING_URI names a server, that has pages of its own, and their address is printed.
"""

import argparse
import os
import sys

from pipeline.core import mlflow_store, params


def main() -> None:
    """Become MLflow's server."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.core.mlflow_pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=5000, help="default: 5000")
    port = parser.parse_args().port
    try:
        name, client = params.load().register_.name, mlflow_store.connect()
        uri, experiment = client.tracking_uri, mlflow_store.experiment(client)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
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
