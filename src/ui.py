"""Opens MLflow's pages on http://127.0.0.1:5000, for this machine alone, and prints a link to each experiment's runs.

python -m src.ui --port 5001
"""

from __future__ import annotations

import argparse
import os
import sys

from src.common.console import console
from src.tracking.store import QUIET_AND_BOUNDED, connect, one_line

# One process answers one person: no further workers, no runners of jobs.
SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
RUNS = "{base}/#/experiments/{id}/runs?workflowType=machine_learning"


def main() -> None:
    """The command: becomes MLflow's server; of a store that is a server already it prints the links alone."""
    parser = argparse.ArgumentParser(
        prog="python -m src.ui", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--port", type=int, default=5000, help="port of the pages (5000)")
    port = parser.parse_args().port
    environment = os.environ | SERVER
    os.environ |= QUIET_AND_BOUNDED
    from src.tracking.tracker import DEFAULT_STORE, resolve_store

    store = resolve_store(None, DEFAULT_STORE)
    is_server = store.startswith("http")
    base = store.rstrip("/") if is_server else f"http://127.0.0.1:{port}"
    try:
        experiments = connect(store).search_experiments()
    except Exception as error:  # MLflow's, requests', SQLAlchemy's and the operating system's
        sys.exit(f"MLflow's store cannot be opened: {one_line(error)}")
    for experiment in sorted(experiments, key=lambda experiment: experiment.name):
        if experiment.name != "Default":
            console.print(f"{experiment.name:24} {RUNS.format(base=base, id=experiment.experiment_id)}")
    if not is_server:
        words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", store]
        os.execvpe(sys.executable, [sys.executable, "-m", "mlflow", "server", *words], environment)


if __name__ == "__main__":
    main()
