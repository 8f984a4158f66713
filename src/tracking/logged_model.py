"""An exported ONNX file as a model of its run in MLflow, with signature and input example.

`mlflow models serve` and the model registry take it from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.files import sha256_of

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

SHA256_TAG = "pipeline.onnx_sha256"


def send_model(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    """Adds the model of a journal's record to the run, unless the run has it; one that was sent in part is replaced."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    path, name = Path(record["model"]), record["name"]
    run = client.get_run(run_id)
    sha256 = sha256_of(path)
    of_run = f"source_run_id = '{run_id}' AND name = '{name}'"
    for model in client.search_logged_models([run.info.experiment_id], of_run):
        if model.tags.get(SHA256_TAG) != sha256:
            continue
        if model.status == LoggedModelStatus.READY:
            return
        client.delete_logged_model(model.model_id)
    model = client.create_logged_model(
        run.info.experiment_id, name, run_id, tags={SHA256_TAG: sha256}, model_type="onnx"
    )
    with tempfile.TemporaryDirectory() as folder:
        _save(path, Path(folder, "model"), record["example"], model.model_id)
        client.log_model_artifacts(model.model_id, str(Path(folder, "model")))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def _save(graph: Path, folder: Path, example: Mapping[str, Any], model_id: str) -> None:
    """Writes MLflow's folder of a model; the packages are named, since MLflow would find them out by running it."""
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import Model

    inputs = {name: np.array(array["values"], array["dtype"]) for name, array in example.items()}
    model = onnx.load(graph)
    mlflow.onnx.save_model(
        model,
        folder,
        mlflow_model=Model(model_id=model_id),
        signature=_signature(model),
        input_example=inputs,
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "onnx", "onnxruntime", "numpy")],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )


def _signature(model: Any) -> ModelSignature:
    """The graph's inputs and outputs, free dimensions as -1."""
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        return TensorSpec(dtype, [dim.dim_value or -1 for dim in tensor.shape.dim], value.name)

    return ModelSignature(
        Schema([spec(value) for value in model.graph.input]), Schema([*map(spec, model.graph.output)])
    )
