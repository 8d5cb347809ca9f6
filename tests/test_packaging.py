"""What a newcomer installs and what a cluster opens: pyproject.toml, constraints.txt, ray_cluster.yaml, .ci/run."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("storage", "pipeline", "actors", "experiments")
# What a CUDA build of torch adds is pinned by torch itself.
PINNED_BY_TORCH = re.compile(r"nvidia-.*|cuda-.*|triton")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pinned)
    return {canonicalize_name(name): Version(version) for name, version in pinned}


def requirements(project: dict[str, Any]) -> list[Requirement]:
    """The direct requirements of cardiomix[dev,s3,docs]."""
    extras = project["project"]["optional-dependencies"]
    listed = [*project["project"]["dependencies"], *(r for extra in ("dev", "s3", "docs") for r in extras[extra])]
    return [Requirement(r) for r in listed]


def closure(roots: list[Requirement]) -> dict[str, list[Requirement]]:
    """Every requirement that installing `roots` leads to here, by name; packages not installed are not entered."""
    found: dict[str, list[Requirement]] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, extra) for requirement in roots for extra in ("", *requirement.extras)]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(requirement)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            texts = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, texts):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed, e) for e in ("", *needed.extras)]
    return found


def test_constraints_pin_everything_that_gets_installed(project: dict[str, Any], pins: dict[str, Version]) -> None:
    needed = {name for name in closure(requirements(project)) if not PINNED_BY_TORCH.fullmatch(name)}
    assert len(needed) > 50
    assert sorted(needed - pins.keys()) == []


def test_every_pin_lies_in_every_range_that_applies_to_it(project: dict[str, Any], pins: dict[str, Version]) -> None:
    outside = [
        f"{name}=={pins[name]} is not in {requirement}"
        for name, ranges in closure(requirements(project)).items()
        for requirement in ranges
        if name in pins and not requirement.specifier.contains(pins[name], prereleases=True)
    ]
    assert outside == []


def test_dependencies_are_ranges_and_pins_carry_no_local_version(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    assert [str(r) for r in requirements(project) if not r.specifier or "==" in str(r.specifier)] == []
    assert [name for name, version in pins.items() if version.local] == []


def test_every_third_party_import_is_a_declared_dependency(project: dict[str, Any]) -> None:
    optional = map(Requirement, project["project"]["optional-dependencies"]["nnunet"])  # of two arms alone
    declared = {canonicalize_name(r.name) for r in (*requirements(project), *optional)}
    provider = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - {*PACKAGES, *sys.stdlib_module_names}:
                if not declared & {canonicalize_name(d) for d in provider.get(top, [top])}:
                    undeclared.add(f"{path.relative_to(ROOT)} imports {top}")
    assert sorted(undeclared) == []


def test_console_script_points_at_a_function(project: dict[str, Any]) -> None:
    module, function = project["project"]["scripts"]["cardiomix"].split(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_cluster_file_is_valid_by_rays_own_schema(cluster: dict[str, Any]) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)
    nodes = cluster["available_node_types"]
    workers = {name: node for name, node in nodes.items() if name != cluster["head_node_type"]}
    assert len(workers) == len(nodes) - 1
    assert sum(node["max_workers"] for node in workers.values()) <= cluster["max_workers"]


def test_cluster_image_is_the_ray_that_constraints_pin(cluster: dict[str, Any], pins: dict[str, Version]) -> None:
    images = [cluster["docker"]["image"]]
    images += [n["docker"]["worker_image"] for n in cluster["available_node_types"].values() if "docker" in n]
    assert {image.split(":")[1].split("-")[0] for image in images} == {str(pins["ray"])}


def test_cluster_asks_for_the_token_and_sends_no_usage_statistics(cluster: dict[str, Any]) -> None:
    starts = [c for kind in ("head", "worker") for c in cluster[f"{kind}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_USAGE_STATS_ENABLED=0" in command
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def strings_of(tree: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def test_nothing_listens_to_the_world(cluster: dict[str, Any]) -> None:
    (head,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    hosts = re.findall(r"--dashboard-host[= ](\S+)", head)
    assert [ipaddress.ip_address(host).is_loopback for host in hosts] == [True]
    assert "security_group" not in cluster["provider"]  # no rule beyond the launcher's own
    everywhere = re.compile(r"\b0\.0\.0\.0\b|::/0")
    texts = {"ray_cluster.yaml": json.dumps(cluster), "Makefile": (ROOT / "Makefile").read_text(encoding="utf-8")}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        texts[str(path)] = "\n".join(strings_of(ast.parse(path.read_text(encoding="utf-8"))))
    assert [name for name, text in texts.items() if everywhere.search(text)] == []


def test_ci_runs_the_check_and_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in commands
    # beside each other, and the check's own failure counts
    assert commands.index("make check & check=$!") < commands.index("make test") < commands.index("wait $check")
    assert "\nmake test" in (ROOT / "README.md").read_text(encoding="utf-8")
