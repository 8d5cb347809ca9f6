"""Log a trained network as an MLflow model, which turns images into masks and volumes. Nothing is pickled.

The model holds `model.safetensors`, `model.json` and the few lines of `model_code.py`, which MLflow runs when it loads
the model ("models from code"). Everything else comes from the installed cardiomix.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from storage import fs
from storage.bank.spec import UNKNOWN, code_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

    from experiments.tracking.artifacts import Artifacts

NAME = "segmentation"
FINGERPRINT_TAG = "cardiomix_fingerprint"
CODE = Path(__file__).with_name("model_code.py")
NETWORK = "network"
VOLUMES = ("lv_edv_ml", "lv_esv_ml", "lv_ef_percent", "rv_edv_ml", "rv_esv_ml", "rv_ef_percent", "lv_mass_g")


def log_model(run_id: str, tracking_uri: str, model_folder: str, files: Artifacts | None = None) -> str:
    """Log the network in `model_folder` as a model of an MLflow run. Returns its address, `models:/<id>`.

    `files` stores the model's files; without it, MLflow does. The same network is logged only once: a second call
    returns the first model, or completes it. Only this run's store is used; MLflow's global tracking URI and active run
    stay as they are. Raises InputError if the folder holds no network, and MLflow's exceptions if the store fails.
    """
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelOutput

    from pipeline.networks.description import read_config

    name = str(read_config(model_folder)["fingerprint"])
    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    model = _logged(client, experiment, run_id, name)
    if model is None:
        tags = {FINGERPRINT_TAG: name}
        model = client.create_logged_model(experiment, NAME, run_id, tags=tags, model_type="segmentation")
    if model.status.name == "READY":
        return f"models:/{model.model_id}"
    with TemporaryDirectory() as scratch:
        saved = save_model(str(Path(scratch) / "saved"), model_folder, run_id=run_id, model_id=model.model_id)
        (files.model if files else client.log_model_artifacts)(model.model_id, saved)
    if model.model_id not in [output.model_id for output in (run.outputs.model_outputs if run.outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, "READY")
    return f"models:/{model.model_id}"


def save_model(target: str, model_folder: str, **identity: Any) -> str:
    """Write an MLflow model to the local folder `target`, and return it. `identity` goes to `mlflow.models.Model`."""
    import mlflow.pyfunc
    from mlflow.models import Model

    from pipeline.networks.description import CONFIG, WEIGHTS

    model = Model(**identity)
    with TemporaryDirectory() as scratch:
        for file in (CONFIG, WEIGHTS):
            fs.write_bytes(fs.join(scratch, NETWORK, file), fs.read_bytes(fs.join(model_folder, file)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an input example is missing; MLflow would segment it
            mlflow.pyfunc.save_model(
                target,
                python_model=str(CODE),
                artifacts={NETWORK: str(Path(scratch) / NETWORK)},
                signature=signature(),
                pip_requirements=["cardiomix" if (made_by := code_version()) == UNKNOWN else f"cardiomix=={made_by}"],
                mlflow_model=model,
            )
    _forget_origin(model, target)
    return target


def _forget_origin(model: Model, target: str) -> None:
    """Remove the places from which MLflow copied code and weights: folders of this machine mean nothing elsewhere."""
    flavor = model.flavors["python_function"]
    flavor["model_code_path"] = CODE.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(Path(target) / "MLmodel"))


def signature() -> ModelSignature:
    """Input: a column `image` of NIfTI paths. Output: a row for each, with `mask`, `report`, `error` and `VOLUMES`.

    A volume that is not known is NaN. Parameters: `out`, the folder to write to; `pixel_area` in mm² (0 for the image's
    own); `flips`; `keep_largest`.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    columns: list[Any] = [ColSpec(DataType.string, name) for name in ("image", "mask", "report", "error")]
    columns += [ColSpec(DataType.double, name) for name in VOLUMES]
    params = [
        ParamSpec("out", DataType.string, "predictions"),
        ParamSpec("pixel_area", DataType.double, 0.0),
        ParamSpec("flips", DataType.boolean, False),
        ParamSpec("keep_largest", DataType.boolean, True),
    ]
    return ModelSignature(Schema([ColSpec(DataType.string, "image")]), Schema(columns), ParamSchema(params))


def _logged(client: MlflowClient, experiment: str, run_id: str, name: str) -> LoggedModel | None:
    """The run's model of this network, or None. The model is complete only if its status is READY."""
    token: str | None = None
    while True:
        page = client.search_logged_models([experiment], f"tags.`{FINGERPRINT_TAG}` = '{name}'", page_token=token)
        for model in page:
            if model.source_run_id == run_id:
                return model
        token = page.token
        if not token:
            return None
