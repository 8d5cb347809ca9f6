from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
from mlflow import MlflowClient

from experiments.tracking.model import VOLUMES, log_model
from tests.tiny_networks import write_cine, write_unet

LOADED = """
import json, sys
import mlflow
address, store, params, images = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4:]
mlflow.set_tracking_uri(store)
model = mlflow.pyfunc.load_model(address)
answer = model.predict([{"image": image} for image in images], params=params)
print(json.dumps({"inputs": model.metadata.signature.inputs.input_names(), "rows": answer.to_dict("records")}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """A database on disk, a run in it, and the folder of its artifacts."""
    place = tmp_path_factory.mktemp("mlflow")
    address = f"sqlite:///{place / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    experiment = client.create_experiment("runs", artifact_location=(place / "artifacts").as_uri())
    return address, client.create_run(experiment).info.run_id, place / "artifacts"


def test_a_logged_network_segments_studies_in_another_process(store: tuple[str, str, Path], tmp_path: Path) -> None:
    address, run, artifacts = store
    network = write_unet(tmp_path / "secret" / "net")
    model = log_model(run, address, network)
    assert log_model(run, address, network) == model  # logged once
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    assert [f"models:/{found.model_id}" for found in client.get_run(run).outputs.model_outputs] == [model]
    assert client.get_run(run).info.status == "RUNNING"
    for path in artifacts.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")
        assert path.is_dir() or b"secret" not in path.read_bytes()

    image, broken = write_cine(tmp_path / "studies" / "cine.nii.gz", 0), tmp_path / "studies" / "broken.nii"
    broken.write_bytes(b"not an image")
    arguments = [model, address, json.dumps({"out": str(tmp_path / "out")}), str(image), str(broken)]
    command = [sys.executable, "-c", LOADED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["inputs"] == ["image"]
    good, bad = answer["rows"]
    assert nib.load(good["mask"]).shape == nib.load(image).shape
    report = json.loads(Path(good["report"]).read_text())
    assert good["lv_edv_ml"] == report["lv"]["edv_ml"] and good["error"] == ""
    assert bad["mask"] == "" and "broken.nii" in bad["error"] and all(math.isnan(bad[name]) for name in VOLUMES)
