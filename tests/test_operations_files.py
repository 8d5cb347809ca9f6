"""What docs/operations gives to a cluster: RayJob, image and runtime environments, against what those take."""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = ROOT / "docs" / "operations"
PACKAGES = ("storage", "pipeline", "actors", "experiments")

# KubeRay's fields of ray.io/v1, (all, required): the json tags of ray-operator/apis/ray/v1/rayjob_types.go (commit
# 0057210ed5a9) and raycluster_types.go (026f143324c0) in github.com/ray-project/kuberay; authOptions by the notes of
# release 1.5.1.
Fields = tuple[str, str]
RAY_JOB: Fields = (
    "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig "
    "managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus "
    "entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend schedule",
    "entrypoint rayClusterSpec",
)
RAY_CLUSTER: Fields = (
    "headGroupSpec workerGroupSpecs rayVersion enableInTreeAutoscaling autoscalerOptions headServiceAnnotations "
    "suspend authOptions",
    "headGroupSpec",
)
HEAD: Fields = ("serviceType headService enableIngress rayStartParams template", "rayStartParams template")
WORKERS: Fields = (
    "groupName replicas minReplicas maxReplicas numOfHosts rayStartParams template scaleStrategy",
    "groupName minReplicas maxReplicas rayStartParams template",
)
AUTOSCALER: Fields = (
    "resources image imagePullPolicy env envFrom volumeMounts securityContext idleTimeoutSeconds upscalingMode",
    "",
)
AUTH: Fields = ("mode", "mode")
SUBMITTER: Fields = ("backoffLimit", "")
# Of Kubernetes' core/v1, what a pod of ours may need.
POD: Fields = (
    "containers volumes serviceAccountName nodeSelector tolerations affinity imagePullSecrets",
    "containers",
)
CONTAINER: Fields = (
    "name image imagePullPolicy env envFrom resources securityContext volumeMounts",
    "name image resources",
)


def matches(document: dict[str, Any], fields: Fields) -> bool:
    known, required = fields
    return set(required.split()) <= document.keys() <= set(known.split())


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((OPERATIONS / "rayjob.yaml").read_text(encoding="utf-8"))
    return loaded


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_ray_job_has_kuberays_fields_alone(job: dict[str, Any]) -> None:
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert matches(spec, RAY_JOB) and matches(spec["submitterConfig"], SUBMITTER)
    assert matches(cluster, RAY_CLUSTER) and matches(cluster["headGroupSpec"], HEAD)
    assert matches(cluster["autoscalerOptions"], AUTOSCALER) and matches(cluster["authOptions"], AUTH)
    assert [group["groupName"] for group in cluster["workerGroupSpecs"] if not matches(group, WORKERS)] == []
    for pod in pods(job):
        assert matches(pod, POD)
        assert all(matches(container, CONTAINER) for container in pod["containers"])
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


def test_the_ray_job_wants_a_token_and_opens_and_holds_nothing(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    text = (OPERATIONS / "rayjob.yaml").read_text(encoding="utf-8")
    assert not re.search(r"0\.0\.0\.0|enableIngress|LoadBalancer|NodePort|hostNetwork|privileged: true", text)
    assert not re.search(r"(?i)(password|secret_access_key|auth_token|access_key_id)\s*[:=]", text)
    for pod in pods(job):
        for container in pod["containers"]:
            assert container["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_ray_job_gives_the_command_line_what_it_knows(job: dict[str, Any]) -> None:
    from experiments.config import PRESETS

    program, verb, preset, *options = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("cardiomix", "ablate")
    assert preset in PRESETS
    assert dict(zip(options[::2], options[1::2], strict=True)).keys() == {"--data", "--run"}


def test_every_file_names_the_ray_that_constraints_pin(job: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    dockerfile = (OPERATIONS / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"rayproject/ray:([\d.]+)", dockerfile)) == {pins["ray"]}


def test_the_image_is_made_of_the_packages_and_of_nothing_else() -> None:
    dockerfile = (OPERATIONS / "Dockerfile").read_text(encoding="utf-8")
    copied = {name for line in re.findall(r"^COPY --chown=ray (.+) \S+$", dockerfile, re.M) for name in line.split()}
    assert {*PACKAGES, "pyproject.toml", "constraints.txt"} <= copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = (OPERATIONS / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


@pytest.mark.parametrize("name", ["runtime_env.yaml", "runtime_env_pip.yaml"])
def test_a_runtime_environment_is_what_ray_takes_and_carries_code_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package
    from ray.runtime_env import RuntimeEnv

    document = yaml.safe_load((OPERATIONS / name).read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT)  # from where the file is to be submitted
    assert RuntimeEnv(**document).has_working_dir()
    package = tmp_path / "package.zip"
    create_package(
        str(ROOT / document["working_dir"]),
        package,
        include_gitignore=True,
        excludes=[*get_runtime_env_default_excludes(), *document["excludes"]],
    )
    assert package.stat().st_size < 2_000_000  # Ray's limit is 100 MiB
    carried = {Path(file).parts[0] for file in zipfile.ZipFile(package).namelist()}
    assert {*PACKAGES, "constraints.txt", "pyproject.toml", "README.md", "LICENSE"} <= carried
    assert carried & {".git", ".venv", "runs", "data", "tests", "docs", "benchmarks", "mlartifacts"} == set()


def test_a_job_without_an_image_installs_the_pinned_dependencies() -> None:
    document = yaml.safe_load((OPERATIONS / "runtime_env_pip.yaml").read_text(encoding="utf-8"))
    place = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
    assert document["pip"]["packages"] == [f"--constraint {place}/constraints.txt", f"{place}[s3]"]
