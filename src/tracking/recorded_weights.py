"""The weights of a recorded run, by its id in MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path

from src.common.errors import Failure
from src.common.files import sha256_of
from src.common.paths import ROOT
from src.common.run_folder import RunFolder


def recorded_weights(run_id: str, target: Path) -> tuple[Path, str]:
    """A file with the weights, and their recorded sha256.

    In the run's folder, if they are still there; else fetched from its artifacts to `target`.

    Raises:
        Failure: there is no such run, or it recorded no weights.
    """
    from mlflow.exceptions import MlflowException

    from src.tracking.store import connect
    from src.tracking.tracker import DEFAULT_STORE, MODEL_TAG, resolve_store

    client = connect(resolve_store(None, DEFAULT_STORE))
    try:
        tags = client.get_run(run_id).data.tags
        sha256 = tags.get(MODEL_TAG)
        if sha256 is None:
            raise Failure(f"init_from: the run {run_id} recorded no trained model: choose a complete one")
        local = RunFolder(ROOT / tags.get("pipeline.output", "")).weights
        if local.is_file() and sha256_of(local) == sha256:
            return local, sha256
        fetched = Path(client.download_artifacts(run_id, f"export/{target.name}", str(target.parent)))
    except (MlflowException, OSError) as error:
        raise Failure(
            f"init_from: {run_id} is neither a folder nor a run with weights ({' '.join(str(error).split())[:120]}); "
            "name a run's folder, or the id of an exported run as `make ui` shows it"
        ) from None
    fetched.replace(target)
    shutil.rmtree(target.parent / "export", ignore_errors=True)
    return target, sha256
